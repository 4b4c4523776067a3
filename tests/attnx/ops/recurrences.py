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


def inputs(name, seed=0, *, B=2, T=130, K=2, N=2, H=4, Hv=5, decay='token', nats=1.0, dtype=np.float64, state=True):
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
    """Ids that change at random places, and come back to earlier values."""
    r = np.random.default_rng(seed)
    return jnp.asarray(np.cumsum(r.uniform(size=(B, T)) < rate, axis=1) % 3, jnp.int32)


@functools.cache
def forward(name, impl, **options):
    """Jitted (arrays, segment_ids) -> (out, state)."""
    return jax.jit(lambda arrays, ids: op(name)(**arrays, segment_ids=ids, impl=impl, **options))


@functools.cache
def gradients(name, impl, **options):
    """Jitted (arrays, segment_ids) -> ((out, state), gradients of every array) of a loss that weighs all outputs."""

    def loss(arrays, ids):
        out, state = op(name)(**arrays, segment_ids=ids, impl=impl, **options)
        return jnp.sum(jnp.sin(out + jnp.arange(out.shape[-1]))) + jnp.sum(jnp.cos(state)), (out, state)

    return jax.jit(lambda arrays, ids: jax.grad(loss, has_aux=True)(arrays, ids)[::-1])


def assert_close(given, expected, tolerance):
    """Leaf by leaf, relative to each expected leaf's largest magnitude; everything finite."""
    flat, expected = jax.tree_util.tree_flatten_with_path(given)[0], jax.tree.leaves(expected)
    assert len(flat) == len(expected)
    for (path, x), y in zip(flat, expected):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape, (path, x.shape, y.shape)
        assert np.isfinite(x).all(), path
        error = np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)
        assert error <= tolerance, f'{jax.tree_util.keystr(path)}: error {error:.2e}, tolerance {tolerance:.0e}'
