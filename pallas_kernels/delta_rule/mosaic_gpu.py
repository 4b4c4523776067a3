"""Delta rule on Hopper, ungated or with a scalar decay: forward and backward from three sweeps.

    S' = exp(g_t) S_{t-1}        u_t = beta_t (v_t - k_t S')        S_t = S' + k_t^T u_t        o_t = scale q_t S_t

`write` finds u and o, `reach` finds w_t = beta_t k_t D_t from the adjoints D_t of S_t; given both, every gradient is a gated
linear sweep. `delta_rule` has the signature of `attnx.ops.delta_rule` without `impl`; `unsupported` says why a call can't run
here. README.md in this folder has the maths, the limits and what was measured.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.delta_rule import sweep as sweeps
from pallas_kernels.delta_rule.inverse import inverses
from pallas_kernels.gated_linear import mosaic_gpu as linear
from pallas_kernels.gated_linear.sweep import CHUNK

WIDEST = 128
FAINTEST = 1e-6  # beta below it counts as it: the gradient of beta divides by beta


def unsupported(
    query, key, value, beta, log_decay=None, *, initial_state=None, segment_ids=None, scale=None, chunk=None
) -> str | None:
    """Why this call can't run on the kernel, with the nearest choice that can; or None."""
    width = max(key.shape[3], value.shape[3])
    if width > WIDEST:
        return f'widths up to {WIDEST}, given {width}; use impl="xla"'
    return linear.refuse(query, key, value, log_decay, scale, chunk)


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
    interpret=False,
):
    """The (gated) delta rule.

    Args:
      query, key, value: [B, T, K, H], [B, T, K, H], [B, T, N, Hv], bfloat16, N a multiple of K, T >= 2, |key| <= 1.
      beta: [B, T, N] in [0, 2].
      log_decay: None, [N] or [B, T, N], natural log.
      initial_state: [B, N, H, Hv] or None.
      segment_ids: integers [B, T] or None; the state is zero before a token whose id differs from the one before.
      scale: a Python number.
      chunk: None or 64.

    Returns:
      out [B, T, N, Hv] bfloat16 and the last state [B, N, H, Hv] float32. First derivatives only.

    Raises:
      ValueError: `unsupported` has a reason.
    """
    if reason := unsupported(query, key, value, beta, log_decay, scale=scale, chunk=chunk):
        raise ValueError(f'delta_rule on mosaic_gpu: {reason}')
    scale = 1.0 if scale is None else float(scale)
    return _delta_rule((scale, interpret), query, key, value, beta, log_decay, initial_state, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delta_rule(static, q, k, v, beta, log_decay, initial_state, segment_ids):
    return _run(static, q, k, v, beta, log_decay, initial_state, segment_ids)[0]


def _run(static, q, k, v, beta, log_decay, initial_state, segment_ids, every=None):
    """Results; and for the backward pass u, states, and what the sweeps took."""
    scale, interpret = static
    T = v.shape[1]
    decay = linear.cumulative(linear.steps(log_decay, segment_ids), T)
    state = None if initial_state is None else linear.pad_state(initial_state)
    strength = jnp.pad(jnp.maximum(beta.astype(jnp.float32), FAINTEST), [(0, 0), (0, -T % CHUNK), (0, 0)])
    strength = strength.swapaxes(1, 2).reshape(v.shape[0], v.shape[2], -1, CHUNK)
    q8, k8, v8 = map(linear.pad, (q, k, v))
    inverse = inverses(k8, strength, decay, interpret=interpret)
    shared = strength, inverse, decay, state
    out, u, states = sweeps.write(q8, k8, v8, *shared, every=every, scale=scale, interpret=interpret)
    last = states[:, :, -1, : k.shape[3], : v.shape[3]]
    return (out[:, :T, :, : v.shape[3]], last), (u, states, shared)


def _forward(static, *args):
    """The residuals are the arguments and the output; `()` in place of None marks a log_decay that wants its gradient."""
    wanted = any(x.perturbed for x in jax.tree.leaves(args[4], is_leaf=linear.is_primal))
    args = jax.tree.map(lambda x: x.value, args, is_leaf=linear.is_primal)
    results = _delta_rule(static, *args)
    return results, (args, results[0], () if wanted else None)


def _backward(static, saved, cotangents):
    args, out, wanted = saved
    q, k, v, beta, log_decay, initial_state, segment_ids = args
    scale, interpret = static
    do, dlast = cotangents
    (_, T, heads, K), V = k.shape, v.shape[3]
    do = jnp.zeros(v.shape, v.dtype) if isinstance(do, SymbolicZero) else do
    every = linear.GROUP
    _, (u, states, (strength, inverse, decay, state)) = _run(static, *args, every=every)
    dstate = None if isinstance(dlast, SymbolicZero) else linear.pad_state(dlast) / scale
    q8, k8, do8 = map(linear.pad, (q, k, do))
    w, dstates = sweeps.reach(q8, k8, do8, strength, inverse, decay, dstate, every=every, interpret=interpret)
    turn = lambda x: None if x is None else x.swapaxes(2, 3)
    sweep = functools.partial(linear.run, scale=scale, interpret=interpret)
    dq = sweep(do8, u, k8, decay, turn(state))[0]
    # dk_t = u_t D_t^T - w_t (exp(g_t) S_{t-1})^T, and D_t holds what q_t and later tokens ask for and later keys erase
    asked = sweep(u, do8, q8, decay, turn(dstate), reverse=True)[0]
    erased = sweep(u, w, k8, decay, None, reverse=True, strict=True)[0]
    read = sweep(w, u, k8, decay, turn(state), strict=True)[0]
    wide = lambda x: x.astype(jnp.float32)
    dk = (wide(asked) - wide(erased) - wide(read)).astype(k.dtype)
    dq, dk = (linear.over_groups(x[:, :T, :, :K], heads) for x in (dq, dk))
    u, w = wide(u)[:, :T, :, :V], wide(w)[:, :T, :, :V] * scale
    dbeta = (u * w).sum(-1) / jnp.maximum(wide(beta), FAINTEST) ** 2
    dstate0 = None
    if initial_state is not None:
        dstate0 = (dstates[:, :, 0, :K, :V] * scale).astype(initial_state.dtype)
    dlog_decay = None if log_decay is None else jnp.zeros_like(log_decay)
    if wanted is not None:
        last = jnp.zeros(states.shape[:2]) if dstate is None else (states[:, :, -1] * dstate).sum((2, 3))
        between = jnp.einsum('bngkv,bngkv->bng', states[:, :, :-1], dstates[:, :, 1:], precision='highest')
        anchors = jnp.concatenate([between, last[:, :, None]], axis=-1) * scale
        each = jnp.moveaxis((wide(out) * wide(do)).sum(-1) - (w * wide(v)).sum(-1), 2, 1)
        step = linear.steps(log_decay, segment_ids)
        each = linear.decay_gradient(each, anchors, step)
        each = jnp.where(jnp.moveaxis(step, 2, 1) > linear.ERASE, each, 0)
        each = each.sum((0, 2)) if log_decay.ndim == 1 else jnp.moveaxis(each, 1, 2)
        dlog_decay = each.astype(log_decay.dtype)
    return dq, dk, w.astype(v.dtype), dbeta.astype(beta.dtype), dlog_decay, dstate0, None


_delta_rule.defvjp(_forward, _backward, symbolic_zeros=True)
