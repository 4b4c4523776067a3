"""What attention and recurrences do, in figures per head: for watching a run, not for training on.

`of_op` takes them from the op's own pass, kernels included; `softmax` computes them from its operands by plain XLA, blockwise.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import elementwise
from pallas_kernels.elementwise import Index

PAIRS = 2**24  # logits that are held at a time


def softmax(query, key, *, mask=None, score=None, scale=1.0, sinks=None) -> dict[str, jax.Array]:
    """Figures of softmax attention: with X its logits (score and scale included) over the keys that a row may see,

        max_logit = max X        entropy = -Σ p log p        sink_mass = p[first visible key] + p[learned sink]

    in nats; a learned sink is one more outcome of p. The mean is over rows that see anything, the maximum over all pairs.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      mask, score, scale, sinks: as `attnx.ops.softmax_attention` hands them to its forms.

    Returns:
      'max_logit', 'entropy', 'sink_mass': float32 [N]. Memory: O(S) a query of a block.
    """
    (B, T, N, _), (_, S, K, _) = query.shape, key.shape
    block = max(1, min(T, PAIRS // (B * N * S)))
    count = -(-T // block)
    query = jnp.pad(query.astype(jnp.float32), ((0, 0), (0, count * block - T), (0, 0), (0, 0)))
    key = key.astype(jnp.float32)
    sink = None if sinks is None else sinks.astype(jnp.float32)[:, None, None]

    def rows(start):
        q = lax.dynamic_slice_in_dim(query, start, block, axis=1).reshape(B, block, K, N // K, -1)
        x = jnp.einsum('btkgh,bskh->bkgts', q, key, precision='highest').reshape(B, N, block, S) * scale
        b, h, t, s = (lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in range(4))
        i = Index(b, h, jnp.minimum(start + t, T - 1), s, T, S)
        seen = start + t < T
        if mask is not None:
            seen &= _apply(mask, i)
        if score is not None:
            x = _apply(score, i, jnp.where(seen, x, 0))
        x = jnp.where(seen, x, -jnp.inf)
        real = seen.any(-1)
        top = jnp.where(real, x.max(-1), 0)[..., None]
        top = top if sink is None else jnp.maximum(top, sink)
        weights = jnp.where(seen, jnp.exp(x - top), 0)
        extra = 0.0 if sink is None else jnp.exp(sink - top)
        total = weights.sum(-1, keepdims=True) + extra
        p, p_sink = weights / total, extra / total
        lse = top + jnp.log(total)
        entropy = lse[..., 0] - jnp.where(seen, p * x, 0).sum(-1)
        first = jnp.take_along_axis(p, jnp.argmax(seen, -1, keepdims=True), -1)
        mass = first + p_sink
        if sink is not None:
            entropy -= (p_sink * sink)[..., 0]
        mean = lambda value: jnp.where(real, value, 0).sum((0, 2))
        return x.max((0, 2, 3)), mean(entropy), mean(mass[..., 0]), real.sum((0, 2))

    largest, entropy, mass, real = lax.map(rows, jnp.arange(count) * block)
    real = jnp.maximum(real.sum(0), 1)
    return {'max_logit': largest.max(0), 'entropy': entropy.sum(0) / real, 'sink_mass': mass.sum(0) / real}


def of_op(out, query, key, *, mask=None, score=None, scale=1.0) -> dict[str, jax.Array]:
    """The same figures, those that the op was asked for, from what it itself returns with `return_lse` and `return_stats`,
    without its products: of each row only the first key that it sees is looked at again, for `sink_mass`.

    Args:
      out: the op's output, lse [B, N, T] and `Statistics`.
      query, key, mask, score, scale: as for `softmax`.
    """
    _, lse, stats = out
    found = {name: value for name, value in stats._asdict().items() if value is not None}
    if 'sink_mass' not in found:
        return found
    (B, T, N, _), (_, S, K, _) = query.shape, key.shape
    block = max(1, min(T, PAIRS // (B * S)))
    count = -(-T // block)
    query = jnp.pad(query.astype(jnp.float32), ((0, 0), (0, count * block - T), (0, 0), (0, 0)))
    keys = key.astype(jnp.float32).swapaxes(1, 2)
    along = lambda size, axis: jnp.arange(size).reshape([size if a == axis else 1 for a in range(4)])

    def rows(start):
        t = jnp.minimum(start + along(block, 2), T - 1)
        i = Index(along(B, 0), along(N, 1), t, along(S, 3), T, S)
        seen = jnp.ones((1, 1, 1, S), bool) if mask is None else _apply(mask, i)
        first = jnp.broadcast_to(jnp.argmax(seen, -1), (B, N, block))
        there = jnp.take_along_axis(keys, first.reshape(B, K, -1, 1), axis=2).reshape(B, N, block, -1)
        q = lax.dynamic_slice_in_dim(query, start, block, axis=1).swapaxes(1, 2)
        x = jnp.sum(q * there, axis=-1) * scale
        i = Index(*(jnp.broadcast_to(v[..., 0], x.shape) for v in i[:3]), first, T, S)
        return x if score is None else _apply(score, i, x)

    x = jnp.moveaxis(lax.map(rows, jnp.arange(count) * block), 0, 2).reshape(B, N, -1)[..., :T]
    real = lse != -jnp.inf
    mass = jnp.where(real, jnp.exp(x - jnp.where(real, lse, 0)), 0).sum((0, 2)) / jnp.maximum(real.sum((0, 2)), 1)
    return found | {'sink_mass': stats.sink_mass + mass}


def _apply(value, i: Index, *x):
    """A mask or a score at the indices i."""
    operands, call = elementwise.flatten(value)
    at = dict(zip('bhqk', i[:4]), d=i.k - i.q + (i.q_len - 1))
    pick = lambda o: tuple(0 if c in 'bh' and n == 1 else at[c] for c, n in zip(o.index, o.array.shape))
    return call(*x, i, [jnp.asarray(o.array)[pick(o)] if o.index else jnp.asarray(o.array) for o in operands])


def recurrence(log_decay, state) -> dict[str, jax.Array]:
    """Figures of a linear recurrence:

        state_norm = root of the batch's mean of |S|²        half_life = ln 2 / mean(-log_decay), in tokens

    Args:
      log_decay: None, [N], [B, T, N] or [B, T, N, H].
      state: [B, N, H, Hv] after the last token.

    Returns:
      'state_norm' and, where there is a decay, 'half_life' (inf where nothing decays): float32 [N].
    """
    found = {'state_norm': jnp.sqrt(jnp.mean(jnp.sum(jnp.square(state.astype(jnp.float32)), axis=(2, 3)), axis=0))}
    if log_decay is not None:
        g = jnp.asarray(log_decay, jnp.float32)
        rate = -(g if g.ndim == 1 else g.mean((0, 1)) if g.ndim == 3 else g.mean((0, 1, 3)))
        found['half_life'] = jnp.log(2.0) / rate
    return found
