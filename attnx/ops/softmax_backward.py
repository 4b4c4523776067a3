"""The backward pass of softmax attention as an op of its own, for who merges what was read from several parts of the keys.

With the log-sum-exp over all keys, the weights of a part of them are exp(X - lse), and its share of every gradient needs the
whole's output and cotangents, not the part's: nothing of the forward pass is computed again.
"""

import functools

import jax
import jax.numpy as jnp

from attnx import dispatch
from attnx.ops import blockwise
from attnx.ops.softmax_attention import reference


def recalled(impl, query, key, value, *, known, mask, score, scale, dropout):
    """`known`, the (out, lse) of `attnx.ops.softmax_attention` over these keys and others, with these keys' share of its
    gradients: by query, key, value and score. Options as the op has checked them; sinks are the caller's.

    known: out [B, T, N, Hv] of any floating dtype and lse [B, N, T]. First derivatives only, none by `known`.
    """
    return _recalled(impl, scale, query, key, value, mask, score, dropout, known)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recalled(impl, scale, query, key, value, mask, score, dropout, known):
    return known


def _forward(impl, scale, query, key, value, mask, score, dropout, known):
    return known, (query, key, value, mask, score, dropout, known)


def _backward(impl, scale, saved, cotangents):
    query, key, value, mask, score, dropout, known = saved
    options = {'seen': (*known, *cotangents), 'mask': mask, 'score': score, 'scale': scale, 'dropout': dropout}
    found = dispatch.run('softmax_attention_backward', impl, FORMS, (query, key, value), options)
    return *found[:3], None, found[3], None, None


_recalled.defvjp(_forward, _backward)


def _reference(query, key, value, *, seen, mask, score, scale, dropout):
    """By the quadratic form of these keys alone, whose weights are exp(its lse - lse) times what they are here."""
    out, lse, dout, dlse = seen
    options = {'mask': mask, 'scale': scale, 'dropout': dropout, 'return_lse': True}
    part = lambda query, key, value, score: reference(query, key, value, score=score, **options)
    (read, mine), pull = jax.vjp(part, query, key, value, score)
    rows = lambda x: jnp.moveaxis(x, 1, 2)
    live = (dout != 0).any(-1) | rows(dlse != 0)
    share = rows(jnp.where(lse == -jnp.inf, 0, jnp.exp(mine - lse)))
    change = ((read.astype(out.dtype) - out) * dout).sum(-1) + rows(dlse)
    dread = jnp.where(live[..., None], share[..., None] * dout, 0).astype(read.dtype)
    return pull((dread, rows(jnp.where(live, share * change, 0)).astype(mine.dtype)))


FORMS = {'reference': _reference, 'xla': blockwise.backward}
