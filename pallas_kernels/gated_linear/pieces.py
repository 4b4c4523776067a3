"""How a sequence is swept: chunk after chunk, or, where batch and heads leave the chip idle, in pieces side by side."""

import jax
import jax.numpy as jnp

from pallas_kernels import common
from pallas_kernels.gated_linear import decays
from pallas_kernels.gated_linear import states as of_pieces
from pallas_kernels.gated_linear.sweep import CHUNK, columns, sweep, terms_of
from pallas_kernels.gated_linear.twin import TERMS, twin


def number(B: int, T: int, N: int, K: int, V: int) -> int:
    """Parts of the sequence that are swept at the same time; 1 where batch and heads fill the chip."""
    blocks = B * N * (V // columns(K, V))
    return max(1, min(common.PROCESSORS // blocks, T // (decays.GROUP * CHUNK)))


class Pieces:
    """A sequence of T tokens cut into `count` pieces of `size`, which become part of the batch; idle tokens fill the last."""

    def __init__(self, T: int, count: int):
        self.T, size = T, common.cdiv(common.cdiv(T, count), decays.GROUP * CHUNK) * decays.GROUP * CHUNK
        self.count = common.cdiv(T, size)
        self.size = size if self.count > 1 else T

    def cut(self, x, axis=1, unit=1, fill=0):
        """[B, .., T / unit, ..] -> [B * count, .., size / unit, ..]; what is added holds `fill`."""
        if x is None:
            return None
        B, size = x.shape[0], self.size // unit
        idle = [(0, 0)] * x.ndim
        idle[axis] = (0, self.count * size - x.shape[axis])
        x = jnp.pad(x, idle, constant_values=fill).reshape(*x.shape[:axis], self.count, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 1).reshape(B * self.count, *x.shape[1:axis], *x.shape[axis + 1 :])

    def cut_decay(self, decay, B: int):
        """`cumulative` of the tokens -> of the pieces."""
        if decay is None or self.count == 1 or (decay.shape[2] == 1 and self.T % self.size == 0):
            return decay
        decay = jnp.broadcast_to(decay, (B, decay.shape[1], self.T // CHUNK, *decay.shape[3:]))
        return self.cut(decay, 2, CHUNK)

    def join(self, x, axis=1):
        """[B * count, .., n, ..] -> [B, .., count * n, ..]."""
        x = jnp.moveaxis(x.reshape(-1, self.count, *x.shape[1:]), 1, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def run(
    q,
    k,
    v,
    decay,
    state,
    partner=None,
    *,
    scales=None,
    against=None,
    by_columns=False,
    reverse=False,
    grouped=False,
    exact=False,
    interpret=False,
    parts=None,
    **options,
):
    """`sweep` by the schedule that the shape asks for: chunk after chunk, or in pieces that run side by side.

    In pieces: each piece's own last state first, from keys and values alone; then the state that each piece starts with, a
    small triangular product; then the sweep with the pieces as a batch.
    """
    q, k, v = map(terms_of, (q, k, v))
    (B, T, _, K), V = k[0].shape, v[0].shape[3]
    N = max(x.shape[2] for x in q + k + v)
    cut = Pieces(T, parts or number(B, T, N, K, V))
    shared = {'reverse': reverse, 'exact': exact, 'interpret': interpret}
    options |= shared | {'every': between(grouped, exact)}
    if cut.count == 1:
        return sweep(q, k, v, decay, state, partner, scales, against=against, by_columns=by_columns, **options)
    local_decay = cut.cut_decay(decay, B)
    q, k, v, partner = jax.tree.map(cut.cut, (q, k, v, partner))
    scales = cut.cut(scales, 2, CHUNK, fill=1)
    against = cut.cut(against, 2, decays.GROUP * CHUNK)
    shared['by_columns'] = options['by_columns'] = by_columns
    starts, _ = _first_states(cut, N, k, v, local_decay, state, scales, **shared)
    out, states, dots = sweep(q, k, v, local_decay, starts, partner, scales, against=against, **options)
    states = cut.join(states, 2)
    if not grouped:
        states = states[:, :, :1] if reverse else states[:, :, -1:]
    return cut.join(out)[:, :T], states, None if dots is None else cut.join(dots, 3)


def run_twin(
    q,
    k,
    v,
    decay,
    state,
    partner=None,
    against=None,
    *,
    begun=None,
    reverse=False,
    grouped=False,
    exact=False,
    last=True,
    interpret=False,
    **options,
):
    """`twin` by the schedule that the shape asks for.

    begun: what `begin` found; None: it is found here. last: whether the last state is wanted.

    In pieces that one is the chain's, so unless log_decay's gradient is wanted only 16-bit results leave the sweep, and its own
    state is no better: of one term, of two where heads are shared and what is rounded is summed over them.
    """
    (B, T, _, K), V = k.shape, v.shape[3]
    N = max(x.shape[2] for x in (q, k, v))
    cut = Pieces(T, number(B, T, N, K, V))
    shared = {'reverse': reverse, 'exact': exact, 'interpret': interpret}
    wide = grouped or (last and cut.count == 1)
    terms = TERMS if wide else 1 if q.shape[2] == k.shape[2] == v.shape[2] else 2
    options |= shared | {'every': between(grouped, exact), 'precise': grouped and not exact, 'terms': terms}
    if cut.count > 1:
        state, end = begun or begin(k, v, decay, state, N, **shared)
        decay = cut.cut_decay(decay, B)
        q, k, v, partner = map(cut.cut, (q, k, v, partner))
        against = cut.cut(against, 2, decays.GROUP * CHUNK)
    out, other, states, met, dots = twin(q, k, v, decay, state, partner, against, **options)
    if cut.count > 1:
        join = lambda x, axis: None if x is None else cut.join(x, axis)
        out, other = (x if x is None else x[:, :T] for x in (join(out, 1), join(other, 1)))
        states = cut.join(states, 2) if wide else end[:, :, None]
        met, dots = join(met, 2), join(dots, 3)
    if wide and (against is not None or not grouped):
        states = states[:, :, :1] if reverse else states[:, :, -1:]
    return out, other, states, met, dots


def begin(k, v, decay, state, N, **shared):
    """The state that each piece of `run_twin` starts with, [pieces of the batch, N, K, V], and the last, [B, N, K, V]; None
    where there is one piece."""
    (B, T, _, K), V = k.shape, v.shape[3]
    cut = Pieces(T, number(B, T, N, K, V))
    if cut.count == 1:
        return None
    return _first_states(cut, N, (cut.cut(k),), (cut.cut(v),), cut.cut_decay(decay, B), state, **shared)


def between(grouped, exact):
    """Chunks between states that are kept; `felt` wants every one."""
    return None if not grouped else 1 if exact else decays.GROUP


def _first_states(cut, N, k, v, decay, state, scales=None, *, reverse, exact, interpret, by_columns=False):
    """The state that each piece starts with, of arrays that are cut, [pieces of the batch, N, K, V]; the last, [B, N, K, V]."""
    K, V = k[0].shape[3], v[0].shape[3]
    shared = {'reverse': reverse, 'exact': exact, 'interpret': interpret, 'by_columns': by_columns}
    if decay is not None and not exact and scales is None and len(k + v) == 2 and of_pieces.takes(K, V):
        local = of_pieces.states(*k, *v, decay, reverse=reverse, heads=N, interpret=interpret)
    else:
        _, local, _ = sweep(None, k, v, decay, None, None, scales, heads=N, **shared)
    total = None  # [B or 1, N or 1, channels or 1, parts]
    if decay is not None:
        total = decay[..., -1].sum(-1)
        total = jnp.broadcast_to(total, (*total.shape[:2], cut.size // CHUNK)).sum(-1)
        total = total.reshape(-1, cut.count if len(total) > 1 else 1, total.shape[1])
        total = jnp.broadcast_to(total.swapaxes(1, 2), (total.shape[0], total.shape[2], cut.count))[:, :, None]
    if scales is not None:
        by_channel = 2 * jnp.log2(scales).sum(2)
        by_channel = jnp.moveaxis(by_channel.reshape(-1, cut.count, N, by_channel.shape[2]), 1, 3)
        total = by_channel if total is None else by_channel + total
    turn = (lambda x: x.swapaxes(-1, -2)) if by_columns else lambda x: x  # the channels that decay come first
    local = turn(local.reshape(-1, cut.count, N, K, V))
    starts = _starts(local, total, None if state is None else turn(state), reverse)
    end = 0 if reverse else -1
    kept = 1.0 if total is None else jnp.exp2(total[..., end, None])
    return turn(starts).reshape(-1, N, K, V), turn(local[:, end] + kept * starts[:, end])


def _starts(local, total, state, reverse):
    """The state that each piece starts with, [B, parts, N, K, V], from the pieces' own last states and decays in base 2."""
    (B, parts, N), shape = local.shape[:3], local.shape
    channels = 1 if total is None else total.shape[2]
    local = local.reshape(B, parts, N, channels, -1)
    state = None if state is None else state.reshape(B, N, channels, -1)
    if reverse:
        local, total = jnp.flip(local, 1), None if total is None else jnp.flip(total, 3)
    first = jnp.zeros_like(local[:, :1]) if state is None else state[:, None]
    own = jnp.concatenate([first, local[:, :-1]], axis=1)  # own[j] is complete before piece j
    lower = jnp.tril(jnp.ones((parts, parts), bool))
    if total is None:
        weights = lower[None, None, None].astype(jnp.float32)
    else:  # between[i, j] = sum of total over pieces j <= r < i, summed and not subtracted
        terms = jnp.where(jnp.tril(lower, -1), jnp.pad(total, [(0, 0)] * 3 + [(1, 0)])[..., :-1, None], 0.0)
        weights = jnp.where(lower, jnp.exp2(jnp.cumsum(terms, axis=3)), 0.0)
    weights = jnp.broadcast_to(weights, (B, N, channels, parts, parts))
    starts = jnp.einsum('bnkij,bjnkv->binkv', weights, own, precision='highest')
    return (jnp.flip(starts, 1) if reverse else starts).reshape(shape)
