import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tolerances
from tests.attnx.ops.recurrences import assert_close, op, segments

short_conv = op('short_conv')


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def inputs(seed=0, B=2, T=17, D=3, W=4, dtype=np.float64):
    r = np.random.default_rng(seed)
    shapes = {'x': (B, T, D), 'kernel': (W, D), 'initial_state': (B, W - 1, D)}
    return {k: jnp.asarray(r.normal(size=s), dtype) for k, s in shapes.items()}


def total(y, state):
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state))


@functools.cache
def run(impl, grad=True):
    """Jitted (arrays, ids) -> (y, state), and gradients."""
    call = lambda arrays, ids: short_conv(**arrays, segment_ids=ids, impl=impl)
    loss = lambda arrays, ids: (lambda outputs: (total(*outputs), outputs))(call(arrays, ids))
    return jax.jit(jax.grad(loss, has_aux=True)) if grad else jax.jit(call)


@pytest.mark.parametrize('T', [1, 2, 3, 17, 63, 1000])
@pytest.mark.parametrize('packed', [False, True])
def test_equals_token_by_token(T, packed):
    """Outputs, carried window and all gradients; T = 1 and T < W - 1 included."""
    arrays, ids = inputs(T=T), segments(T, T=T, rate=0.3) if packed else None
    assert_close(run('xla')(arrays, ids), run('reference')(arrays, ids), tolerances.FLOAT64)


@pytest.mark.parametrize('W', [1, 2, 7])
def test_widths(W):
    arrays, ids = inputs(W=W), segments(W, T=17)
    assert_close(run('xla')(arrays, ids), run('reference')(arrays, ids), tolerances.FLOAT64)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=34, max_size=34))
def test_any_segments(flat):
    with jax.enable_x64(True):
        arrays, ids = inputs(), jnp.asarray(flat, jnp.int32).reshape(2, 17)
        assert_close(run('xla')(arrays, ids), run('reference')(arrays, ids), tolerances.FLOAT64)


@pytest.mark.parametrize('packed', [False, True])
def test_activation(packed):
    """As the activation of what the convolution gives."""
    arrays, ids = inputs(), segments(1, T=17) if packed else None
    y, state = run('xla', grad=False)(arrays, ids)
    for impl in ('xla', 'reference'):
        found = short_conv(**arrays, segment_ids=ids, activation='silu', impl=impl)
        assert_close(found, (jax.nn.silu(y), state), tolerances.FLOAT64)


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('activation', [None, 'silu'])
def test_unit_heads(packed, activation):
    """As heads of the outcome divided by their lengths; gradients too."""
    arrays, ids = inputs(D=6), segments(1, T=17) if packed else None

    def composed(impl, arrays):
        y, state = short_conv(**arrays, segment_ids=ids, activation=activation, impl=impl)
        heads = y.reshape(2, 17, 3, 2)
        return (heads / jnp.sqrt(jnp.sum(heads**2, -1, keepdims=True) + 1e-6)).reshape(y.shape), state

    def fused(impl, arrays):
        return short_conv(**arrays, segment_ids=ids, activation=activation, unit_heads=3, impl=impl)

    loss = lambda form, impl: jax.jit(jax.value_and_grad(lambda a: total(*form(impl, a))))(arrays)
    for impl in ('xla', 'reference'):
        assert_close(loss(fused, impl), loss(composed, 'xla'), tolerances.FLOAT64)


def test_equals_numpy_convolution():
    a = inputs(B=1, D=1) | {'initial_state': None}
    y, state = run('xla', grad=False)(a, None)
    x, kernel = np.asarray(a['x'])[0, :, 0], np.asarray(a['kernel'])[:, 0]
    assert_close(y[0, :, 0], np.convolve(x, kernel[::-1])[:17], tolerances.FLOAT64)
    assert_close(state[0, :, 0], x[-3:], tolerances.FLOAT64)


def test_windows_do_not_cross_segments():
    """Each segment gives what it gives alone."""
    a, ids = inputs() | {'initial_state': None}, jnp.asarray([[1] * 5 + [2] * 2 + [1] * 10] * 2)
    y, state = run('xla', grad=False)(a, ids)
    for start, stop in ((0, 5), (5, 7), (7, 17)):
        alone, last = run('xla', grad=False)(a | {'x': a['x'][:, start:stop]}, None)
        assert_close(y[:, start:stop], alone, tolerances.FLOAT64)
    assert_close(state, last, tolerances.FLOAT64)
    leak = jax.jacobian(lambda x: run('xla', grad=False)(a | {'x': x}, ids)[0][0, :, 0])(a['x'])[:, 0, :, 0]
    assert not np.asarray(leak)[5:, :5].any()
    assert not np.asarray(leak)[7:, :7].any()


@pytest.mark.parametrize('parts', [(8, 9), (1,) * 17, (2, 1, 14)])
def test_split_sequence_carries_on(parts):
    """The carried window is zero before its last segment's start, so that a part may end anywhere."""
    arrays, ids = inputs(), segments(2, T=17, rate=0.4)
    whole = run('xla', grad=False)(arrays, ids)
    outs, state, start = [], arrays['initial_state'], 0
    for length in parts:
        stop = start + length
        if start:
            state = jnp.where((ids[:, start] == ids[:, start - 1])[:, None, None], state, 0)
        part = arrays | {'x': arrays['x'][:, start:stop], 'initial_state': state}
        y, state = run('xla', grad=False)(part, ids[:, start:stop])
        outs.append(y)
        start = stop
    assert_close((jnp.concatenate(outs, 1), state), whole, tolerances.FLOAT64)


def test_derivatives():
    arrays, ids = inputs(), segments(0, T=17)
    way = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), arrays)

    def second(impl):
        grad = jax.grad(lambda a: total(*short_conv(**a, segment_ids=ids, impl=impl)))
        return jax.jit(lambda a, t: jax.jvp(grad, (a,), (t,)))(arrays, way)

    found = second('xla')
    assert_close(found, second('reference'), tolerances.FLOAT64)
    loss = lambda step: float(total(*run('xla', grad=False)(jax.tree.map(lambda a, w: a + step * w, arrays, way), ids)))
    slope = sum(float(jnp.vdot(g, w)) for g, w in zip(jax.tree.leaves(found[0]), jax.tree.leaves(way)))
    assert slope == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=tolerances.FINITE_DIFFERENCE)


def test_vmap_and_second_run():
    arrays, ids = inputs(), segments(0, T=17)
    axes = {'x': 0, 'kernel': None, 'initial_state': 0}
    mapped = jax.vmap(lambda a, i: short_conv(**a, segment_ids=i, impl='xla'), in_axes=(axes, 0))
    add = lambda x: x[:, None]
    found = mapped(arrays | {k: add(arrays[k]) for k in ('x', 'initial_state')}, add(ids))
    expected = run('xla', grad=False)(arrays, ids)
    assert_close(jax.tree.map(lambda x: x[:, 0], found), expected, tolerances.FLOAT64)
    again = run('xla', grad=False)(arrays, ids)
    assert all(np.array_equal(a, b) for a, b in zip(expected, again))


def test_dtypes():
    a = inputs(dtype=jnp.bfloat16)
    y, state = run('xla', grad=False)(a, None)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.bfloat16)
    exact, _ = run('reference', grad=False)(jax.tree.map(lambda x: x.astype(jnp.float64), a), None)
    assert_close(y, exact, 2.0**-8)  # one rounding
    _, state = run('xla', grad=False)(a | {'initial_state': a['initial_state'].astype(jnp.float32)}, None)
    assert state.dtype == jnp.float32


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'x': np.ones((2, 17))}, r'x has shape \(2, 17\), expected 3 dimensions \[B, T, D\]'),
        ({'kernel': np.ones((4, 5))}, r'kernel has shape \(4, 5\), expected \[W, D\] = \(4, 3\)'),
        ({'kernel': np.ones((0, 3))}, 'a dimension is 0'),
        ({'initial_state': np.ones((2, 4, 3))}, r'initial_state has shape .* \[B, W-1, D\] = \(2, 3, 3\)'),
        ({'segment_ids': np.ones((2, 16), int)}, r'segment_ids has shape \(2, 16\)'),
        ({'x': np.ones((2, 17, 3), int)}, 'x has dtype int64, expected a floating one'),
        ({'impl': 'fast'}, "unknown impl 'fast'"),
        ({'activation': 'swish'}, "unknown activation 'swish'; .*silu"),
        ({'unit_heads': 2}, 'unit_heads 2 must divide the 3 channels'),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        short_conv(**(inputs() | change))
