"""Masks against NumPy, their algebra, their block classes; bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnx.ops import masks
from pallas_kernels import blocks, elementwise
from tests.pallas_kernels.test_blocks import classes_of, pairs

B, N = 2, 2


def grid(T, S):
    """Aligned positions q [T, 1] and k [1, S]."""
    return np.arange(T)[:, None] + S - T, np.arange(S)[None]


# name: (mask, the same in NumPy)
STANDARD = {
    'causal': (masks.causal(), lambda q, k: k <= q),
    'window': (masks.window(5), lambda q, k: abs(q - k) < 5),
    'ahead': (masks.window(5, ahead=1), lambda q, k: (k > q - 5) & (k <= q + 1)),
    'sliding': (masks.causal() & masks.window(6), lambda q, k: (k <= q) & (k > q - 6)),
    'dilated': (masks.dilated(3, 4), lambda q, k: np.isin(q - k, [-8, -4, 0, 4, 8])),
    'strided': (masks.strided(5), lambda q, k: (q - k) % 5 == 0),
    'causal strided': (masks.causal() & masks.strided(5), lambda q, k: ((q - k) % 5 == 0) & (k <= q)),
    'block causal': (masks.block_causal(6), lambda q, k: k // 6 <= q // 6),
    'prefix': (masks.prefix_lm(7), lambda q, k: (k <= q) | (k < 7)),
}
# Sound, not always exact: a block may be full by two masks together.
UNIONS = {
    'fixed': (masks.fixed(8, 2), lambda q, k: (k % 8 >= 6) | (k // 8 == q // 8)),
    'global': (masks.global_window(4, 3), lambda q, k: (abs(q - k) < 4) | (q < 3) | (k < 3)),
    'sinks': (
        masks.causal() & masks.global_window(4, 3),
        lambda q, k: (k <= q) & ((q - k < 4) | (k < 3) | (q < 3)),
    ),
    'longformer': (masks.window(3) | masks.strided(3), lambda q, k: (abs(q - k) < 3) | ((q - k) % 3 == 0)),
    'not': (~masks.window(5), lambda q, k: abs(q - k) >= 5),
    'lambda': (masks.causal() & (lambda i: i.k % 2 == 0), lambda q, k: (k <= q) & (k % 2 == 0)),
}


@pytest.mark.parametrize('name', STANDARD | UNIONS)
def test_pairs_and_blocks(name):
    mask, rule = (STANDARD | UNIONS)[name]
    for T, S in ((32, 32), (20, 33), (33, 20)):
        seen = pairs(mask, B, N, T, S)
        np.testing.assert_array_equal(seen, np.broadcast_to(rule(*grid(T, S)), seen.shape))
        for bq, bk in ((8, 8), (4, 16), (7, 5)):
            want, got = classes_of(seen, bq, bk), blocks.classify(mask, B, N, T, S, bq, bk)
            assert isinstance(got, np.ndarray) and got.shape[:2] == (1, 1)
            wrong = (got != want) if name in STANDARD else (got != want) & (got != blocks.PARTIAL)
            assert not wrong.any(), (T, S, bq, bk)


def test_positions_of_a_cache():
    query, key = jnp.array([[9, 10], [4, 5]]), jnp.array([[8, 9, 10, 7], [4, 5, -1, -1]])
    q, k = np.asarray(query)[:, None, :, None], np.asarray(key)[:, None, None]
    cases = (
        (masks.causal(query, key), k <= q),
        (masks.causal(query, key) & masks.window(2, query, key), (k <= q) & (q - k < 2)),
        (masks.block_causal(4, query, key), k // 4 <= q // 4),
        (masks.prefix_lm(jnp.array([9, 0]), query, key), (k <= q) | (k < np.array([9, 0])[:, None, None, None])),
        (masks.causal(query), np.arange(4) <= q),
    )
    for n, (mask, want) in enumerate(cases):
        want = want & (k >= 0) if n < 4 else want
        np.testing.assert_array_equal(pairs(mask, 2, 1, 2, 4), np.broadcast_to(want, (2, 1, 2, 4)))


def test_masks_of_data():
    ids = jnp.array([[1, 1, 2, 2, 0], [3, 3, 3, 0, 0]])
    a = np.asarray(ids)[:, None]
    same = (a[..., :, None] == a[..., None, :]) & (a[..., :, None] > 0)
    np.testing.assert_array_equal(pairs(masks.segments(ids), 2, 1, 5, 5), same)
    other = pairs(masks.segments(ids, ids[:, 1:4]), 2, 1, 5, 3)
    np.testing.assert_array_equal(other, same[..., 1:4])
    valid = np.arange(5) < np.array([[2], [5]])
    for mask in (masks.padding(jnp.asarray(valid)), masks.padding(jnp.array([2, 5]))):
        np.testing.assert_array_equal(pairs(mask, 2, 1, 3, 5), np.broadcast_to(valid[:, None, None], (2, 1, 3, 5)))
    visible = np.random.default_rng(0).random((1, 2, 3, 5)) < 0.5
    np.testing.assert_array_equal(pairs(masks.array(visible), 2, 2, 3, 5), np.broadcast_to(visible, (2, 2, 3, 5)))
    np.testing.assert_array_equal(pairs(masks.array(visible[0, 0]), 1, 1, 3, 5)[0, 0], visible[0, 0])


def test_none_is_all_pairs():
    mask = masks.causal()
    assert mask & None is mask and None & mask is mask


leaf = st.sampled_from(list(STANDARD))
trees = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.tuples(st.just('&'), inner, inner), st.tuples(st.just('|'), inner, inner), st.tuples(st.just('~'), inner)
    ),
    max_leaves=5,
)


def build(tree, which):
    """The tree's mask (which = 0) or its NumPy rule applied to q, k (which = a pair)."""
    if isinstance(tree, str):
        mask, rule = STANDARD[tree]
        return mask if which == 0 else rule(*which)
    parts = [build(x, which) for x in tree[1:]]
    return ~parts[0] if tree[0] == '~' else parts[0] & parts[1] if tree[0] == '&' else parts[0] | parts[1]


@settings(max_examples=40, deadline=None)
@given(trees, st.integers(1, 30), st.integers(1, 30), st.integers(1, 9), st.integers(1, 9))
def test_algebra(tree, T, S, bq, bk):
    mask, want = build(tree, 0), build(tree, grid(T, S))
    seen = pairs(mask, 1, 1, T, S)
    np.testing.assert_array_equal(seen[0, 0], want)
    got, want = blocks.classify(mask, 1, 1, T, S, bq, bk), classes_of(seen, bq, bk)
    assert ((got == want) | (got == blocks.PARTIAL)).all()


def test_equal_masks_are_equal_pytrees():
    make = lambda x: (masks.causal() & masks.window(4)) | ~masks.segments(jnp.full((1, 4), x))
    assert jax.tree.structure(make(1)) == jax.tree.structure(make(2))
    assert hash(jax.tree.structure(make(1))) == hash(jax.tree.structure(make(2)))
    assert jax.tree.structure(masks.window(4)) != jax.tree.structure(masks.window(5))


ids = jnp.ones((2, 4), jnp.int32)
WRONG = {
    'segments without ids': (lambda: masks.segments(None), 'needs query_ids'),
    'segments rank': (lambda: masks.segments(ids[0]), r'int \[B, T\], given int32\(4,\)'),
    'segments dtype': (lambda: masks.segments(ids * 1.0), 'float32'),
    'padding': (lambda: masks.padding(None), 'needs valid'),
    'padding dtype': (lambda: masks.padding(ids), r'bool \[B, S\] or lengths'),
    'array': (lambda: masks.array(None), 'needs a bool array'),
    'array of biases': (lambda: masks.array(jnp.ones((4, 4))), 'scores.bias'),
    'window': (lambda: masks.window(0), 'at least 1, given 0'),
    'window size': (lambda: masks.window(2.5), 'given 2.5'),
    'traced size': (lambda: jax.eval_shape(lambda n: masks.window(n) and None, 3), 'a Python int'),
    'not called': (lambda: elementwise.check(masks.as_mask(masks.causal), 1, 1, 4, 4), r'call it, masks.causal\('),
    'or all pairs': (lambda: masks.causal() | None, 'leave it out'),
    'stride': (lambda: masks.strided(-1), 'stride'),
    'summary': (lambda: masks.fixed(4, 5), 'at most block=4'),
    'positions': (lambda: masks.causal(jnp.arange(4)), r'causal: query_positions must be int \[B, T\]'),
    'prefix': (lambda: masks.prefix_lm(jnp.ones((2, 2), int)), r'count must be int \[B\]'),
    'algebra': (lambda: masks.causal() & ids, 'masks.array'),
    'length': (
        lambda: elementwise.check(masks.segments(ids), 2, 1, 5, 4),
        r"'bq' has shape \(2, 4\), expected \(2, 5\)",
    ),
    'batch': (lambda: elementwise.check(masks.segments(ids), 3, 1, 4, 4), r'expected \(3, 4\)'),
}


@pytest.mark.parametrize('name', WRONG)
def test_bad_input(name):
    attempt, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        attempt()
