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

from pallas_kernels import common
from pallas_kernels.gated_linear import mosaic_gpu as shared
from pallas_kernels.gated_linear.sweep import CHUNK

SPAN = 192.0
choose = jax.lax.cond  # on the device
PAIRS, KEPT = 16, 16  # tokens whose pairs are compared at once; how many times as many lie between two states that are kept


def either(by_chunks, by_pairs, gradients):
    """f(static, q, k, v, .., log_decay, initial_state, segment_ids) -> (out, last state), as `by_chunks` or `by_pairs` has it.

    gradients(static, *args, do, dlast): those of `by_chunks`, in the order of all arguments but the last.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(static, *args):
        return choose(fits(args[-3]), lambda a: by_chunks(static, *a), lambda a: by_pairs(static, *a), args)

    def forward(static, *args):
        args = jax.tree.map(lambda x: x.value, args, is_leaf=shared.is_primal)
        return run(static, *args), args

    def backward(static, args, cotangents):
        _, k, v, *_ = args
        do, dlast = cotangents
        do = jnp.zeros(v.shape, v.dtype) if isinstance(do, SymbolicZero) else do
        if isinstance(dlast, SymbolicZero):
            dlast = jnp.zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), jnp.float32)

        def slow(args, do, dlast):
            *floats, ids = args
            _, pull = jax.vjp(lambda *a: by_pairs(static, *a, ids), *floats)
            return pull((do, dlast))

        fast = lambda args, do, dlast: gradients(static, *args, do, dlast)
        return *choose(fits(args[-3]), fast, slow, args, do, dlast), None

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def _steps(log_decay):
    return jnp.maximum(log_decay.astype(jnp.float32) * common.LOG2E, shared.ERASE)


def _chunked(x):
    """[B, T, N, H] -> [B, chunks, 64, N, H]."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % CHUNK), (0, 0), (0, 0)])
    return x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:])


def _sums(x, mask):
    """The sum over j of mask_ij x_j in every chunk: x [B, chunks, 64, N, H], mask [64, 64] or [B, chunks, 64, 64]."""
    spec = 'ij,bcjnh->bcinh' if mask.ndim == 2 else 'bcij,bcjnh->bcinh'
    return jnp.einsum(spec, mask.astype(jnp.float32), x, precision='highest')


def fits(log_decay):
    step = _steps(log_decay)
    return (_chunked(step).sum(2).min() >= -SPAN) & (step.min() > shared.NEGLIGIBLE)


def factors(log_decay):
    """exp(G - E/2), float32 [B, T, N, H], and exp(E/2), [B, N, chunks, H padded to 64]."""
    step = _chunked(_steps(log_decay))
    coarse = shared.coarse(step)
    sums = [_sums(x, np.tri(CHUNK)) for x in (coarse, step - coarse)]
    half = [x[:, :, -1:] / 2 for x in sums]
    factor = _exp2(*(x - y for x, y in zip(sums, half))).reshape(step.shape[0], -1, *step.shape[3:])[:, : log_decay.shape[1]]
    between = jnp.moveaxis(_exp2(*half)[:, :, 0], 1, 2)
    return factor, jnp.pad(between, [(0, 0), (0, 0), (0, 0), (0, -between.shape[3] % 64)], constant_values=1.0)


def _exp2(coarse, fine):
    """2 ** (coarse + fine), the sum not rounded."""
    whole = jnp.round(coarse)
    return jnp.exp2(whole) * jnp.exp2((coarse - whole) + fine)


def decay_gradient(each, anchors, segment_ids):
    """As `mosaic_gpu.decay_gradient`, for each [B, T, N, H] and anchors [B, groups + 1, N, H], where only resets are silent."""
    (B, T, N, H), groups = each.shape, anchors.shape[1] - 1
    later = np.triu(np.ones((CHUNK, CHUNK)))
    silence = None
    if segment_ids is not None:
        reset = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, groups * shared.GROUP * CHUNK - T)])
        reset = reset.reshape(B, -1, CHUNK).astype(jnp.int32)
        count = jnp.cumsum(reset, 2)
        later = (later > 0) & ((count - reset)[..., :, None] == count[..., None, :])
        silence = (count[..., -1:] - count + reset).reshape(B, groups, shared.GROUP, CHUNK, 1, 1)
    each = jnp.pad(each, [(0, 0), (0, groups * shared.GROUP * CHUNK - T), (0, 0), (0, 0)])
    within = _sums(each.reshape(B, -1, CHUNK, N, H), later).reshape(B, groups, shared.GROUP, CHUNK, N, H)
    following, chunks = anchors[:, 1:], []
    for c in reversed(range(shared.GROUP)):
        felt = following[:, :, None]
        chunks.append(within[:, :, c] + (felt if silence is None else jnp.where(silence[:, :, c] == 0, felt, 0.0)))
        following = chunks[-1][:, :, 0]
    each = jnp.stack(chunks[::-1], axis=2).reshape(B, groups, -1, N, H)
    heard = jnp.ones((B, groups, shared.GROUP * CHUNK), bool)
    if silence is not None:
        heard = jnp.cumsum(reset.reshape(heard.shape), axis=-1) == 0
    each += (anchors[:, :-1] - each[:, :, 0])[:, :, None] * shared.bridge(heard, T)[..., None, None]
    each = each.reshape(B, -1, N, H)[:, :T]
    return each if silence is None else jnp.where(reset.reshape(B, -1)[:, :T, None, None] > 0, 0.0, each)


def _prepare(q, k, v, log_decay, segment_ids):
    groups = v.shape[2] // k.shape[2]
    wide = lambda x: jnp.repeat(x, groups, 2).astype(jnp.float32)
    factor, between = factors(log_decay)

    resets = shared.cumulative(shared.steps(None, segment_ids), q.shape[1])
    terms = functools.partial(split, dtype=q.dtype, terms=3)
    return terms(wide(q) * factor), terms(wide(k) / factor), shared.pad(v), resets, factor, between


def split(x, dtype, terms=2) -> tuple:
    """16-bit terms, largest first, padded for the sweeps: three are a float32."""
    info, found = jnp.finfo(dtype), []
    for _ in range(terms):
        high = jax.lax.reduce_precision(x, info.nexp, info.nmant)  # a cast there and back is what XLA may leave out
        found.append(shared.pad(high.astype(dtype)))
        x = x - high
    return tuple(found)


def _by_chunks(static, q, k, v, log_decay, initial_state, segment_ids):
    scale, interpret = static
    qd, kd, v8, resets, _, between = _prepare(q, k, v, log_decay, segment_ids)
    state = None if initial_state is None else shared.pad_state(initial_state)
    out, states, _ = shared.run(qd[0], kd, v8, resets, state, scales=between, scale=scale, interpret=interpret)
    return out[:, : q.shape[1], :, : v.shape[3]], states[:, :, -1, : k.shape[3], : v.shape[3]]


def _gradients(static, q, k, v, log_decay, initial_state, segment_ids, do, dlast):
    scale, interpret = static
    (_, T, heads, K), V = k.shape, v.shape[3]
    qd, kd, v8, resets, factor, between = _prepare(q, k, v, log_decay, segment_ids)
    turn = lambda x: None if x is None else x.swapaxes(2, 3)
    state = None if initial_state is None else shared.pad_state(initial_state)
    dstate, do8 = shared.pad_state(dlast) / scale, shared.pad(do)
    run = functools.partial(shared.run, scales=between, scale=scale, grouped=True, interpret=interpret)
    of_keys = functools.partial(run, by_columns=True, strict=True, precise=True, wide=True)
    dqd, states, _ = of_keys(do8, v8, kd, resets, turn(state))
    dv, dstates, _ = run(kd[0], qd, do8, resets, dstate, reverse=True)
    dkd, _, _ = of_keys(v8, do8, qd, resets, turn(dstate), reverse=True)
    dq, dk = factor * dqd[:, :T, :, :K], dkd[:, :T, :, :K] / factor
    # What a token has from itself knows no decay: it is left out above, where it would cancel, and added here.
    own = scale * (v.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1, keepdims=True)
    q_wide, k_wide = (jnp.repeat(x, v.shape[2] // heads, 2).astype(jnp.float32) for x in (q, k))
    each = q_wide * dq - k_wide * dk
    dq = shared.over_groups(dq + own * k_wide, heads).astype(q.dtype)
    dk = shared.over_groups(dk + own * q_wide, heads).astype(k.dtype)
    dstate0 = None
    if initial_state is not None:
        dstate0 = (dstates[:, :, 0, :K, :V] * scale).astype(initial_state.dtype)
    anchors = shared.anchors('bngvk,bngkv->bgnk', turn(state), states, dstate, dstates)[..., :K] * scale
    dlog_decay = decay_gradient(each, anchors, segment_ids).astype(log_decay.dtype)
    return dq, dk, dv[:, :T, :, :V], dlog_decay, dstate0


def by_pairs(scale, q, k, v, log_decay, initial_state, segment_ids, beta=None):
    """The same, with `beta` the delta rule's, for any decay: chunks of 16 tokens in XLA, with every pair's own exponent."""
    (B, T, N, V), K = v.shape, k.shape[3]
    wide = lambda x: jnp.repeat(x, N // x.shape[2], 2).astype(jnp.float32)
    step = _steps(log_decay)
    if segment_ids is not None:
        step = jnp.where(shared.steps(None, segment_ids)[..., None] < 0, shared.ERASE, step)

    def cut(x):  # [kept states, chunks, B, N, 16, H]
        x = jnp.pad(x, [(0, 0), (0, -T % (PAIRS * KEPT)), (0, 0), (0, 0)])
        return jnp.moveaxis(x.reshape(B, -1, KEPT, PAIRS, N, x.shape[3]), (1, 2, 4), (0, 1, 3))

    lower = jnp.tril(jnp.ones((PAIRS, PAIRS), bool))[..., None]
    strict = jnp.tril(jnp.ones((PAIRS, PAIRS)), -1)[..., None]
    einsum = functools.partial(jnp.einsum, precision='highest')

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(state, xs):
        q, k, v, step, *strength = xs
        G = jnp.cumsum(step, axis=2)
        pairs = jnp.exp2(jnp.where(lower, G[:, :, :, None] - G[:, :, None], 0.0)) * lower
        for beta in strength:
            coupling = beta * einsum('bnik,bnjk,bnijk->bnij', k, k, pairs * strict)
            v = beta * (v - einsum('bnik,bnkv->bniv', k * jnp.exp2(G), state))
            v = jax.lax.linalg.triangular_solve(coupling, v, left_side=True, lower=True, unit_diagonal=True)
        weights = einsum('bnik,bnjk,bnijk->bnij', q, k, pairs)
        out = einsum('bnij,bnjv->bniv', weights, v) + einsum('bnik,bnkv->bniv', q * jnp.exp2(G), state)
        end = G[:, :, -1:]
        state = jnp.exp2(end[:, :, 0])[..., None] * state + einsum('bnjk,bnjv->bnkv', k * jnp.exp2(end - G), v)
        return state, scale * out

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def several(state, xs):
        state, out = jax.lax.scan(body, state, xs)
        return state, out.astype(v.dtype)

    state = jnp.zeros((B, N, K, V), jnp.float32) if initial_state is None else initial_state.astype(jnp.float32)
    arrays = wide(q), wide(k), wide(v), step, *(() if beta is None else (beta.astype(jnp.float32)[..., None],))
    state, out = jax.lax.scan(several, state, tuple(map(cut, arrays)))
    return jnp.moveaxis(out, (0, 1, 3), (1, 2, 4)).reshape(B, -1, N, V)[:, :T], state


per_channel = either(_by_chunks, lambda static, *args: by_pairs(static[0], *args), _gradients)
