"""Block classes by interval arithmetic, against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from pallas_kernels import blocks
from pallas_kernels.elementwise import Index, Mask, Operand, Score, Term, as_mask, as_score, flatten


def pairs(mask, B, N, T, S):
    """The mask as an array [B, N, T, S]."""
    operands, call = flatten(mask)
    b, h, q, k = np.meshgrid(*(np.arange(n, dtype=np.int32) for n in (B, N, T, S)), indexing='ij')
    at = {'b': b, 'h': h, 'q': q, 'k': k, 'd': k - q + T - 1}
    pick = lambda o: tuple(np.minimum(at[c], n - 1) if c in 'bh' else at[c] for c, n in zip(o.index, o.array.shape))
    values = [np.asarray(o.array)[pick(o)] for o in operands]
    with np.errstate(all='ignore'):
        return np.broadcast_to(np.asarray(call(Index(b, h, q, k, T, S), values)), (B, N, T, S))


def classes_of(seen, bq, bk):
    """Brute force: [B, N, T, S] booleans to [B, N, nq, nk] classes; blocks that stick out are at most partial."""
    (*lead, T, S), out = seen.shape, None
    out = np.zeros((*lead, -(-T // bq), -(-S // bk)), np.int8)
    for i, j in np.ndindex(*out.shape[-2:]):
        part = seen[..., i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
        full = part.all((-1, -2)) & ((i + 1) * bq <= T) & ((j + 1) * bk <= S)
        out[..., i, j] = np.where(full, blocks.FULL, np.where(part.any((-1, -2)), blocks.PARTIAL, blocks.EMPTY))
    return out


def assert_sound(mask, B, N, T, S, bq, bk, exact=False):
    run = lambda mask: blocks.classify(mask, B, N, T, S, bq, bk)
    got = np.asarray(jax.jit(run)(mask) if mask.operands else run(mask))
    want = classes_of(pairs(mask, B, N, T, S), bq, bk)
    got = np.broadcast_to(got, want.shape)
    wrong = (got != want) & (True if exact else got != blocks.PARTIAL)
    assert not wrong.any(), np.argwhere(wrong)[:5]


f32 = jnp.float32
FUNCTIONS = {
    'heads': lambda i: (i.h == 1) | (i.k <= i.q),
    'batches': lambda i: i.k < 5 * (i.b + 1),
    'floor division': lambda i: i.q // 8 == i.k // 8,
    'remainder': lambda i: (i.q - i.k) % 7 < 2,
    'hash that wraps': lambda i: (i.q * 7919123 + i.k * 104729) % 3 == 0,
    'unsigned hash': lambda i: (i.q.astype(jnp.uint32) * np.uint32(2654435761) - i.k.astype(jnp.uint32)) >> 31 == 0,
    'decay': lambda i: jnp.exp(-0.1 * abs(i.q - i.k).astype(f32)) > 0.5,
    'gaussian': lambda i: jnp.square(i.q.astype(f32) - i.k) / 9.0 < 2.0,
    'parabola': lambda i: (i.q - i.k) ** 2 + i.k**3 < 90,
    'division by zero': lambda i: 1.0 / (i.q - i.k).astype(f32) > 0.2,
    'log of a negative': lambda i: jnp.log((i.q - i.k).astype(f32)) < 1.5,
    'square root': lambda i: jnp.sqrt(i.k.astype(f32)) <= i.q / 4,
    'where': lambda i: jnp.where(i.q > 12, i.k <= i.q, i.k >= i.q),
    'integer choice': lambda i: lax.select_n((i.q > 5).astype(jnp.int32) + (i.q > 20), i.k, i.k + 9, i.k * 2) < 20,
    'cond': lambda i: (
        lax.cond(i.h == 0, lambda: i.k <= i.q, lambda: i.k >= i.q)
        if jnp.ndim(i.h) == 0
        else jnp.where(i.h == 0, i.k <= i.q, i.k >= i.q)
    ),
    'exclusive or': lambda i: (i.k <= i.q) ^ (i.k < 9),
    'as integers': lambda i: (i.k <= i.q) + (i.k >= 4).astype(jnp.int32) == 2,
    'bits': lambda i: (i.k & 7) < 3,
    'clip': lambda i: jnp.clip(i.q - i.k, -2, 6) == 6,
    'sign': lambda i: jnp.sign(i.q - i.k) >= 0,
    'rounding': lambda i: jnp.floor(i.q / 3) >= jnp.ceil(i.k / 5),
    'to integer': lambda i: (i.q * 1.5).astype(jnp.int32) > i.k,
    'sigmoid': lambda i: jax.nn.sigmoid((i.q - i.k).astype(f32)) > 0.9,
    'relu': lambda i: jax.nn.relu((i.q - i.k).astype(f32)) > 2,
    'without a rule': lambda i: lax.population_count(i.k) == 2,
    'loop': lambda i: lax.fori_loop(0, 3, lambda n, x: x * 2, i.k) < 40,
    'not a number': lambda i: (i.q * jnp.nan) != (i.k * jnp.nan),
    'infinities that meet': lambda i: (
        jnp.where(i.q > 9, jnp.inf, -jnp.inf) - jnp.where(i.k > 9, jnp.inf, -jnp.inf) >= -jnp.inf
    ),
    'zero times infinity': lambda i: (i.q - 9).astype(f32) * jnp.where(i.k > 9, jnp.inf, 1.0) >= -jnp.inf,
    'infinite': lambda i: jnp.where(i.q > 9, jnp.inf, -jnp.inf) - jnp.where(i.k > 9, jnp.inf, 0.0) > 0,
    'constant': lambda i: i.q == i.q,
}


@pytest.mark.parametrize('name', FUNCTIONS)
def test_user_functions_are_sound(name):
    for sizes in ((32, 32, 8, 8), (20, 33, 4, 16), (33, 20, 7, 5)):
        assert_sound(as_mask(FUNCTIONS[name]), 2, 2, *sizes)


@settings(max_examples=15, deadline=None)
@given(
    index=st.sampled_from(['bq', 'bk', 'h', 'hqk', 'bhqk', 'hd', 'd', 'b', '', 'kq', 'bhd']),
    T=st.integers(1, 20),
    S=st.integers(1, 20),
    bq=st.integers(1, 8),
    bk=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_operands_are_bounded(index, T, S, bq, bk, seed):
    sizes = {'b': 2, 'h': 2, 'q': T, 'k': S, 'd': T + S - 1}
    steps = np.random.default_rng(seed).integers(-1, 3, [sizes[c] for c in index])
    x = np.asarray(np.cumsum(steps, -1) if steps.ndim else steps, np.int32)
    mask = Mask(lambda i, x: x < i.k, (Operand(jnp.asarray(x), index),))
    assert_sound(mask, 2, 2, T, S, bq, bk)
    exact = 'd' not in index or (T % bq == 0 and S % bk == 0)  # an edge block's strip holds more than its pairs
    assert_sound(Mask(lambda i, x: x, (Operand(jnp.asarray(x > 3), index),)), 2, 2, T, S, bq, bk, exact)


def test_nan_operands_are_partial():
    x = np.ones((1, 8), np.float32)
    x[0, 5] = np.nan
    mask = Mask(lambda i, x: x > 0, (Operand(jnp.asarray(x), 'bq'),))
    np.testing.assert_array_equal(blocks.classify(mask, 1, 1, 8, 4, 4, 4)[0, 0], [[blocks.FULL], [blocks.PARTIAL]])
    assert_sound(mask, 1, 1, 8, 4, 4, 4)


def test_data_dependent_classes_under_jit_and_vmap():
    ids = np.sort(np.random.default_rng(0).integers(1, 5, (3, 1, 64)), -1).astype(np.int32)
    mask = lambda x: Mask(lambda i, q, k: q == k, (Operand(x, 'bq'), Operand(x, 'bk')))
    got = jax.jit(jax.vmap(lambda x: blocks.classify(mask(x), 1, 1, 64, 64, 8, 8)))(jnp.asarray(ids))
    for n in range(3):
        want = classes_of(pairs(mask(ids[n]), 1, 1, 64, 64), 8, 8)
        np.testing.assert_array_equal(got[n], want)
    assert (np.asarray(got) == blocks.EMPTY).mean() > 0.4


def test_closed_over_tracers():
    classify = jax.jit(lambda n: blocks.classify(as_mask(lambda i: i.k < n), 1, 1, 8, 8, 4, 4))
    np.testing.assert_array_equal(classify(4)[0, 0], [[2, 0], [2, 0]])


def test_no_mask():
    np.testing.assert_array_equal(blocks.classify(None, 1, 1, 8, 9, 4, 4)[0, 0], [[2, 2, 1]] * 2)


@pytest.mark.parametrize('module', [np.asarray, jnp.asarray])
def test_union_and_lists(module):
    classes = module(np.array([[[[0, 2, 1], [0, 0, 0]]], [[[0, 2, 2], [0, 1, 0]]]], np.int8))
    union = blocks.union(classes)
    np.testing.assert_array_equal(union, [[0, 2, 1], [0, 1, 0]])
    rows = blocks.lists(union)
    np.testing.assert_array_equal(rows.count, [2, 1])
    np.testing.assert_array_equal(rows.block[0, :2], [1, 2])
    np.testing.assert_array_equal(rows.partial[0, :2], [False, True])
    np.testing.assert_array_equal(rows.block[1, :1], [1])
    columns = blocks.lists(union.swapaxes(-1, -2))
    np.testing.assert_array_equal(columns.count, [0, 2, 1])
    np.testing.assert_array_equal(columns.block[1], [0, 1])
    assert sorted(rows.block[1].tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    'f, lo, hi',
    [
        (lambda s, i: 5 * jnp.tanh(s / 5), -5, 5),
        (lambda s, i: 3 + 2 * jax.nn.sigmoid(s), 3, 5),
        (lambda s, i: jnp.clip(s - jnp.abs(i.q - i.k), -7.0, 2.0), -7, 2),
        (lambda s, i: 2 * s, -np.inf, np.inf),
        (lambda s, i: jnp.where(i.q > i.k, 0.0, s), -np.inf, np.inf),
        (lambda s, i: jnp.sqrt(s), -np.inf, np.inf),
    ],
)
def test_extent_of_scores(f, lo, hi):
    found = blocks.extent(as_score(f), 64, 64)
    assert found[0] <= lo and found[1] >= hi
    np.testing.assert_allclose(found, (lo, hi), rtol=1e-5)


def test_extent_with_operands_is_unknown():
    slope = Operand(jnp.ones(2), 'h')
    assert blocks.extent(Score((Term(lambda s, i, a: jnp.tanh(s) * a, (slope,)),)), 64, 64) == (-np.inf, np.inf)
