"""Attention with any weights: rows at a time against all at once, and each normalizer against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.ops import masks, normalizers, scores, softmax_attention, weighted_attention
from attnx.ops.softmax_attention import Dropout
from attnx.ops.weighted_attention import by_rows, reference, xla
from tests import tolerances
from tests.laws import close

B, T, S, N, K, H = 2, 21, 21, 4, 2, 8
ROWS = functools.partial(xla, rows=8)
NORMALIZERS = {
    'softmax': normalizers.softmax,
    'off_by_one': normalizers.off_by_one,
    'sinks': normalizers.sinks(jnp.array([-1.0, 0.0, 0.5, 30.0])),
    'signed': normalizers.signed,
    'relu': normalizers.relu(0.5),
    'sigmoid': normalizers.sigmoid(),
    'softplus': normalizers.softplus(),
    'reweighted': normalizers.softplus(3),
    'top_k': normalizers.top_k(4),
}


@pytest.fixture(scope='module')
def arrays():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return draw(B, T, N, H), draw(B, S, K, H), draw(B, S, K, H), draw(B, T, N, H)


def _ids():
    ids = np.ones((B, T), np.int32)
    ids[0, 8:], ids[1, 15:] = 2, 0
    return jnp.asarray(ids)


@pytest.mark.quick('top_k', 'sinks')
@pytest.mark.parametrize('name', NORMALIZERS)
def test_rows_equal_all_at_once(arrays, name):
    """Outputs and gradients, a mask, scores with gradients, dropout, rows that see nothing, a last block of padding."""
    *qkv, cotangent = arrays
    mask, strip = masks.causal() & masks.segments(_ids()), jnp.linspace(-1, 1, T + S - 1)

    def loss(arrays, strip, form):
        options = {'score': scores.relative(strip), 'dropout': Dropout(0.2, 3)}
        out = form(*arrays, weights=NORMALIZERS[name], mask=mask, **options)
        return jnp.sum(out * cotangent), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    (grads, out), (expected_grads, expected) = run(qkv, strip, ROWS), run(qkv, strip, reference)
    close(out, expected, tolerances.FLOAT32)
    assert not np.asarray(out)[1, 15:].any()
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads)):
        close(a, b, tolerances.FLOAT32_GRAD)


def test_softmax_is_the_fused_op(arrays):
    *qkv, _ = arrays
    options = {'mask': masks.causal() & masks.segments(_ids()), 'score': scores.softcap(2.0), 'scale': 0.7}
    run = functools.partial(weighted_attention, *qkv, **options)
    close(run(weights=normalizers.softmax), softmax_attention(*qkv, **options), tolerances.FLOAT32)
    expected = softmax_attention(*qkv, sinks=jnp.zeros(N), **options)
    close(run(weights=normalizers.off_by_one), expected, tolerances.FLOAT32)
    logits = jnp.linspace(-2, 3, N)
    close(run(weights=normalizers.sinks(logits)), softmax_attention(*qkv, sinks=logits, **options), tolerances.FLOAT32)


def _rows(name, s, seen=None):
    s = jnp.asarray(s, jnp.float32)
    seen = jnp.ones(s.shape, bool) if seen is None else jnp.asarray(seen)
    return np.asarray(NORMALIZERS[name](s, seen))


def test_definitions():
    s = 3 * np.random.default_rng(1).standard_normal((1, 1, 5, 9))
    soft = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    total = np.exp(s).sum(-1, keepdims=True)
    close(_rows('off_by_one', s), soft * total / (1 + total), tolerances.FLOAT32)
    magnitude = np.exp(np.abs(s))
    close(_rows('signed', s), np.sign(s) * magnitude / magnitude.sum(-1, keepdims=True), tolerances.FLOAT32)
    close(_rows('relu', s), np.maximum(s, 0) / 3, tolerances.FLOAT32)
    close(_rows('sigmoid', s), 1 / (1 + 9 * np.exp(-s)), tolerances.FLOAT32)
    a = np.log1p(np.exp(s * np.log(9)))
    a /= a.sum(-1, keepdims=True)
    close(_rows('softplus', s), a, tolerances.FLOAT32)
    over = np.maximum(9 * a - 1, 0) ** 3
    close(_rows('reweighted', s), over / over.sum(-1, keepdims=True), tolerances.FLOAT32)
    best = np.where(s >= np.sort(s)[..., -4:-3], np.exp(s), 0)
    close(_rows('top_k', s), best / best.sum(-1, keepdims=True), tolerances.FLOAT32)


@pytest.mark.parametrize('name', NORMALIZERS)
def test_extremes_are_finite(name):
    """Huge and equal logits, hidden pairs, empty rows: finite weights and gradients; nothing where nothing is seen."""
    s = jnp.array([[1e4, -1e4, 0.0, 3e4], [0, 0, 0, 0], [-1e4, -1e4, -1e4, -1e4], [1, 2, 3, 4]], jnp.float32)[None, None]
    seen = jnp.array([[1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], bool)[None, None]
    w, pull = jax.vjp(lambda s: NORMALIZERS[name](jnp.where(seen, s, 0), seen), s)
    (ds,) = pull(jnp.ones_like(w))
    assert np.isfinite(w).all() and np.isfinite(ds).all()
    assert not np.asarray(w)[~np.asarray(jnp.broadcast_to(seen, w.shape))].any()


def test_large_powers_pick_the_largest():
    s = np.random.default_rng(2).standard_normal((1, 1, 1, 64))
    w = np.asarray(normalizers.softplus(200)(jnp.asarray(s, jnp.float32), jnp.ones(s.shape, bool)))
    assert w.argmax() == s.argmax() and w.max() > 0.99


def test_no_array_of_all_pairs():
    """Temporary memory of the gradient grows with T, not T²."""

    def temporary(length):
        q = jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)
        loss = lambda q, k, v: weighted_attention(q, k, v, weights=normalizers.signed, mask=masks.causal()).sum()
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16384) < 6 * temporary(4096)
    assert temporary(16384) < 4 * 16384**2


def test_carry_goes_from_row_to_row():
    x = jnp.arange(10.0).reshape(1, 10, 1)
    step = lambda carry, first, rows: (carry + rows.sum(1), jnp.cumsum(rows, axis=1) + carry[:, None])
    total, out = by_rows(step, jnp.zeros((1, 1)), x, 4)
    np.testing.assert_allclose(out, jnp.cumsum(x, axis=1))
    assert float(total[0, 0]) == 45


def test_logits_in_place_of_products(arrays):
    """Scores of pairs by a network whose weights get gradients, some rows at a time."""
    q, k, v, cotangent = arrays

    def loss(weight, form):
        def logits(query, key, i):
            pairs = jnp.tanh(jnp.moveaxis(query, 1, 2)[:, :, :, None] + jnp.moveaxis(jnp.repeat(key, 2, 2), 1, 2)[:, :, None])
            return pairs @ weight - 0.1 * abs(i.q - i.k)

        options = {'weights': normalizers.softmax, 'logits': logits, 'mask': masks.causal()}
        return jnp.sum(form(q, k, v, **options) * cotangent)

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    weight = jnp.linspace(-1, 1, H)
    for a, b in zip(run(weight, ROWS), run(weight, reference)):
        close(a, b, tolerances.FLOAT32_GRAD)


def test_refuses(arrays):
    q, k, v, _ = arrays
    with pytest.raises(ValueError, match='differ in width'):
        weighted_attention(q, k[..., :4], v[..., :4], weights=normalizers.softmax)
    with pytest.raises(ValueError, match='expected query'):
        weighted_attention(q, k, v[:, :3], weights=normalizers.softmax)
    with pytest.raises(ValueError, match="unknown impl 'fused'"):
        weighted_attention(q, k, v, weights=normalizers.softmax, impl='fused')
