"""Delta rule on Hopper, without or with any decay: forward and backward from four sweeps.

    S' = exp(g_t) S_{t-1}        u_t = beta_t (v_t - k_t S')        S_t = S' + k_t^T u_t        o_t = scale q_t S_t

`write` finds u and o, `reach` finds w_t = beta_t k_t D_t from the adjoints D_t of S_t; given both, every gradient is one of a
gated linear recurrence, and `joint` finds two at a time. `delta_rule` has the signature of `attnx.ops.delta_rule` without
`impl`; `unsupported` says why a call can't run here. README.md in this folder has the maths, the limits and what was measured.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import apart
from pallas_kernels.common import cdiv
from pallas_kernels.delta_rule import chain as chains
from pallas_kernels.delta_rule import sweep as sweeps
from pallas_kernels.delta_rule.inverse import inverses
from pallas_kernels.delta_rule.joint import joint
from pallas_kernels.delta_rule.products import TERMS, strengths
from pallas_kernels.gated_linear import decays, decode
from pallas_kernels.gated_linear import mosaic_gpu as linear
from pallas_kernels.gated_linear.accumulate import WHOLE
from pallas_kernels.gated_linear.felt import felt
from pallas_kernels.gated_linear.log_decay import gradient
from pallas_kernels.gated_linear.pieces import Pieces, number
from pallas_kernels.gated_linear.sweep import CHUNK
from pallas_kernels.kept import kept_once

WIDEST = 128
FAINTEST = {TERMS: 1e-6, WHOLE: 1e-10}  # beta below it counts as it: the gradient of beta divides by beta


def unsupported(
    query,
    key,
    value,
    beta,
    log_decay=None,
    *,
    initial_state=None,
    segment_ids=None,
    scale=None,
    chunk=None,
    precision=None,
) -> str | None:
    """Why this call can't run on the kernel, with the nearest choice that can; or None."""
    width = max(key.shape[3], value.shape[3])
    if width > WIDEST and query.shape[1] > 1:
        return f'widths up to {WIDEST}, given {width}; use impl="xla"'
    if precision == 'highest' and log_decay is not None and log_decay.ndim == 4 and query.shape[1] > 1:
        return 'precision="highest" with a decay per channel needs more shared memory than there is; use impl="xla"'
    return linear.refuse(query, key, value, scale, chunk)


def schedule_of(query, key, value, beta, log_decay=None, *_, **__) -> str:
    """How a call that is not refused runs."""
    return linear.schedule_of(query, key, value)


def delta_rule(
    query,
    key,
    value,
    beta,
    log_decay=None,
    *,
    initial_state=None,
    segment_ids=None,
    scale=None,
    chunk=None,
    precision=None,
    interpret=False,
):
    """The (gated) delta rule.

    Args:
      query, key, value: [B, T, K, H], [B, T, K, H], [B, T, N, Hv], bfloat16 (T = 1: float16, float32 too), N a multiple of
        K, |key| <= 1.
      beta: [B, T, N] in [0, 2].
      log_decay: None, [N] or [B, T, N] (T = 1: [B, T, N, H] too), natural log.
      initial_state: [B, N, H, Hv] or None.
      segment_ids: integers [B, T] or None; the state is zero before a token whose id differs from the one before.
      scale: a Python number.
      chunk: None or 64.
      precision: None, or 'highest': results of 32 bits as good as float32 makes them, slower.

    Returns:
      out [B, T, N, Hv] bfloat16 and the last state [B, N, H, Hv] float32. First derivatives only.

    Raises:
      ValueError: `unsupported` has a reason.
    """
    if reason := unsupported(query, key, value, beta, log_decay, scale=scale, chunk=chunk, precision=precision):
        raise ValueError(f'delta_rule on mosaic_gpu: {reason}')
    scale = 1.0 if scale is None else float(scale)
    if query.shape[1] == 1:
        return decode.one_token((scale, interpret), query, key, value, beta, log_decay, initial_state)
    run = functools.partial(_delta_rule, (scale, WHOLE if precision == 'highest' else TERMS, interpret))
    if log_decay is not None and log_decay.ndim == 4:
        from pallas_kernels.delta_rule.per_channel import per_channel  # it stands on this module

        run = functools.partial(per_channel, (scale, interpret))
    run = run if segment_ids is None or interpret else functools.partial(apart.where_needed, run)
    return run(query, key, value, beta, log_decay, initial_state, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delta_rule(static, *args):
    return _run(static, False, *args)[0]


def _run(static, keep, q, k, v, beta, log_decay, initial_state, segment_ids):
    """The results; if asked to keep it, what the backward pass finds: what both sweeps take, the states that pieces start with
    and their transitions, u and the states of groups."""
    scale, terms, interpret = static
    cut, (q8, k8, v8), shared = _prepare(terms, interpret, (q, k, v), beta, log_decay, segment_ids)
    state, transitions = first_states(interpret, cut, k8, v8, shared, initial_state)
    write = functools.partial(sweeps.write, q8, k8, v8, *shared, state, scale=scale, interpret=interpret)
    if keep:
        (out, *u), states = write(every=between(terms, log_decay), both=True)
        kept = kept_once((shared, state, transitions, tuple(u), states))
    else:
        (out, states), kept = write(), None
    last = cut.join(states, 2)[:, :, -1, : k.shape[3], : v.shape[3]]
    return (cut.join(out)[:, : v.shape[1], :, : v.shape[3]], last), kept


def between(terms, log_decay):
    """Chunks between states that are kept: `felt` wants every one."""
    return decays.GROUP if terms == TERMS or log_decay is None else 1


def _prepare(terms, interpret, arrays, beta, log_decay, segment_ids):
    """The schedule, the arrays cut by it, and what both sweeps take: the strengths, the inverses and the decays."""
    decay = decays.cumulative(decays.steps(log_decay, segment_ids), beta.shape[1], log_decay)
    arrays = [linear.pad(x) for x in arrays]
    cut, strength, decay = schedule(beta, decay, arrays[1].shape[3], arrays[2].shape[3], FAINTEST[terms])
    q, k, *rest = map(cut.cut, arrays)
    inverse = inverses(k, strength, decay, terms=terms, interpret=interpret)
    return cut, (q, k, *rest), (strength, inverse, decay, sweeps.SHARED)


def schedule(beta, decay, K, V, faintest=FAINTEST[TERMS]):
    """How the sequence is cut; the strengths and the decays of the parts."""
    B, T, N = beta.shape
    cut = Pieces(T + -T % CHUNK, number(B, T, N, K, V))
    strength = jnp.stack(strengths(jnp.maximum(beta.astype(jnp.float32), faintest)), axis=2)
    strength = cut.cut(jnp.pad(strength, [(0, 0), (0, -T % CHUNK), (0, 0), (0, 0)]))
    strength = strength.reshape(-1, cut.size // CHUNK, CHUNK, 2, N)
    return cut, jnp.moveaxis(strength, (4, 3), (1, 3)), cut.cut_decay(decay, B)


def first_states(interpret, cut, k, v, shared, initial_state):
    """The state that each piece starts with, and the pieces' transitions: S -> transition S + what the piece writes."""
    state = None if initial_state is None else linear.pad_state(initial_state)
    if cut.count == 1:
        return state, None
    K, shape = k.shape[3], shared[0].shape[:2]
    write = functools.partial(sweeps.write, None, k, only_states=True, interpret=interpret)
    transitions = write(None, *shared, jnp.broadcast_to(jnp.eye(K), (*shape, K, K)))[1][:, :, 0]
    written = write(v, *shared, None)[1][:, :, 0]
    return chain(interpret, cut, transitions, written, state), transitions


def chain(interpret, cut, transitions, written, first, reverse=False):
    """first, then transition S + written from piece to piece: what each of them starts with."""
    transitions, written = (x.reshape(-1, cut.count, *x.shape[1:]) for x in (transitions, written))
    return chains.chain(transitions, written, first, reverse=reverse, interpret=interpret).reshape(-1, *written.shape[2:])


def _forward(static, *args):
    """The residuals are the arguments and what is kept; `()` for None marks a log_decay that wants its gradient."""
    wanted = any(x.perturbed for x in jax.tree.leaves(args[4], is_leaf=linear.is_primal))
    args = jax.tree.map(lambda x: x.value, args, is_leaf=linear.is_primal)
    results, kept = _run(static, True, *args)
    return results, (args, kept, () if wanted else None)


def _backward(static, saved, cotangents):
    (q, k, v, beta, log_decay, initial_state, segment_ids), (shared, state, transitions, u, states), wanted = saved
    scale, terms, interpret = static
    do, dlast = cotangents
    (_, T, heads, K), V = k.shape, v.shape[3]
    do = jnp.zeros(v.shape, v.dtype) if isinstance(do, SymbolicZero) else do
    arrays = q, k, v, do
    cut, (q8, k8, _, do8), _ = _prepare(terms, interpret, arrays, beta, log_decay, segment_ids)  # XLA: unused, not computed
    decay, turn = shared[2], lambda x: None if x is None else x.swapaxes(2, 3)
    dlast = None if isinstance(dlast, SymbolicZero) else linear.pad_state(dlast) / scale
    dstate = dlast
    if cut.count > 1:
        _, asked = sweeps.reach(q8, k8, do8, *shared, None, only_states=True, interpret=interpret)
        dstate = chain(interpret, cut, turn(transitions), asked[:, :, 0], dlast, reverse=True)
    w, dstates = sweeps.reach(q8, k8, do8, *shared, dstate, every=between(terms, log_decay), interpret=interpret)
    # dk_t = u_t D_t^T - w_t (exp(g_t) S_{t-1})^T, and D_t holds what q_t and later tokens ask for and later keys erase
    both = functools.partial(joint, dots=wanted is not None and terms == TERMS, scale=scale, interpret=interpret)
    u16, w16 = u[:TERMS], w[:TERMS]
    (dq, dk), reads = both(((do8,), w16), (u16,), (k8,), decay, turn(state), q8)
    (dk,), asks = both((u16,), ((do8,), w16), (q8, k8), decay, turn(dstate), base=dk, reverse=True)
    dq, dk = (linear.over_groups(cut.join(x)[:, :T, :, :K], heads) for x in (dq, dk))
    wide = lambda terms: sum(cut.join(x)[:, :T, :, :V].astype(jnp.float32) for x in terms)
    dv = wide(w) * scale
    dbeta = (wide(u) * dv).sum(-1) / jnp.maximum(beta.astype(jnp.float32), FAINTEST[terms]) ** 2
    dstate0 = None
    if initial_state is not None:
        dstate0 = (cut.join(dstates, 2)[:, :, 0, :K, :V] * scale).astype(initial_state.dtype)
    dlog_decay = None if log_decay is None else jnp.zeros_like(log_decay)
    if wanted is not None:
        if terms == WHOLE:
            each = felt(q8, k8, do8, u, w, decay, state, states, dstate, dstates)
            each = cut.join(each, 2)[..., :T] * scale
            each = jnp.where(decays.steps(log_decay, segment_ids) > decays.ERASE, jnp.moveaxis(each, 1, 2), 0)
        else:
            first = None if initial_state is None else linear.pad_state(initial_state)
            anchors = linear.anchors('bngkv,bngkv->bng', first, cut.join(states, 2), dlast, cut.join(dstates, 2))
            dots, ends = (cut.join(x, 3) for x in (reads, asks)), (anchors[:, :, :1], anchors[:, :, 1:, None])
            decay = decay if decay.shape[2] == 1 else cut.join(decay, 2)[:, :, : cdiv(T, CHUNK)]
            each = gradient(*dots, *ends, decay, T=T, scale=scale, interpret=interpret)
        each = each.sum((0, 1)) if log_decay.ndim == 1 else each
        dlog_decay = each.astype(log_decay.dtype)
    return dq, dk, dv.astype(v.dtype), dbeta.astype(beta.dtype), dlog_decay, dstate0, None


_delta_rule.defvjp(_forward, _backward, symbolic_zeros=True)
