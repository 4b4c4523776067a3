"""Scores: the papers' numbers, and bad input."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnx.ops import scores
from pallas_kernels.elementwise import Index, flatten


def apply(score, s, h=0, q=0, k=0, T=1, S=1, values=None):
    operands, call = flatten(score)
    return call(jnp.float32(s), Index(0, h, jnp.int32(q), jnp.int32(k), T, S), values or [o.array for o in operands])


def test_alibi_slopes():
    np.testing.assert_allclose(scores.alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(np.log2(scores.alibi_slopes(12)), [*range(-1, -9, -1), -0.5, -1.5, -2.5, -3.5], rtol=1e-6)


def test_alibi():
    slope = [jnp.float32(0.5)]
    assert apply(scores.alibi(jnp.ones(1)), 2.0, q=5, k=3, T=8, S=8, values=slope) == 1.0
    assert apply(scores.alibi(jnp.ones(1)), 2.0, q=0, k=3, T=1, S=8, values=slope) == 0.0  # aligned at the end
    at = scores.alibi(jnp.ones(1), jnp.array([[9]]), jnp.array([[4]]))
    assert apply(at, 2.0, values=[*slope, jnp.int32(9), jnp.int32(5)]) == 0.0
    assert apply(scores.alibi(jnp.ones(1), bidirectional=True), 2.0, q=1, k=3, T=8, S=8, values=slope) == 1.0


def test_t5_buckets():
    causal = lambda d: np.asarray(scores.t5_buckets(-jnp.asarray(d)))
    np.testing.assert_array_equal(causal(np.arange(16)), np.arange(16))
    assert causal(-3) == 0 and causal(112) == 30 and (causal(np.arange(113, 200)) == 31).all()
    both = lambda r: np.asarray(scores.t5_buckets(jnp.asarray(r), bidirectional=True))
    assert both(1) == 17 and both(-1) == 1 and both(90) == 30 and both(91) == 31 and both(-90) == 14 and both(-91) == 15
    assert (np.diff(causal(np.arange(300))) >= 0).all()


def test_t5_strip_and_positions_agree():
    table, T, S = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32), 5, 9
    strip = scores.t5(table, T, S, max_distance=20).parts[0].operands[0]
    assert strip.index == 'hd' and strip.array.shape == (3, T + S - 1)
    q, k = jnp.arange(T)[None] + S - T, jnp.arange(S)[None]
    dense = scores.t5(table, T, S, max_distance=20, query_positions=q, key_positions=k).parts[0].operands[0].array
    tile = np.asarray(strip.array)[:, np.arange(S)[None] - np.arange(T)[:, None] + T - 1]
    np.testing.assert_allclose(dense, tile, rtol=1e-6)


def test_chains_apply_in_order():
    assert apply(scores.softcap(2.0) >> scores.temperature(4.0), 3.0) == pytest.approx(np.tanh(1.5) / 2)
    assert apply(scores.temperature(4.0) >> scores.softcap(2.0), 3.0) == pytest.approx(2 * np.tanh(0.375))
    assert apply((lambda s, i: s + 1) >> scores.temperature(2.0), 3.0) == 2.0
    assert apply(scores.temperature(2.0) >> (lambda s, i: s + 1), 3.0) == 2.5
    assert abs(apply(scores.softcap(1e6), 3.0) - 3.0) < 1e-5


def test_bias_indexes_no_dimension_of_one():
    for shape, index in (
        ((1, 4, 6, 7), 'hqk'),
        ((2, 1, 1, 7), 'bk'),
        ((6, 1), 'q'),
        ((1, 1, 1, 1), ''),
        ((3, 6, 7), 'hqk'),
    ):
        assert scores.bias(jnp.ones(shape)).parts[0].operands[0].index == index


WRONG = {
    'bias': (lambda: scores.bias(None), 'needs an array'),
    'bias rank': (lambda: scores.bias(jnp.ones(3)), r'float32\(3,\)'),
    'bias of booleans': (lambda: scores.bias(jnp.ones((3, 3), bool)), 'masks.array'),
    'slopes': (lambda: scores.alibi(None), 'needs slopes'),
    'slopes dtype': (lambda: scores.alibi(jnp.arange(3)), 'int32'),
    'heads': (lambda: scores.alibi_slopes(0), 'at least 1'),
    'table': (lambda: scores.t5(jnp.ones(3), 4), r'\[num_buckets, N\]'),
    'buckets': (lambda: scores.t5(jnp.ones((3, 3)), 4), 'multiple of 2'),
    'distance': (lambda: scores.t5(jnp.ones((32, 3)), 4, max_distance=10), 'exceed 16'),
    'positions': (lambda: scores.t5(jnp.ones((32, 3)), 4, query_positions=jnp.ones((1, 4), int)), 'both'),
    'strip': (lambda: scores.relative(jnp.ones((1, 1, 1, 3))), r'\(1, 1, 1, 3\)'),
    'softcap': (lambda: scores.softcap(0.0), 'positive'),
    'temperature': (lambda: scores.temperature(-1.0), 'positive'),
    'temperature rank': (lambda: scores.temperature(jnp.ones((2, 2))), r'\(2, 2\)'),
}


@pytest.mark.parametrize('name', WRONG)
def test_bad_input(name):
    attempt, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        attempt()
