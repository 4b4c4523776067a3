"""Forward mode beside an own backward pass: both derivatives, in every surrounding that differentiates in its own way."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnx.ops import masks, scores
from attnx.ops.softmax_attention import reference, xla
from tests.attnx.ops.test_softmax_attention import CASES, assert_close, float64, inputs, normal  # noqa: F401


def directional(form, arguments, options):
    """Derivative of (out, lse) along a random direction of all floating arrays, by forward mode under jit."""
    leaves, tree = jax.tree.flatten((arguments, options))
    floating = [i for i, x in enumerate(leaves) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]

    def f(*x):
        full = list(leaves)
        for i, value in zip(floating, x):
            full[i] = value
        arguments, options = jax.tree.unflatten(tree, full)
        return form(*arguments, **options, return_lse=True)

    x = tuple(jnp.asarray(leaves[i]) for i in floating)
    dx = tuple(normal(*y.shape, seed=n) for n, y in enumerate(x))
    return jax.jit(lambda x, dx: jax.jvp(jax.jit(f), x, dx)[1])(x, dx)


@pytest.mark.quick('packed, sinks, strip, dropout', 'more keys, chain of scores')
@pytest.mark.parametrize('name', CASES)
def test_forward_mode_equals_oracle(name):
    T, S, blocks, options = CASES[name]()
    arguments = inputs(T, S)
    got = directional(functools.partial(xla, block_sizes=blocks), arguments, options)
    for x, y in zip(got, directional(reference, arguments, options), strict=True):
        assert np.isfinite(x).all()
        assert_close(x, y)


MESH = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

# A loss in every surrounding that differentiates in its own way; f(q, k, v) -> out.
SURROUNDINGS = {
    'vmap': lambda f: jax.vmap(lambda q, k, v: f(q[None], k[None], v[None])[0]),
    'vmap, keys shared': lambda f: lambda q, k, v: jax.vmap(lambda q: f(q, k, v))(jnp.stack([q, 2 * q])),
    'scan': lambda f: lambda q, k, v: jax.lax.scan(lambda c, w: (f(c, w * k, v), None), q, jnp.arange(1.0, 4.0))[0],
    'checkpoint': lambda f: jax.checkpoint(lambda q, k, v: jnp.sin(f(jnp.sin(q), k, v))),
    'cond': lambda f: lambda q, k, v: jax.lax.cond(q.sum() > 0, lambda: f(q, k, v), lambda: f(q, v, k)),
    'shard_map': lambda f: jax.shard_map(f, mesh=MESH, in_specs=P('data'), out_specs=P('data')),
    'shard_map, keys whole': lambda f: jax.shard_map(
        lambda q, k, v: f(q, k[:1], v[:1]), mesh=MESH, in_specs=(P('data'), P(), P()), out_specs=P('data')
    ),
}


@pytest.mark.quick('scan', 'vmap, keys shared', 'checkpoint')
@pytest.mark.parametrize('name', SURROUNDINGS)
def test_both_modes_inside(name):
    arguments = inputs(9, K=2, H=4, Hv=4)
    direction = tuple(normal(*x.shape, seed=n) for n, x in enumerate(arguments))
    both = lambda form: SURROUNDINGS[name](lambda *a: form(*a, mask=masks.causal(), score=scores.softcap(2.0)))
    loss = lambda form: jax.jit(lambda q, k, v: (both(form)(q, k, v) ** 2).sum())

    @functools.partial(jax.jit, static_argnums=0)
    def run(form):
        return jax.grad(loss(form), (0, 1, 2))(*arguments), jax.jvp(loss(form), arguments, direction)

    for got, want in zip(*(jax.tree.leaves(run(form)) for form in (functools.partial(xla, block_sizes=(4, 4)), reference))):
        assert_close(got, want)


def test_compiling_adds_up_no_constants(capfd):
    """XLA on a CPU took a minute at 8,192 tokens to add up zeros of bfloat16 that no gradient needs, and said so."""
    q = jnp.zeros((1, 1024, 16, 64), jnp.bfloat16)
    loss = lambda q, k, v: xla(q, k, v, mask=masks.causal()).astype(jnp.float32).sum()
    jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q).compile()
    said = capfd.readouterr().err  # of what takes over a second
    assert not re.search(r'Constant folding an instruction.*\n\n.* = b?f\d+\[', said), said
