"""Figures per head against the definition in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.ops import masks, scores, softmax_attention, statistics
from pallas_kernels.elementwise import as_mask, as_score


@pytest.mark.parametrize('sinks', [None, np.array([0.5, -1.0, 2.0, 0.0], np.float32)], ids=['no sink', 'sinks'])
@pytest.mark.parametrize('block', [None, 3])
def test_softmax_figures(sinks, block, monkeypatch):
    if block:
        monkeypatch.setattr(statistics, 'PAIRS', 2 * 4 * 11 * block)
    rng, (B, T, N, K, H) = np.random.default_rng(0), (2, 11, 4, 2, 8)
    q, k = rng.normal(size=(B, T, N, H)), rng.normal(size=(B, T, K, H))
    ids = np.array([[1] * 5 + [2] * 4 + [0] * 2, [1] * 11])
    mask = as_mask(masks.causal() & masks.segments(jnp.asarray(ids)))
    score = as_score(scores.softcap(2.0))

    def figures(q, k):
        given = {'mask': mask, 'score': score, 'scale': 0.5}
        out = softmax_attention(q, k, k, **given, sinks=sinks, return_lse=True, return_stats=True, impl='xla')
        return statistics.softmax(q, k, **given, sinks=sinks), statistics.of_op(out, q, k, **given)

    computed, found = jax.jit(figures)(jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32))
    for name, value in computed.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)
    x = 2 * np.tanh(np.einsum('btnh,bsnh->bnts', q, np.repeat(k, N // K, axis=2)) * 0.5 / 2)
    seen = np.tril(np.ones((T, T), bool)) & (ids[:, :, None] == ids[:, None]) & (ids > 0)[:, :, None]
    x = np.where(seen[:, None], x, -np.inf)
    np.testing.assert_allclose(found['max_logit'], x.max((0, 2, 3)), rtol=1e-5)
    entropy, mass = np.zeros(N), np.zeros(N)
    rows = [(b, t) for b in range(B) for t in range(T) if seen[b, t].any()]
    for n in range(N):
        for b, t in rows:
            logits = x[b, n, t][seen[b, t]]
            logits = logits if sinks is None else np.append(logits, sinks[n])
            p = np.exp(logits - logits.max())
            p /= p.sum()
            entropy[n] -= (p * np.log(p)).sum() / len(rows)
            mass[n] += (p[0] + (0 if sinks is None else p[-1])) / len(rows)
    np.testing.assert_allclose(found['entropy'], entropy, rtol=1e-5)
    np.testing.assert_allclose(found['sink_mass'], mass, rtol=1e-5)


@pytest.mark.parametrize('shape', [(3,), (2, 5, 3), (2, 5, 3, 4)])
def test_recurrence_figures(shape):
    rng = np.random.default_rng(0)
    g, state = -rng.uniform(0.01, 1, shape), rng.normal(size=(2, 3, 4, 6))
    found = statistics.recurrence(jnp.asarray(g, jnp.float32), jnp.asarray(state, jnp.float32))
    axes = tuple(a for a in range(g.ndim) if a != (0 if g.ndim == 1 else 2))
    np.testing.assert_allclose(found['half_life'], np.log(2) / -g.mean(axes), rtol=1e-5)
    np.testing.assert_allclose(found['state_norm'], np.sqrt((state**2).sum((2, 3)).mean(0)), rtol=1e-5)
    assert set(statistics.recurrence(None, jnp.asarray(state))) == {'state_norm'}


def test_half_life_of_what_does_not_decay():
    assert np.isinf(statistics.recurrence(jnp.zeros(2), jnp.ones((1, 2, 3, 3)))['half_life']).all()
