"""One mechanism at test size, with its functions compiled once and shared by the laws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnx import catalog
from attnx.nn import to_flat
from attnx.spec import Context, Dims

BATCH, LENGTH, WIDTH, MEMORY = 2, 24, 32, 9


@functools.lru_cache(maxsize=2)
def case(name: str) -> 'Case':
    """The causal and the bidirectional form of a mechanism are kept until those of the next."""
    return Case(name)


class Case:
    """The example config of a mechanism, built at width 32 with every parameter moved off its initial value.

    'mha' is causal if the mechanism can be, 'mha-bidirectional' is not.
    """

    def __init__(self, name: str):
        self.name, _, form = name.partition('-')
        self.spec, self.entry = catalog.get(self.name), catalog.entry(self.name)
        causal = not form and self.spec.causal != 'bidirectional'
        self.dims = Dims(width=WIDTH, causal=causal, num_layers=2, max_length=LENGTH, dtype=jnp.float32)
        self.form, self.shapes = form, jax.eval_shape(lambda: self.build(self.dims))
        rng = np.random.default_rng(0)
        self.moves = [0.05 * rng.standard_normal(v.shape).astype(v.dtype) for v in jax.tree.leaves(self.shapes)]
        self.x = rng.standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32)
        self.memory = rng.standard_normal((BATCH, MEMORY, WIDTH)).astype(np.float32)
        self.ones = np.ones((BATCH, LENGTH), np.int32)
        self._kept: dict = {}

    @functools.cached_property
    def module(self):
        causal, leaves = case(self.name) if self.form else self, jax.tree.leaves(self.shapes)
        if causal is not self and [v.shape for v in leaves] == [v.shape for v in jax.tree.leaves(causal.shapes)]:
            leaves = jax.tree.leaves(causal.module)  # both forms begin alike
        else:
            fresh = jax.tree.leaves(self.build(self.dims))  # no program: mechanisms draw arrays of the same few shapes
            leaves = [jnp.asarray(np.asarray(v) + move) for v, move in zip(fresh, self.moves)]
        return jax.tree.unflatten(jax.tree.structure(self.shapes), leaves)

    def build(self, dims):
        return self.spec.build_example(dims, rngs=nnx.Rngs(0))

    def with_dtype(self, dtype):
        """The same parameters, computing in another dtype."""
        abstract = jax.eval_shape(lambda: self.build(dataclasses.replace(self.dims, dtype=dtype)))
        return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(self.module))

    def context(self, x, ids, positions=None):
        memory = {}
        if 'memory' in self.spec.needs:
            copies = 1 if ids is None else ids.shape[0] // BATCH
            rows = jnp.tile(self.memory, (copies, 1, 1))
            memory = {'memory': rows, 'memory_mask': jnp.ones(rows.shape[:2], bool)}
        inputs = {name: side_input(kind, name, x) for name, kind in self.spec.inputs.items()}
        shared = {'embedding': jnp.asarray(x)[..., ::-1], 'fixed': jnp.arange(x.shape[0])}
        return Context(segment_ids=ids, positions=positions, layer=1, inputs=inputs, shared=shared, **memory)

    def plain(self, module, x, ids):
        return module(x, self.context(x, ids, positions_of(ids)))

    @functools.cached_property
    def both(self):
        """(module, x, segment ids, cotangent of y) -> y, gradients of module and x: one program for most laws."""

        def run(module, x, ids, cotangent):
            y, pull = jax.vjp(lambda module, x: self.plain(module, x, ids).y, module, x)
            return y, *pull(cotangent)

        return jax.jit(run)

    def forward(self, module, x, ids):
        """y, as it is in a gradient; positions restart in every document. Laws compare it with `plain`, which is without."""
        return self.both(module, x, ids, np.zeros_like(self.x))[0]

    def gradient(self, module, x, ids, cotangent):
        """Gradients of module and x."""
        return self.both(module, x, ids, cotangent)[1:]

    @functools.cached_property
    def extend(self):
        """(module, x, segment ids, positions, state) -> (y, state); compiled once per length."""

        def run(module, x, ids, positions, state):
            out = module(x, self.context(x, ids, positions), state)
            return out.y, out.state

        return jax.jit(run)

    def kept(self, key, make):
        """make(), once for each key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def initial(self):
        return self.module.init_state(BATCH, LENGTH, jnp.float32)


def side_input(kind: str, name: str, x):
    """A side input of the declared dtype and shape ('float32 B T 2'), a fixed function of x, so that it moves with x.

    Integers lie in [0, 4); of two T's, entry [i, j] is a distance of tokens i and j.
    """
    dtype, *letters = kind.removesuffix('?').split()
    x = jax.lax.stop_gradient(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))  # the same, whatever the dtype of x
    width = int(np.prod([int(n) for n in letters if n.isdigit()], initial=1))
    mix = np.random.default_rng(sum(map(ord, name))).standard_normal((x.shape[-1], width)).astype(np.float32)
    value = x @ (mix / x.shape[-1] ** 0.5)  # [B, T, width]
    if letters.count('T') == 2:
        value = jnp.abs(value[:, :, None] - value[:, None])
    value = value.reshape(*value.shape[:-1], *(int(n) for n in letters if n.isdigit()))
    if jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        return value.astype(dtype)
    return (value > 0) if dtype == 'bool' else jnp.clip(jnp.floor(value + 2), 0, 3).astype(dtype)


def positions_of(ids):
    """Position inside each document: index minus the index of the document's first token."""
    index = jnp.arange(ids.shape[1])[None]
    start = jnp.concatenate([jnp.ones_like(ids[:, :1], dtype=bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(start, index, 0), axis=1)


positions = jax.jit(positions_of)


def close(actual, expected, tolerance):
    """Largest difference at most `tolerance` times the largest magnitude expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert np.isfinite(actual).all(), 'not finite'
    error, size = np.abs(actual - expected).max(initial=0.0), np.abs(expected).max(initial=0.0)
    assert error <= tolerance * max(size, 1e-3), f'error {error:.3g} on magnitude {size:.3g}, tolerance {tolerance:g}'


def flat(module):
    return {k: np.asarray(v) for k, v in to_flat(module).items()}
