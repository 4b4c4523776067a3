"""Selective attention against its definition, and what its pruned cache keeps."""

import jax
import jax.numpy as jnp
import numpy as np

from attnx.ops import masks, selective_attention
from attnx.ops.selective_attention import xla
from attnx.spec import Context
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


def definition(q, k, v):
    """One row of the batch by loops: (out [T, N, H], F [T, S])."""
    length, _, h = q.shape
    logits = np.einsum('tnh,snh->nts', q, k) * h**-0.5
    hidden = np.zeros((length, length))
    for t in range(1, length):
        new = np.maximum(logits[0, t - 1], 0)
        new[0] = new[t - 1] = 0
        new[t:] = 0
        hidden[t] = hidden[t - 1] + new
    out = np.zeros(q.shape)
    for t in range(length):
        w = np.exp(logits[:, t, : t + 1] - hidden[t, : t + 1])
        out[t] = np.einsum('ns,snh->nh', w / w.sum(-1, keepdims=True), v[: t + 1])
    return out, hidden


def test_is_its_definition_and_rows_at_a_time_are_the_same():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 13, 2, 8)) for _ in range(3))
    arrays = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]
    protected = jnp.arange(13)[None] == 0
    found = selective_attention(*arrays, mask=masks.causal(), protected=protected)
    out, hidden = definition(q[0], k[0], v[0])
    close(found.out[0], out, tolerances.FLOAT32)
    options = {'protected': protected, 'mask': masks.causal()}
    run = lambda arrays, rows: jnp.sum(jnp.sin(xla(*arrays, **options, rows=rows).out))
    gradient = jax.jit(jax.grad(run), static_argnums=1)
    for a, b in zip(*(gradient(arrays, rows) for rows in (4, 13))):
        close(a, b, tolerances.FLOAT32_GRAD)
    kept = [sum(1 - min(f, 1) for f in row[: t + 1]) for t, row in enumerate(hidden)]
    close(found.kept[0], max(kept), tolerances.FLOAT32)
    assert not np.asarray(found.hidden)[:, 0].any()
    quiet = selective_attention(-jnp.abs(arrays[0]), jnp.abs(arrays[1]), arrays[2], mask=masks.causal())
    assert not np.asarray(quiet.hidden).any()  # head 0 has no positive logit: ordinary attention


def run(mixer, x, budget_state):
    state, found = budget_state, []
    for t in range(x.shape[1]):
        y, state = oracle.extend(mixer, x[:, t : t + 1], Context(), state)
        found.append(np.asarray(y))
    return np.concatenate(found, axis=1), state


def test_the_pruned_cache_keeps_the_least_hidden():
    x = oracle.inputs()
    whole = oracle.build('selective', num_heads=2)
    expected, full = run(whole, x, whole.init_state(2, 12, jnp.float32))
    roomy, small = (oracle.build('selective', num_heads=2, budget=b) for b in (12, 5))
    y, _ = run(roomy, x, roomy.init_state(2, 12, jnp.float32))
    close(y, expected, tolerances.FLOAT32)  # nothing is dropped
    y, state = run(small, x, small.init_state(2, 12, jnp.float32))
    assert y.shape == expected.shape and state.hidden.shape == (2, 5)
    slots = np.asarray(state.slots)
    assert (slots[:, 0] == 0).all() and (slots[:, -1] == 11).all() and (np.diff(slots) > 0).all()
    dropped = np.asarray(full.hidden)[0, [s for s in range(12) if s not in slots[0]]]
    assert dropped.min() > 0 or np.asarray(state.hidden)[0].max() == 0
