"""Decay per token and channel (KDA): `delta_rule` for log_decay [B, T, N, H].

As `pallas_kernels.gated_linear.per_channel`: a chunk's decay is taken apart at the middle of the whole, E, so that
the sweeps see a recurrence without decay, between whose chunks the state's rows are multiplied. A key then has two forms, one
that reads and one that enters the state:

    q' = q exp(G - E/2)    r = k exp(G - E/2)    e = k exp(E/2 - G)    u = b (v - r S)    S <- S + e^T u    o = q' S

Where the factors do not fit, `by_pairs` runs.
"""

import functools

import jax.numpy as jnp

from pallas_kernels.delta_rule import mosaic_gpu as scalar
from pallas_kernels.delta_rule import products
from pallas_kernels.delta_rule import sweep as sweeps
from pallas_kernels.gated_linear import decays, scaling
from pallas_kernels.gated_linear import mosaic_gpu as linear
from pallas_kernels.gated_linear import per_channel as channel
from pallas_kernels.gated_linear import sweep as linear_sweep
from pallas_kernels.gated_linear.sweep import CHUNK


def _by_pairs(static, q, k, v, beta, log_decay, initial_state, segment_ids):
    return channel.by_pairs(static[0], q, k, v, log_decay, initial_state, segment_ids, beta)


def _scaled(static, backward, q, k, v, beta, log_decay, initial_state, segment_ids):
    """`ready` of `channel.either`: the terms of q', r and e, and exp(E/2)."""
    q, k, log_decay = map(linear.pad, (q, k, log_decay))
    wanted = (q, 1, 2 if backward else 1), (k, 1, 2), (k, -1, 2)
    terms, between, bound = scaling.scaled(log_decay, wanted, interpret=static[1])
    return bound.min() >= -channel.SPAN, (*terms, between)


def _prepare(interpret, made, beta, segment_ids, V):
    """The schedule; the terms of q', r and e; what `write` and what `reach` take."""
    *terms, scales = made
    decay = decays.cumulative(decays.steps(None, segment_ids), beta.shape[1])
    cut, strength, decay = scalar.schedule(beta, decay, scales.shape[3], V + -V % CHUNK)
    query, reads, enters = (tuple(map(cut.cut, x)) for x in terms)
    scales = cut.cut(scales, 2, CHUNK, fill=1)
    inverse = scalar.inverses(reads[0], strength, decay, reads[1], *enters, interpret=interpret)
    low = query[1] if len(query) > 1 else None
    write = strength, inverse, decay, sweeps.Channels(reads[1], *enters, low, scales)
    reach = strength, inverse, decay, sweeps.Channels(enters[1], *reads, low, scales)
    return cut, query, reads, enters, write, reach


def _by_chunks(static, made, q, k, v, beta, log_decay, initial_state, segment_ids):
    scale, interpret = static
    (_, T, _, K), V = k.shape, v.shape[3]
    cut, query, reads, _, write, _ = _prepare(interpret, made, beta, segment_ids, V)
    v8 = cut.cut(linear.pad(v))
    state, _ = scalar.first_states(interpret, cut, reads[0], v8, write, initial_state)
    out, states = sweeps.write(query[0], reads[0], v8, *write, state, scale=scale, interpret=interpret)
    return cut.join(out)[:, :T, :, :V], cut.join(states, 2)[:, :, -1, :K, :V]


def _gradients(static, made, q, k, v, beta, log_decay, initial_state, segment_ids, do, dlast):
    scale, interpret = static
    (_, T, heads, K), V = k.shape, v.shape[3]
    cut, query, reads, enters, write, reach = _prepare(interpret, made, beta, segment_ids, V)
    v8, do8 = (cut.cut(linear.pad(x)) for x in (v, do))
    decay, scales, turn = write[2], write[3].scales, lambda x: None if x is None else x.swapaxes(2, 3)
    state, transitions = scalar.first_states(interpret, cut, reads[0], v8, write, initial_state)
    dstate = dlast = linear.pad_state(dlast) / scale
    if cut.count > 1:
        _, asked = sweeps.reach(query[0], enters[0], do8, *reach, None, only_states=True, interpret=interpret)
        dstate = scalar.chain(interpret, cut, turn(transitions), asked[:, :, 0], dlast, reverse=True)
    every = {'every': decays.GROUP, 'interpret': interpret}
    u, states = sweeps.write(None, reads[0], v8, *write, state, **every)
    w, dstates = sweeps.reach(query[0], enters[0], do8, *reach, dstate, **every)
    # Without what a token has from itself: that knows no decay, and is added below.
    options = {'by_columns': True, 'strict': True, 'precise': True, 'wide': True, 'scale': scale, 'interpret': interpret}
    sweep = functools.partial(linear_sweep.sweep, scales=scales, **options)
    dq, _, own = sweep(do8, u, enters, decay, turn(state), own=True)
    read = sweep(w, u, enters, decay, turn(state))[0]
    entered = sweep(u, do8, query, decay, turn(dstate), reverse=True)[0]
    entered = sweep(u, w, reads, decay, None, reverse=True, scale=-scale, base=entered)[0]
    tokens = lambda x: cut.join(x)[:, : T + -T % CHUNK]
    u, dv = (sum(tokens(x).astype(jnp.float32) for x in terms)[:, :T, :, :V] for terms in (u, w))
    dv *= scale
    own = scale * cut.join(own[:, :, 0], 2)
    dq, dk, within = channel.unscaled(static, q, k, log_decay, segment_ids, *map(tokens, (dq, entered)), own, tokens(read))
    dq, dk = (linear.over_groups(x, heads).astype(like.dtype) for x, like in ((dq, q), (dk, k)))
    dbeta = (u * dv).sum(-1) / jnp.maximum(beta.astype(jnp.float32), scalar.FAINTEST[products.TERMS]) ** 2
    states, dstates = cut.join(states, 2), cut.join(dstates, 2)
    first, dstate0 = None, None
    if initial_state is not None:
        first = linear.pad_state(initial_state)
        dstate0 = (dstates[:, :, 0, :K, :V] * scale).astype(initial_state.dtype)
    anchors = linear.anchors('bngkv,bngkv->bgnk', first, states, dlast, dstates)[..., :K] * scale
    dlog_decay = channel.chained(within, anchors, segment_ids, T).astype(log_decay.dtype)
    return dq, dk, dv.astype(v.dtype), dbeta.astype(beta.dtype), dlog_decay, dstate0


_per_channel = channel.either(_scaled, _by_chunks, _by_pairs, _gradients)


def per_channel(static, q, k, v, beta, log_decay, initial_state, segment_ids):
    """Decay per token and channel, in whole parts of channels."""
    q_, k_, log_decay, start = (channel.widen(x, axis) for x, axis in ((q, 3), (k, 3), (log_decay, 3), (initial_state, 2)))
    out, state = _per_channel(static, q_, k_, v, beta, log_decay, start, segment_ids)
    return out, state[:, :, : q.shape[3]]
