"""Attention with any logits and any weights: what is not the softmax of scaled products. See `weighted_attention`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnx import dispatch
from pallas_kernels import dropout as drop
from pallas_kernels import elementwise
from pallas_kernels.elementwise import Index, as_mask, as_score

__all__ = [
    'by_rows', 'check', 'evaluate', 'index_of', 'num_rows', 'products', 'read', 'reference', 'thinned', 'weighted_attention',
    'xla',
]  # fmt: skip


def weighted_attention(
    query,
    key,
    value,
    *,
    weights,
    logits=None,
    mask=None,
    score=None,
    scale=None,
    dropout=None,
    pair_width: int = 1,
    impl='auto',
):
    """out[t] = sum_s W[t, s] v[s], W = weights(X[t], mask[t]), X = score(scale q[t] . k[s]) or score(logits(q[t], k[s])).

    Args:
      query: [B, T, N, H]; or, with `logits`, a pytree of arrays [B, T, …].
      key: [B, S, K, H], K divides N; or, with `logits`, a pytree of anything.
      value: [B, S, K, Hv], K divides N.
      weights: a normalizer `(s, seen, i) -> weights`, see `attnx.ops.normalizers`.
      logits: `(query rows, key, i) -> [B, N, t, S]` in place of scaled products; i is the Index of those rows and all
        keys. It may read arrays that need gradients.
      mask, score, dropout: as in `softmax_attention`.
      scale: multiplies the products, a number; H ** -0.5 by default.
      pair_width: numbers that `logits` holds for each pair, to choose how many rows are taken at once.
      impl: 'reference': all rows at once. 'xla': some rows at a time, recomputed in the backward pass. Both have every
        derivative.

    Returns:
      [B, T, N, Hv] in value's dtype. A row that sees nothing is 0. What is not finite is not contained as it is in
      `softmax_attention`: a value of NaN reaches every row.

    Memory: O(T + S), and a few rows of pairs at a time, forward and backward. Time: all pairs, masked ones too.

    Raises:
      ValueError: shapes that do not fit.
    """
    if logits is None:
        check('weighted_attention', query, key, value)
    drop.check(dropout)
    options = {'weights': weights, 'logits': logits, 'mask': as_mask(mask), 'score': as_score(score), 'scale': scale}
    options |= {'dropout': dropout, 'pair_width': pair_width}
    return dispatch.run('weighted_attention', impl, {'reference': reference, 'xla': xla}, (query, key, value), options)


def check(op: str, query, key, value) -> None:
    """Raises ValueError unless query is [B, T, N, H], key [B, S, K, H], value [B, S, K, Hv] and K divides N."""
    q, k, v = jnp.shape(query), jnp.shape(key), jnp.shape(value)
    if not (len(q) == len(k) == len(v) == 4 and q[0] == k[0] == v[0] and k[1:3] == v[1:3]):
        raise ValueError(
            f'{op}: expected query [B, T, N, H], key [B, S, K, H], value [B, S, K, Hv], given {q}, {k}, {v}'
        )
    if 0 in (*q, *k, *v):
        raise ValueError(f'{op}: a dimension is 0; given query {q}, key {k}, value {v}')
    if q[3] != k[3] or q[2] % k[2]:
        raise ValueError(f'{op}: query {q} and key {k} differ in width, or heads do not divide')


def reference(query, key, value, **options):
    """All rows at once, as `weighted_attention`."""
    return xla(query, key, value, **{**options, 'rows': jax.tree.leaves(query)[0].shape[1]})


def xla(
    query,
    key,
    value,
    *,
    weights,
    logits=None,
    mask=None,
    score=None,
    scale=None,
    dropout=None,
    pair_width: int = 1,
    rows: int | None = None,
):
    """Some rows at a time, recomputed in the backward pass, as `weighted_attention`. rows: how many; chosen by default."""
    batch, length = jax.tree.leaves(query)[0].shape[:2]
    size = value.shape[1]
    num_heads = query.shape[2] if logits is None else 1
    if logits is not None:
        one = jax.tree.map(lambda x: x[:, :1], query)
        num_heads = jax.eval_shape(lambda q, k: logits(q, k, index_of(batch, 1, length, size)), one, key).shape[1]
    elementwise.check(mask, batch, num_heads, length, size, 'mask')
    elementwise.check(score, batch, num_heads, length, size, 'score')
    rows = rows or num_rows(batch * num_heads * size * pair_width, length)

    def step(carry, first, query):
        count = jax.tree.leaves(query)[0].shape[1]
        i = index_of(batch, count, length, size, num_heads, first)
        s = products(query, key, scale) if logits is None else logits(query, key, i)
        seen = evaluate(mask, i)
        s = evaluate(score, i, jnp.where(seen, s, 0))
        return carry, read(thinned(weights(jnp.where(seen, s, 0), seen, i), i, dropout), value)

    return by_rows(step, (), query, rows)[1]


def products(query, key, scale=None):
    """scale q . k: [B, t, N, H] and [B, S, K, H] -> [B, N, t, S], float32 at least."""
    (batch, count, n, width), (_, size, k, _) = query.shape, key.shape
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    query = query.reshape(batch, count, k, n // k, width)
    s = jnp.einsum('btkgh,bskh->bkgts', query, key, preferred_element_type=dtype)
    return s.reshape(batch, n, count, size) * (width**-0.5 if scale is None else scale)


def read(weights, value):
    """weights [B, N, t, S] and value [B, S, K, Hv] -> [B, t, N, Hv]; the sum is float32 at least."""
    (batch, n, count, size), k = weights.shape, value.shape[2]
    weights = weights.astype(value.dtype).reshape(batch, k, n // k, count, size)
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    out = jnp.einsum('bkgts,bskh->btkgh', weights, value, preferred_element_type=dtype)
    return out.reshape(batch, count, n, -1).astype(value.dtype)


def thinned(weights, i: Index, dropout=None):
    """The weights of the indices i under a `Dropout`, or as they are for None."""
    if dropout is None or not dropout.threshold:
        return weights
    return jnp.where(drop.keep(dropout.seed, *i[:4], dropout.rate), weights * dropout.inverse_keep, 0)


def num_rows(row: int, length: int, limit: int = 2**22) -> int:
    """How many rows of `row` numbers to take at once: about `limit` numbers in all, 256 rows at most."""
    return max(1, min(length, 256, limit // max(row, 1)))


def by_rows(step, carry, query, rows: int) -> Any:
    """Scans `step(carry, first row, some rows of query) -> (carry, out)`; recomputes each step in the backward pass.

    Args:
      query: a pytree of [B, T, …]; the last rows are padded with 0.
      rows: how many to give at once.

    Returns:
      (carry, out): leaves of out are [B, T, …].
    """
    length = jax.tree.leaves(query)[0].shape[1]
    if rows >= length:
        return step(carry, 0, query)
    count = -(-length // rows)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, count * rows - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], count, rows, *x.shape[2:]), 1, 0)

    def join(y):
        y = jnp.moveaxis(y, 0, 1)
        return y.reshape(y.shape[0], count * rows, *y.shape[3:])[:, :length]

    body = jax.checkpoint(lambda carry, x: step(carry, *x), prevent_cse=False)
    carry, out = lax.scan(body, carry, (jnp.arange(count) * rows, jax.tree.map(cut, query)))
    return carry, jax.tree.map(join, out)


def index_of(batch, count, length, size, num_heads=1, first=0) -> Index:
    """The indices of queries first … first + count - 1 of `length` and of `size` keys, in broadcastable shapes."""
    number = lambda n, axis: lax.broadcasted_iota(jnp.int32, tuple(n if a == axis else 1 for a in range(4)), axis)
    return Index(number(batch, 0), number(num_heads, 1), number(count, 2) + first, number(size, 3), length, size)


def evaluate(value, i: Index, s=None):
    """A mask at the indices i, all True for None, or a score of the logits s there, s itself for None."""
    if value is None:
        return jnp.ones((1, 1, 1, 1), bool) if s is None else s
    operands, call = elementwise.flatten(value)
    q = jnp.minimum(i.q, i.q_len - 1)  # rows of padding
    at = {'b': i.b, 'h': i.h, 'q': q, 'k': i.k, 'd': i.k - q + (i.q_len - 1)}
    pick = lambda o: tuple(0 if c in 'bh' and n == 1 else at[c] for c, n in zip(o.index, o.array.shape))
    values = [jnp.asarray(o.array)[pick(o)] if o.index else jnp.asarray(o.array) for o in operands]
    return call(i, values) if s is None else call(s, i, values)
