"""Inputs and comparisons that the tests of the matrix recurrences share."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np

DECAYS = ('none', 'head', 'token', 'channel')


def module(name):
    return importlib.import_module(f'attnx.ops.{name}')


def op(name):
    return getattr(module(name), name)


def inputs(name, seed=0, *, B=2, T=130, K=1, N=2, H=4, Hv=5, decay='token', nats=1.0, dtype=np.float64, state=True):
    """Random arguments as a dict: unit keys, beta in [0, 1], log_decay in [-nats, 0], a first state."""
    r = np.random.default_rng(seed)
    key = r.normal(size=(B, T, K, H))
    shape = {'none': None, 'head': (N,), 'token': (B, T, N), 'channel': (B, T, N, H)}[decay]
    arrays = {
        'query': r.normal(size=(B, T, K, H)),
        'key': key / np.linalg.norm(key, axis=-1, keepdims=True),
        'value': r.normal(size=(B, T, N, Hv)),
    }
    if name == 'delta_rule':
        arrays['beta'] = r.uniform(size=(B, T, N))
    if shape:
        arrays['log_decay'] = -nats * r.uniform(size=shape)
    if state:
        arrays['initial_state'] = r.normal(size=(B, N, H, Hv))
    return {k: jnp.asarray(v, dtype) for k, v in arrays.items()}


def segments(seed, B=2, T=130, rate=0.1):
    """Ids that change at random places, and come back to earlier values; one segment for rate 0."""
    r = np.random.default_rng(seed)
    return jnp.asarray(np.cumsum(r.uniform(size=(B, T)) < rate, axis=1) % 3, jnp.int32)


@functools.cache
def forward(name, impl, **options):
    """Jitted (arrays, segment_ids) -> (out, state)."""
    return jax.jit(lambda arrays, ids: op(name)(**arrays, segment_ids=ids, impl=impl, **options))


@functools.cache
def gradients(name, impl, **options):
    """Jitted (arrays, segment_ids) -> ((out, state), gradients of every array of `total`)."""

    def loss(arrays, ids):
        outputs = op(name)(**arrays, segment_ids=ids, impl=impl, **options)
        return total(*outputs), outputs

    return jax.jit(lambda arrays, ids: jax.grad(loss, has_aux=True)(arrays, ids)[::-1])


def total(out, state):
    """A loss to which every output matters, each in its own way."""
    return jnp.sum(jnp.sin(out + jnp.arange(out.shape[-1]))) + jnp.sum(jnp.cos(state))


def compare(name, arrays, ids, tolerance):
    """Chunked against token by token: outputs, final state, gradients of every array."""
    assert_close(gradients(name, 'xla')(arrays, ids), gradients(name, 'reference')(arrays, ids), tolerance)


def split_and_carry(name, arrays, ids, parts):
    """Outputs and last state of the parts run one after the other; the caller drops a state from another segment."""
    outs, state, start = [], arrays['initial_state'], 0
    for length in parts:
        stop = start + length
        part = {k: v[:, start:stop] for k, v in arrays.items() if k != 'initial_state'}
        if start:
            state = jnp.where((ids[:, start] == ids[:, start - 1])[:, None, None, None], state, 0)
        out, state = forward(name, 'xla')(part | {'initial_state': state}, ids[:, start:stop])
        outs.append(out)
        start = stop
    return jnp.concatenate(outs, axis=1), state


def second_derivatives(name, arrays, impl, chunk):
    """The Hessian of `total` times one direction: forward over reverse."""
    way = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), arrays)
    grad = jax.grad(lambda a: total(*op(name)(**a, chunk=chunk, impl=impl)))
    return jax.jit(lambda a, t: jax.jvp(grad, (a,), (t,)))(arrays, way)


def assert_finite_differences(name, arrays, ids, tolerance):
    """float64 central differences along one random direction per array."""
    _, grads = gradients(name, 'xla')(arrays, ids)
    loss = lambda changed: float(total(*forward(name, 'xla')(arrays | changed, ids)))
    for seed, (key, x) in enumerate(arrays.items()):
        way = np.random.default_rng(seed).normal(size=x.shape)
        up, down = (loss({key: x + step * way}) for step in (1e-5, -1e-5))
        found, expected = float(jnp.vdot(grads[key], way)), (up - down) / 2e-5
        assert abs(found - expected) <= tolerance * max(abs(expected), 1), (key, found, expected)


def temporaries(name, T):
    """Bytes of temporaries of forward and backward of one head of width 64."""
    make = lambda: inputs(name, B=1, T=T, N=1, H=64, Hv=64, dtype=np.float32, state=False)
    compiled = gradients(name, 'xla').lower(jax.eval_shape(make), None).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def assert_close(given, expected, tolerance):
    """Leaf by leaf, relative to each expected leaf's largest magnitude; everything finite."""
    flat, expected = jax.tree_util.tree_flatten_with_path(given)[0], jax.tree.leaves(expected)
    assert len(flat) == len(expected)
    for (path, x), y in zip(flat, expected):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape, (path, x.shape, y.shape)
        assert np.isfinite(x).all(), path
        error = np.abs(x - y).max(initial=0) / max(np.abs(y).max(initial=0), 1e-30)
        assert error <= tolerance, f'{jax.tree_util.keystr(path)}: error {error:.2e}, tolerance {tolerance:.0e}'


def over_rows(op):
    """Jitted (arrays, segment_ids, rows) -> (out, state), and gradients of every array of `total` of these rows."""

    def loss(arrays, ids, rows):
        out, state = op(**arrays, segment_ids=ids)
        return total(out[:, rows], state), (out, state)

    return jax.jit(lambda *args: jax.grad(loss, has_aux=True)(*args)[::-1])


def assert_documents_keep_their_poison(name, decay, run, tolerance):
    """NaN and Inf in the middle document, and in a query, change nothing of the other rows: outputs, state, gradients.

    run: of `over_rows`.
    """
    arrays = inputs(name, B=1, T=40, N=2, K=1, H=16, Hv=8, decay=decay, dtype=np.float32)
    ids = jnp.repeat(jnp.array([[1, 2, 3]]), jnp.array([11, 13, 16]), axis=1, total_repeat_length=40)
    bad = dict(arrays)
    bad['key'] = bad['key'].at[0, 13, 0, 2].set(jnp.nan)
    bad['value'] = bad['value'].at[0, 17, 1, 3].set(jnp.inf)
    bad['query'] = bad['query'].at[0, 30].set(jnp.nan)
    for gate in {'beta', 'log_decay'} & {*bad}:
        if bad[gate].ndim > 1:
            bad[gate] = bad[gate].at[0, 15].set(jnp.nan)
    clean = np.array([*range(13), *range(24, 30), *range(31, 40)])
    rows = jnp.asarray(np.resize(clean, 40))  # some count twice: as many as in other calls, which were compiled
    ((out, state), grads), ((want, want_state), want_grads) = (run(a, ids, rows) for a in (bad, arrays))
    # The poisoned query has no cotangent; the middle document's own gradients before its poison are whatever they are.
    keep = lambda grads: {n: g[:, [*range(11), *range(24, 40)]] if n in ids_of else g for n, g in grads.items()}
    ids_of = {n for n, a in arrays.items() if a.ndim > 2 and a.shape[1] == 40}
    assert_close((out[:, clean], state, keep(grads)), (want[:, clean], want_state, keep(want_grads)), tolerance)
    assert np.isnan(out[0, 13:24, 0]).all() and np.isnan(out[0, 30]).all()
