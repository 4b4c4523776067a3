"""Attention in which tokens hide keys from later tokens. See `selective_attention`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnx import dispatch
from attnx.ops import normalizers
from attnx.ops.weighted_attention import by_rows, check, evaluate, index_of, num_rows, products, read, thinned
from pallas_kernels import dropout as drop
from pallas_kernels.elementwise import Mask, Operand, as_mask, as_score


class Selected(NamedTuple):
    out: jax.Array  # [B, T, N, Hv]
    hidden: jax.Array  # F after the last query, float32 [B, S]
    kept: jax.Array  # the largest over queries of sum_s (1 - min(F, 1)) of the keys they see, float32 [B]


def selective_attention(
    query,
    key,
    value,
    *,
    slots=None,
    protected=None,
    hidden=None,
    mask=None,
    score=None,
    scale=None,
    weights=normalizers.softmax,
    dropout=None,
    impl='auto',
):
    """Softmax attention after subtracting what earlier queries wanted hidden (arXiv:2410.02703).

        F[t, s] = hidden[s] + sum over queries r before t of relu(X_0[r, s])        X_0: the logits of head 0
        out[t] = sum_s softmax_s(X[t, s] - F[t, s]) v[s], in every head, head 0 too

    A query hides neither itself, nor a protected key, nor what it does not see.

    Args:
      query [B, T, N, H], key [B, S, K, H], value [B, S, K, Hv]: K divides N; queries in order of time.
      slots: (int [B|1, T], int [B|1, S]): equal numbers are one token; None: query t is key t.
      protected: bool [B|1, S], keys that are never hidden; None: none.
      hidden: float [B, S], F before the first query; None: 0.
      mask, score, scale, dropout: as in `softmax_attention`; the score comes before F.
      weights: a normalizer of `attnx.ops.normalizers`.
      impl: 'reference': all rows at once. 'xla': some rows at a time, recomputed in the backward pass.

    Returns:
      `Selected`. Memory O(T S / rows) for F between blocks of rows, 256 rows where they fit; all pairs are computed.

    Raises:
      ValueError: shapes that do not fit.
    """
    check('selective_attention', query, key, value)
    drop.check(dropout)
    forms = {'reference': reference, 'xla': xla}
    options = {'slots': slots, 'protected': protected, 'hidden': hidden, 'mask': as_mask(mask), 'score': as_score(score)}
    options |= {'scale': scale, 'weights': weights, 'dropout': dropout}
    return dispatch.run('selective_attention', impl, forms, (query, key, value), options)


def reference(query, key, value, **options) -> Selected:
    """All rows at once."""
    return xla(query, key, value, **{**options, 'rows': query.shape[1]})


def xla(
    query,
    key,
    value,
    *,
    slots=None,
    protected=None,
    hidden=None,
    mask=None,
    score=None,
    scale=None,
    weights=normalizers.softmax,
    dropout=None,
    rows: int | None = None,
) -> Selected:
    """Some rows at a time."""
    (batch, length, num_heads, _), size = query.shape, key.shape[1]
    same = (jnp.arange(length)[None], jnp.arange(size)[None]) if slots is None else slots
    free = jnp.ones((1, size), bool) if protected is None else ~protected
    may_hide = Mask(_may_hide, (Operand(same[0], 'bq'), Operand(same[1], 'bk'), Operand(free, 'bk')))
    may_hide = may_hide if mask is None else may_hide & mask
    rows = rows or num_rows(batch * num_heads * size, length)

    def step(carry, first, query):
        hidden, kept = carry
        i = index_of(batch, query.shape[1], length, size, num_heads, first)
        s = products(query, key, scale)
        seen = evaluate(mask, i)
        s = evaluate(score, i, jnp.where(seen, s, 0))
        new = jax.nn.relu(jnp.where(evaluate(may_hide, i) & (i.q < length), s[:, :1], 0))[:, 0]  # [B, t, S]
        total = hidden[:, None] + jnp.cumsum(new, axis=1)
        before = jnp.concatenate([hidden[:, None], total[:, :-1]], axis=1)[:, None]
        w = thinned(weights(jnp.where(seen, s - before, 0), seen, i), i, dropout)
        left = jnp.where(seen & (i.q < length), 1 - jnp.minimum(before, 1), 0).sum(-1)[:, 0]
        return (total[:, -1], jnp.maximum(kept, left.max(-1))), read(w, value)

    start = jnp.zeros((batch, size), jnp.float32) if hidden is None else hidden.astype(jnp.float32)
    (hidden, kept), out = by_rows(step, (start, jnp.zeros((batch,), jnp.float32)), query, rows)
    return Selected(out, hidden, kept)


def _may_hide(i, query, key, free):
    return (query != key) & free
