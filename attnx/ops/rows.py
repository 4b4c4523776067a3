"""Softmax attention whose heads meet: logits of all heads at once, a block of query rows at a time.

For mechanisms that mix logits or weights of heads, which no kernel of single heads can do. Memory is that of one block of
rows against all keys; the backward pass makes each block again.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import elementwise
from pallas_kernels.elementwise import Index


def by_rows(function, query, rows: int = 128):
    """function(query [B, R, …], index of its first row) -> [B, R, …], over blocks of `rows` rows of query [B, T, …]."""
    batch, length = query.shape[:2]
    if length <= rows:
        return function(query, 0)
    blocks = -(-length // rows)
    query = jnp.pad(query, [(0, 0), (0, blocks * rows - length), *[(0, 0)] * (query.ndim - 2)])
    query = jnp.moveaxis(query.reshape(batch, blocks, rows, *query.shape[2:]), 1, 0)
    out = jax.lax.map(jax.checkpoint(lambda block: function(*block)), (query, rows * jnp.arange(blocks)))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(batch, blocks * rows, *out.shape[3:])[:, :length]


def logits(query, key, scale: float):
    """float32 [B, N, R, S]: scale q . k, of rows [B, R, N, H] and keys [B, S, N, H]."""
    return scale * jnp.einsum('btnh,bsnh->bnts', query, key, preferred_element_type=jnp.float32)


def finish(s, mask, score, first, length: int):
    """Scores and masks on logits of rows `first`, first + 1, … of `length`: [B, N, R, S], -inf where masked.

    mask, score: as `softmax_attention` takes them; their heads are the N of `s`.
    """
    mask, score = elementwise.as_mask(mask), elementwise.as_score(score)
    index = [jax.lax.broadcasted_iota(jnp.int32, [n if a == axis else 1 for a in range(4)], axis)
             for axis, n in enumerate(s.shape)]  # fmt: skip
    index[2] = index[2] + first
    i = Index(*index, length, s.shape[3])
    at = dict(zip('bhqk', index), d=i.k - i.q + (length - 1))

    def values(value):
        operands, call = elementwise.flatten(value)
        pick = lambda o: tuple(0 if c in 'bh' and n == 1 else at[c] for c, n in zip(o.index, o.array.shape))
        return call, [jnp.asarray(o.array)[pick(o)] if o.index else jnp.asarray(o.array) for o in operands]

    if score is not None:
        call, given = values(score)
        s = call(s, i, given)
    if mask is not None:
        call, given = values(mask)
        s = jnp.where(call(i, given), s, -jnp.inf)
    return s


def softmax(s, sinks=None):
    """Weights of logits [B, N, R, S], with a sink [N] in the denominator; rows that see nothing are 0, never NaN."""
    top = jax.lax.stop_gradient(s.max(axis=-1, keepdims=True))
    empty = top == -jnp.inf
    top = jnp.where(empty, 0, top)
    if sinks is not None:
        sinks = sinks.astype(s.dtype)[:, None, None]
        top = jnp.maximum(top, jax.lax.stop_gradient(sinks))
    weights = jnp.exp(s - top)
    total = weights.sum(axis=-1, keepdims=True)
    total = total if sinks is None else total + jnp.exp(sinks - top)
    return weights / jnp.where(empty, 1, total)
