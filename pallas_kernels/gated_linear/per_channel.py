"""Decay per token and channel: `gated_linear` for log_decay [B, T, N, H].

Within a chunk the decay between two tokens is taken apart at the middle of the chunk's whole decay E, so that the kernel sees
a recurrence without decay, between whose chunks the state's rows are multiplied:

    q'_i = q_i exp(G_i - E/2)    k'_j = k_j exp(E/2 - G_j)    S <- exp(E/2) ((exp(E/2) S) + k'^T v)

The factors fit while no channel decays by more than `SPAN` powers of two within 64 tokens (2.1 nats a token, every token), or
by so much at once that nothing is felt through it. Else `by_pairs` runs: 16 tokens at a time in XLA, every pair's own exponent,
for any decay. The choice is made on the device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.gated_linear import decays, pieces, scaling
from pallas_kernels.gated_linear import mosaic_gpu as shared
from pallas_kernels.gated_linear.sweep import CHUNK

SPAN = 192.0
choose = jax.lax.cond  # on the device
ERASE = -104.0  # its exp is 0 in float32
PAIRS, KEPT = 16, 16  # tokens whose pairs are compared at once; how many times as many lie between two states that are kept


def either(ready, by_chunks, by_pairs, gradients):
    """f(static, q, k, v, .., log_decay, initial_state, segment_ids) -> (out, last state), as `by_chunks` or `by_pairs` has it.

    ready(static, backward, *args): whether `by_chunks` is to run, and what it and `gradients` take before the arguments.
    gradients(static, made, *args, do, dlast): those of `by_chunks`, in the order of all arguments but the last.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(static, *args):
        fits, made = ready(static, False, *args)
        fast = lambda made, a: by_chunks(static, made, *a)
        return choose(fits, fast, lambda _, a: by_pairs(static, *a), made, args)

    def forward(static, *args):
        args = jax.tree.map(lambda x: x.value, args, is_leaf=shared.is_primal)
        return run(static, *args), args

    def backward(static, args, cotangents):
        _, k, v, *_ = args
        do, dlast = cotangents
        do = jnp.zeros(v.shape, v.dtype) if isinstance(do, SymbolicZero) else do
        if isinstance(dlast, SymbolicZero):
            dlast = jnp.zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), jnp.float32)

        def slow(_, args, do, dlast):
            *floats, ids = args
            _, pull = jax.vjp(lambda *a: by_pairs(static, *a, ids), *floats)
            return pull((do, dlast))

        fits, made = ready(static, True, *args)
        fast = lambda made, args, do, dlast: gradients(static, made, *args, do, dlast)
        return *choose(fits, fast, slow, made, args, do, dlast), None

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def _resets(segment_ids):
    """1 where a document begins: int32 [B, T]."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)]).astype(jnp.int32)


def _bridge(heard, T: int):
    """1 at each group's first token, less and less until the last of the T that is heard of there: [.., groups, tokens].

    heard: [.., groups, tokens], whether no step from the first up to this one is silent.
    """
    groups, size = heard.shape[-2:]
    place = np.arange(groups * size).reshape(groups, size)
    length = (heard & (place < T)).sum(-1, keepdims=True)
    return jnp.where(heard, jnp.maximum(length - place[0], 0) / jnp.maximum(length, 1), 0.0)


def chained(within, anchors, segment_ids, T: int):
    """As `log_decay.gradient`, of T tokens whose sums within chunks are given, where only resets are silent.

    Args:
      within: a_t - b_t summed over t and what follows it in its chunk and document, float32 [B, whole chunks, N, H].
      anchors: [B, groups + 1, N, H].
    """
    (B, _, N, H), groups = within.shape, anchors.shape[1] - 1
    size = groups * decays.GROUP * CHUNK
    within = jnp.pad(within, [(0, 0), (0, size - within.shape[1]), (0, 0), (0, 0)])
    within = within.reshape(B, groups, decays.GROUP, CHUNK, N, H)
    silence, heard = None, jnp.ones((B, groups, decays.GROUP * CHUNK), bool)
    if segment_ids is not None:
        reset = jnp.pad(_resets(segment_ids), [(0, 0), (0, size - T)])
        count = jnp.cumsum(reset.reshape(B, groups, decays.GROUP, CHUNK), 3)
        silence = (count[..., -1:] - count + reset.reshape(count.shape))[..., None, None]
        heard = jnp.cumsum(reset.reshape(heard.shape), axis=-1) == 0
    following, chunks = anchors[:, 1:], []
    for c in reversed(range(decays.GROUP)):
        felt = following[:, :, None]
        chunks.append(within[:, :, c] + (felt if silence is None else jnp.where(silence[:, :, c] == 0, felt, 0.0)))
        following = chunks[-1][:, :, 0]
    each = jnp.stack(chunks[::-1], axis=2).reshape(B, groups, -1, N, H)
    each += (anchors[:, :-1] - each[:, :, 0])[:, :, None] * _bridge(heard, T)[..., None, None]
    each = each.reshape(B, -1, N, H)[:, :T]
    return each if segment_ids is None else jnp.where(_resets(segment_ids)[..., None, None] > 0, 0.0, each)


def _by_chunks(static, made, q, k, v, log_decay, initial_state, segment_ids):
    """made: terms of q' and of k', exp(E/2)."""
    (scale, interpret), (qd, kd, between) = static, made
    resets = decays.cumulative(decays.steps(None, segment_ids), q.shape[1])
    state = None if initial_state is None else shared.pad_state(initial_state)
    out, states, _ = pieces.run(qd[0], kd, shared.pad(v), resets, state, scales=between, scale=scale, interpret=interpret)
    return out[:, : q.shape[1], :, : v.shape[3]], states[:, :, -1, : k.shape[3], : v.shape[3]]


def _gradients(static, made, q, k, v, log_decay, initial_state, segment_ids, do, dlast):
    (scale, interpret), (qd, kd, between) = static, made
    (_, T, heads, K), V = k.shape, v.shape[3]
    resets = decays.cumulative(decays.steps(None, segment_ids), T)
    turn = lambda x: None if x is None else x.swapaxes(2, 3)
    state = None if initial_state is None else shared.pad_state(initial_state)
    dstate, do8, v8 = shared.pad_state(dlast) / scale, shared.pad(do), shared.pad(v)
    run = functools.partial(pieces.run, scales=between, scale=scale, interpret=interpret)
    of_keys = functools.partial(run, by_columns=True, strict=True, precise=True, wide=True)
    dqd, states, own = of_keys(do8, v8, kd, resets, turn(state), grouped=True, own=True)
    of_values = functools.partial(run, kd[0], qd, do8, resets, dstate, reverse=True)
    of_keys = functools.partial(of_keys, v8, do8, qd, resets, turn(dstate), reverse=True)
    dv, dstates, _, dkd, anchors = shared.backward_in_time(of_values, of_keys, turn(state), states, dstate, 'bgnk')
    # What a token has from itself knows no decay: it is left out above, where it would cancel, and added here.
    dq, dk, within = unscaled(static, q, k, log_decay, segment_ids, dqd, dkd, scale * own[:, :, 0])
    dq, dk = (shared.over_groups(x, heads).astype(like.dtype) for x, like in ((dq, q), (dk, k)))
    dstate0 = None
    if initial_state is not None:
        dstate0 = (dstates[:, :, 0, :K, :V] * scale).astype(initial_state.dtype)
    dlog_decay = chained(within, anchors[..., :K] * scale, segment_ids, T).astype(log_decay.dtype)
    return dq, dk, dv[:, :T, :, :V], dlog_decay, dstate0


def _scaled(static, backward, q, k, v, log_decay, initial_state, segment_ids):
    """`ready` by a kernel: the factors fit where the bound on them says so."""
    wanted = (shared.pad(q), 1, 3 if backward else 1), (shared.pad(k), -1, 3)
    (qd, kd), between, bound = scaling.scaled(shared.pad(log_decay), wanted, interpret=static[1])
    return bound.min() >= -SPAN, (qd, kd, between)


def unscaled(static, q, k, log_decay, segment_ids, dq, dk, own, dr=None):
    """`scaling.unscaled` of arrays that are not whole chunks, where q is not."""
    T = q.shape[1]
    resets = None if segment_ids is None else jnp.pad(_resets(segment_ids), [(0, 0), (0, -T % CHUNK)])
    q, k, log_decay = map(shared.pad, (q, k, log_decay))
    dq, dk, within = scaling.unscaled(log_decay, q, k, dq, dk, own, resets, dr, interpret=static[1])
    return dq[:, :T], dk[:, :T], within


def by_pairs(scale, q, k, v, log_decay, initial_state, segment_ids, beta=None):
    """The same, with `beta` the delta rule's, for any decay: chunks of 16 tokens in XLA, with every pair's own exponent."""
    (B, T, N, V), K = v.shape, k.shape[3]
    wide = lambda x: jnp.repeat(x, N // x.shape[2], 2).astype(jnp.float32)
    step = jnp.maximum(log_decay.astype(jnp.float32), ERASE)
    if segment_ids is not None:
        step = jnp.where(_resets(segment_ids)[..., None, None] > 0, ERASE, step)

    def cut(x):  # [kept states, chunks, B, N, 16, H]
        x = jnp.pad(x, [(0, 0), (0, -T % (PAIRS * KEPT)), (0, 0), (0, 0)])
        return jnp.moveaxis(x.reshape(B, -1, KEPT, PAIRS, N, x.shape[3]), (1, 2, 4), (0, 1, 3))

    lower = jnp.tril(jnp.ones((PAIRS, PAIRS), bool))[..., None]
    strict = jnp.tril(jnp.ones((PAIRS, PAIRS)), -1)[..., None]
    einsum = functools.partial(jnp.einsum, precision='highest')

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(state, xs):
        q, k, v, step, *strength = xs
        # Every sum starts where its decay does: the difference of two would lose weak steps beside strong ones.
        G = jnp.cumsum(step, axis=2)
        pairs = jnp.exp(jnp.cumsum(strict * step[:, :, :, None], axis=2)) * lower
        rest = jnp.cumsum(jnp.pad(step[:, :, :0:-1], [(0, 0), (0, 0), (1, 0), (0, 0)]), axis=2)[:, :, ::-1]
        for beta in strength:
            coupling = beta * einsum('bnik,bnjk,bnijk->bnij', k, k, pairs * strict)
            v = beta * (v - einsum('bnik,bnkv->bniv', k * jnp.exp(G), state))
            v = jax.lax.linalg.triangular_solve(coupling, v, left_side=True, lower=True, unit_diagonal=True)
        weights = einsum('bnik,bnjk,bnijk->bnij', q, k, pairs)
        out = einsum('bnij,bnjv->bniv', weights, v) + einsum('bnik,bnkv->bniv', q * jnp.exp(G), state)
        state = jnp.exp(G[:, :, -1])[..., None] * state + einsum('bnjk,bnjv->bnkv', k * jnp.exp(rest), v)
        return state, scale * out

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def several(state, xs):
        state, out = jax.lax.scan(body, state, xs)
        return state, out.astype(v.dtype)

    state = jnp.zeros((B, N, K, V), jnp.float32) if initial_state is None else initial_state.astype(jnp.float32)
    arrays = wide(q), wide(k), wide(v), step, *(() if beta is None else (beta.astype(jnp.float32)[..., None],))
    state, out = jax.lax.scan(several, state, tuple(map(cut, arrays)))
    return jnp.moveaxis(out, (0, 1, 3), (1, 2, 4)).reshape(B, -1, N, V)[:, :T], state


def _slow(static, *args):
    return by_pairs(static[0], *args)


_per_channel = either(_scaled, _by_chunks, _slow, _gradients)


def widen(x, axis):
    """Whole parts of channels, which `scaling` takes."""
    return x if x is None else jnp.pad(x, [(0, -x.shape[axis] % scaling.PART * (axis == i)) for i in range(4)])


def per_channel(static, q, k, v, log_decay, initial_state, segment_ids):
    """Decay per token and channel, in whole parts of channels."""
    q_, k_, log_decay, start = widen(q, 3), widen(k, 3), widen(log_decay, 3), widen(initial_state, 2)
    out, state = _per_channel(static, q_, k_, v, log_decay, start, segment_ids)
    return out, state[:, :, : q.shape[3]]
