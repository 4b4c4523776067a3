"""Normalizers: how a row of logits becomes a row of attention weights. For `attnx.ops.weighted_attention`.

A normalizer is a function `(s, seen, i) -> weights` of the logits of some queries and all keys, float [B, N, t, S], which
pairs see each other, bool of a shape that broadcasts to it, and their `Index`. It gives 0 where a pair is not seen; a row
that sees nothing is all 0. The functions here return such functions, or (`softmax`, `signed`) are one. n, below, is the
number of keys that a query sees.
"""

import jax
import jax.numpy as jnp

__all__ = ['off_by_one', 'relu', 'sigmoid', 'signed', 'sinks', 'softmax', 'softplus', 'top_k']


def softmax(s, seen, i=None):
    """exp(s) / sum exp(s)."""
    e, _, total = _exponentials(s, seen)
    return e / jnp.where(total == 0, 1, total)


def off_by_one(s, seen, i=None):
    """exp(s) / (1 + sum exp(s)): softmax beside a key of logit 0 and value 0, so that a row may give little to all.

    Paper: Attention is off by one, E. Miller, 2023 (a blog post).
    """
    e, top, total = _exponentials(s, seen, least=0.0)
    return e / (total + jnp.exp(-top))


def sinks(logits):
    """exp(s) / (exp(z) + sum exp(s)), z of each head in `logits` [N]: a sink takes what keys don't. Paper: 2309.17453."""

    def weights(s, seen, i=None):
        sink = logits.astype(s.dtype)[:, None, None]
        e, top, total = _exponentials(s, seen, least=sink)
        return e / (total + jnp.exp(sink - top))

    return weights


def signed(s, seen, i=None):
    """sign(s) exp|s| / sum exp|s|: negative logits weigh negatively; the magnitudes of a row sum to 1.

    Paper: Cog attention, 2411.07176.
    """
    return jnp.sign(s) * softmax(jnp.abs(s), seen)


def relu(power: float = 1.0):
    """n^-power relu(s). Paper: Replacing softmax with ReLU in vision transformers, 2309.08586."""

    def weights(s, seen, i=None):
        return jnp.where(seen, jax.nn.relu(s), 0) * _count(s, seen) ** -power

    return weights


def sigmoid(length: int = 0):
    """sigmoid(s - log length), or s - log n with length 0: about 1 in all at logits of 0. Paper: 2409.04431."""

    def weights(s, seen, i=None):
        count = float(length) if length else _count(s, seen)
        return jnp.where(seen, jax.nn.sigmoid(s - jnp.log(jnp.asarray(count, s.dtype))), 0)

    return weights


def softplus(power: float = 0.0, *, exempt: int = 3):
    """a = softplus(s log n) / sum; with a power p then relu(n a - 1)^p / sum, which keeps what exceeds the mean.

    Args:
      power: p >= 1 of the second step; 0: none.
      exempt: rows that see at most so many keys subtract no 1. A row whose weights are all equal keeps the first step's.

    Paper: LSSA and LSSAR, 2501.13428.
    """

    def weights(s, seen, i=None):
        count = _count(s, seen)
        a = jnp.where(seen, jax.nn.softplus(s * jnp.log(count)), 0)
        a = a / jnp.maximum(a.sum(-1, keepdims=True), 1e-8)
        if not power:
            return a
        over = jax.nn.relu(count * a - (count > exempt))
        most = jax.lax.stop_gradient(over.max(-1, keepdims=True))  # cancels; else over^15 would under- or overflow
        uniform = most < 1e-6
        raised = (over / jnp.where(uniform, 1, most)) ** power
        return jnp.where(uniform, a, raised / jnp.where(uniform, 1, raised.sum(-1, keepdims=True)))

    return weights


def top_k(k: int, normalizer=softmax):
    """`normalizer` over the k largest logits of each row, the others 0; of equal ones the first."""

    def weights(s, seen, i=None):
        seen = jnp.broadcast_to(seen, s.shape)
        if k < s.shape[-1]:
            chosen = jax.lax.top_k(jax.lax.stop_gradient(jnp.where(seen, s, -jnp.inf)), k)[1]
            seen = seen & jnp.put_along_axis(jnp.zeros(s.shape, bool), chosen, True, axis=-1, inplace=False)
        return normalizer(s, seen, i)

    return weights


def _exponentials(s, seen, least=None):
    """(exp(s - top), 0 where not seen; top, the largest logit of a row or 0; their sum)."""
    top = jnp.where(seen, s, -jnp.inf).max(-1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0, top) if least is None else jnp.maximum(top, least)
    top = jax.lax.stop_gradient(top)
    e = jnp.where(seen, jnp.exp(jnp.where(seen, s, top) - top), 0)
    return e, top, e.sum(-1, keepdims=True)


def _count(s, seen):
    """n of each row, 1 at least, [.., t, 1]."""
    seen = jnp.broadcast_to(seen, (*seen.shape[:-1], s.shape[-1]))
    return jnp.maximum(seen.sum(-1, keepdims=True), 1).astype(s.dtype)
