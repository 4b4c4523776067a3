"""Softmax attention with composable masks and scores: the quadratic oracle and a blockwise form with its own backward.

For query t and key s of one head, with X the logits, P the weights:

    X[t, s] = score(scale · q[t] · k[s])      where mask[t, s], else -inf
    lse[t]  = log(Σ_s exp X[t, s] + exp sink)      P = exp(X - lse)      out[t] = Σ_s dropout(P)[t, s] v[s]

The blockwise form is in `attnx.ops.blockwise`.

Rows that see nothing have output 0, lse -inf and gradient 0, with a sink too. NaN and Inf: a slot of key or value that
is not finite turns every row that may see it into NaN (output and lse), and touches no other row, forward or backward;
a query likewise turns its own row. In the blockwise form a row whose output and lse have no cotangent contributes
nothing to any gradient, be it NaN.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnx import dispatch, sharding
from attnx.ops import parallel, scores
from attnx.ops.blockwise import accumulator, attend, clean, hidden, largest, returned
from pallas_kernels import dropout as drop
from pallas_kernels import elementwise, statistics
from pallas_kernels.dropout import Dropout
from pallas_kernels.elementwise import Index, as_mask, as_score
from pallas_kernels.statistics import Statistics

__all__ = ['Dropout', 'Statistics', 'reference', 'softmax_attention', 'xla']


def softmax_attention(
    query,
    key,
    value,
    *,
    mask=None,
    score=None,
    bias=None,
    scale=None,
    sinks=None,
    dropout=None,
    impl='auto',
    return_lse=False,
    return_stats=False,
) -> Any:
    """Softmax attention (arXiv:1706.03762) with grouped heads (arXiv:2305.13245): head n reads key head n // (N / K).

    Args:
      query: [B, T, N, H], of a floating dtype of 16 bits or more; logits, softmax and sums are float32 at least.
      key: [B, S, K, H], K divides N.
      value: [B, S, K, Hv].
      mask: what `attnx.ops.masks` builds, or a function of an Index; None: all pairs.
      score: what `attnx.ops.scores` builds, or a function of a logit and an Index; applied to the scaled logits. Its
        floating operands get gradients.
      bias: float [B|1, N|1, T|1, S|1], short for a leading `scores.bias(bias)`.
      scale: multiplies the logits, a number; H ** -0.5 by default. A learned one: `scores.temperature`.
      sinks: float [N], a logit per head that takes part in the denominator and has no value (as in gpt-oss).
      dropout: `Dropout(rate, seed)`, on the weights after the softmax, or None.
      impl: 'reference': quadratic, plain autodiff, every derivative. 'xla': blockwise, first-order derivatives in
        forward and reverse mode. A kernel's name. 'auto': a kernel where one takes the call, else 'xla'.
      return_lse: also returns the log-sum-exp of each row's visible logits and sink.
      return_stats: also returns `Statistics` per head: largest logit, entropy, sink mass; or those of these names alone, as in
        ('max_logit',). The entropy takes a kernel an operation a logit, the others nothing.

    Returns:
      [B, T, N, Hv] in value's dtype; with `return_lse` or `return_stats` a tuple of it, lse float32 [B, N, T] (float64 for
      float64) and the statistics, as asked.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
      TypeError: second derivatives of a form that lacks them; 'reference' has them.
    """
    options = _checked(query, key, value, mask, score, bias, scale, sinks, dropout)
    forms = {'reference': _reference, 'xla': attend}
    asked = statistics.asked(return_stats)
    watched = dispatch.figures() if sharding.active() is None else ()  # for `attnx.train.health`, from the same pass
    stats = statistics.asked((*asked, *watched))
    kwargs = {**options, 'return_lse': return_lse or bool(watched), 'return_stats': stats}
    found = parallel.run('softmax_attention', impl, forms, (query, key, value), kwargs)
    if watched:
        kept = [x for x, wanted in zip(found, (True, return_lse, asked)) if wanted]
        found = tuple(kept) if len(kept) > 1 else kept[0]
    return found


def reference(
    query,
    key,
    value,
    *,
    mask=None,
    score=None,
    bias=None,
    scale=None,
    sinks=None,
    dropout=None,
    return_lse=False,
    return_stats=False,
):
    """The quadratic form, as `softmax_attention`: any dtype, and every derivative by plain autodiff."""
    options = _checked(query, key, value, mask, score, bias, scale, sinks, dropout)
    return _reference(query, key, value, **options, return_lse=return_lse, return_stats=return_stats)


def xla(
    query,
    key,
    value,
    *,
    mask=None,
    score=None,
    bias=None,
    scale=None,
    sinks=None,
    dropout=None,
    return_lse=False,
    return_stats=False,
    block_sizes=None,
):
    """The blockwise form, as `softmax_attention`. block_sizes: (bq, bk), chosen by shape by default."""
    options = _checked(query, key, value, mask, score, bias, scale, sinks, dropout)
    wanted = {'return_lse': return_lse, 'return_stats': return_stats}
    return attend(query, key, value, **options, **wanted, block_sizes=block_sizes)


def _checked(query, key, value, mask, score, bias, scale, sinks, dropout) -> dict:
    """The options in one form (mask a Mask, bias at the head of the score, scale a float), or a ValueError."""
    for name, x in {'query': query, 'key': key, 'value': value, 'sinks': sinks}.items():
        if x is not None and not hasattr(x, 'dtype'):
            raise ValueError(f'softmax_attention: {name} must be an array, given {type(x).__name__}')
    q, k, v = jnp.shape(query), jnp.shape(key), jnp.shape(value)
    given = f'given query {q}, key {k}, value {v}'
    if not len(q) == len(k) == len(v) == 4:
        raise ValueError(
            f'softmax_attention: expected query [B, T, N, H], key [B, S, K, H], value [B, S, K, Hv]; {given}'
        )
    B, T, N, H = q
    _, S, K, _ = k
    if not q[0] == k[0] == v[0] or k[1:3] != v[1:3] or q[3] != k[3]:
        raise ValueError(
            'softmax_attention: query [B, T, N, H], key [B, S, K, H] and value [B, S, K, Hv] disagree in B, S, K or H; '
            + given
        )
    if K == 0 or N % K:
        raise ValueError(f'softmax_attention: K={K} key heads must divide N={N} query heads; {given}')
    if 0 in (*q, *k, *v):
        raise ValueError(f'softmax_attention: a dimension is 0; {given}')
    dtypes = [jnp.result_type(x) for x in (query, key, value)]
    if not all(jnp.issubdtype(d, jnp.floating) and d.itemsize > 1 for d in dtypes) or len(set(dtypes)) > 1:
        raise ValueError(
            'softmax_attention: query, key and value must have one floating dtype of at least 16 bits, given '
            + ', '.join(map(str, dtypes))
        )
    if sinks is not None and (jnp.shape(sinks) != (N,) or not jnp.issubdtype(jnp.result_type(sinks), jnp.floating)):
        raise ValueError(
            f'softmax_attention: sinks must be float [N] with N={N}, given {jnp.result_type(sinks)}{jnp.shape(sinks)}'
        )
    if scale is None:
        scale = H**-0.5
    elif isinstance(scale, jax.Array) or not isinstance(scale, int | float | np.number):
        raise ValueError(
            f'softmax_attention: scale must be a number, given {scale!r}; a learned one: scores.temperature'
        )
    mask, score = as_mask(mask), as_score(score)
    if bias is not None:
        lead = scores.bias(bias)
        score = lead if score is None else lead >> score
    if score is not None and not score.parts:
        score = None
    elementwise.check(mask, B, N, T, S, 'mask')
    elementwise.check(score, B, N, T, S, 'score')
    drop.check(dropout)
    if dropout is not None and not dropout.threshold:
        dropout = None
    if dropout is not None:
        dropout = Dropout(dropout.rate, drop.u32(dropout.seed))
    return {'mask': mask, 'score': score, 'bias': None, 'scale': float(scale), 'sinks': sinks, 'dropout': dropout}


# Reference


def _reference(query, key, value, *, mask, score, bias=None, scale, sinks, dropout, return_lse=False, return_stats=False):
    (B, T, N, _), (_, S, K, _) = query.shape, key.shape
    dtype = accumulator(query.dtype)
    (q, poison_q), (k, poison_k), (v, poison_v) = clean(query), clean(key), clean(value)
    dots: Any = {'precision': 'highest', 'preferred_element_type': dtype}
    s = jnp.einsum('btkgh,bskh->bkgts', q.reshape(B, T, K, N // K, -1).astype(dtype), k.astype(dtype), **dots) * scale
    poison = jnp.moveaxis(poison_k + poison_v, 1, 2)[:, :, None, None]
    s = (s + poison).reshape(B, N, T, S) + jnp.moveaxis(poison_q, 1, 2)[..., None]
    i = Index(*(lax.broadcasted_iota(jnp.int32, (B, N, T, S), axis) for axis in range(4)), T, S)
    call, values = _whole(mask, i)
    seen = None if mask is None else call(i, values)
    if score is not None:
        call, values = _whole(score, i)
        s = call(hidden(seen, s, 0), i, [hidden(seen, x, 1) for x in values])
    s = hidden(seen, s, -jnp.inf)
    top = lax.stop_gradient(largest(s)[..., None])
    empty = top == -jnp.inf
    sink = None if sinks is None else jnp.asarray(sinks, dtype)[:, None, None]
    top = jnp.where(empty, 0, top if sink is None else jnp.maximum(top, lax.stop_gradient(sink)))
    weights = jnp.exp(s - top)
    total = weights.sum(-1, keepdims=True)
    if sink is not None:
        total += jnp.exp(jnp.where(empty, -jnp.inf, sink - top))
    total = jnp.where(empty, 1, total)
    weights /= total
    rows = (s.max(-1), (weights * jnp.where(s == -jnp.inf, 0, s)).sum(-1)) if return_stats else ()
    if dropout is not None:
        kept = drop.keep(dropout.seed, *i[:4], dropout.rate)
        weights = jnp.where(kept, weights * dropout.inverse_keep, 0)
    out = jnp.einsum('bkgts,bskh->btkgh', weights.reshape(B, K, N // K, T, S), v.astype(dtype), **dots)
    out = out.reshape(B, T, N, -1).astype(value.dtype)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0]
    return returned(out, lse, rows, sinks, return_lse, return_stats)


def _whole(value, i):
    """The call of a mask or score, and its operands' values at the indices i, all of them at once."""
    if value is None:
        return None, None
    operands, call = elementwise.flatten(value)
    at = dict(zip('bhqk', i[:4]), d=i.k - i.q + (i.q_len - 1))
    pick = lambda o: tuple(0 if c in 'bh' and n == 1 else at[c] for c, n in zip(o.index, o.array.shape))
    return call, [jnp.asarray(o.array)[pick(o)] if o.index else jnp.asarray(o.array) for o in operands]
