"""Gated linear recurrence on Hopper: forward and backward from `twin`, or `sweep` where widths differ or exceed 128.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t        o_t = scale q_t S_t

Each gradient is the same recurrence with its arrays in other roles: dq = sweep(do, v, k) forward in time; dv = sweep(k, q, do)
and dk = sweep(v, do, q) backward in time. `gated_linear` has the signature of `attnx.ops.gated_linear` without `impl`;
`unsupported` says why a call can't run here. README.md in this folder has the maths, the limits and what was measured.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import apart
from pallas_kernels.gated_linear import decays, decode
from pallas_kernels.gated_linear.felt import felt
from pallas_kernels.gated_linear.log_decay import gradient
from pallas_kernels.gated_linear.pieces import Pieces, begin, number, run, run_twin
from pallas_kernels.gated_linear.sweep import CHUNK
from pallas_kernels.gated_linear.twin import takes
from pallas_kernels.kept import kept

WIDEST = 256


def unsupported(
    query, key, value, log_decay=None, *, initial_state=None, segment_ids=None, scale=None, chunk=None, precision=None
) -> str | None:
    """Why this call can't run on the kernel, with the nearest choice that can; or None."""
    if precision == 'highest' and log_decay is not None and log_decay.ndim == 4 and query.shape[1] > 1:
        return 'precision="highest" with a decay per channel has no kernel; use impl="xla"'
    return refuse(query, key, value, scale, chunk)


def padded(width: int) -> int:
    """As wide as it is in memory."""
    return width + -width % CHUNK


def refuse(query, key, value, scale, chunk) -> str | None:
    """The reasons that the recurrent kernels share."""
    (_, T, heads, K), (N, V) = query.shape, value.shape[2:]
    dtypes = sorted({str(jnp.result_type(x)) for x in (query, key, value)})
    if T == 1:
        if not set(dtypes) <= {'bfloat16', 'float16', 'float32'}:
            return f'query, key and value must be bfloat16, float16 or float32, given {", ".join(dtypes)}; use impl="xla"'
    elif dtypes != ['bfloat16']:
        return f'query, key and value must be bfloat16, given {", ".join(dtypes)}; cast, or use impl="xla"'
    if N % heads:
        return f'{N} heads of value are no multiple of the {heads} heads of query and key'
    if max(K, V) > WIDEST:
        return f'widths up to {WIDEST}, given {max(K, V)}; use impl="xla"'
    if chunk not in (None, CHUNK):
        return f'it works in chunks of {CHUNK}, given chunk={chunk}; leave it out, or use impl="xla"'
    if scale is not None and (isinstance(scale, jax.Array) or not float(scale)):
        return 'scale must be a Python number other than 0; multiply the query instead'
    return hardware()


def schedule_of(query, key, value, log_decay=None, *_, **__) -> str:
    """How a call that is not refused runs."""
    (B, T, N, V), K = value.shape, key.shape[3]
    if T == 1:
        return 'one token: each state is read and written once'
    count = Pieces(T, number(B, T, N, padded(K), padded(V))).count
    return (
        f'{count} pieces of the sequence side by side, in chunks of {CHUNK}' if count > 1 else f'chunk after chunk of {CHUNK}'
    )


def hardware() -> str | None:
    try:
        device = jax.devices('cuda')[0]
    except RuntimeError:
        return None  # nothing to say about a machine that is not here: lowering for one is fine
    capability = str(getattr(device, 'compute_capability', '9.0'))
    return None if capability == '9.0' else f'it needs compute capability 9.0 (Hopper), this GPU has {capability}'


def gated_linear(
    query,
    key,
    value,
    log_decay=None,
    *,
    initial_state=None,
    segment_ids=None,
    scale=None,
    chunk=None,
    precision=None,
    interpret=False,
):
    """Linear attention with decay.

    Args:
      query, key, value: [B, T, K, H], [B, T, K, H], [B, T, N, Hv], bfloat16 (T = 1: float16, float32 too), N a multiple of K.
      log_decay: None, [N], [B, T, N] or [B, T, N, H], natural log.
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
    if reason := unsupported(query, key, value, log_decay, scale=scale, chunk=chunk, precision=precision):
        raise ValueError(f'gated_linear on mosaic_gpu: {reason}')
    scale = 1.0 if scale is None else float(scale)
    if query.shape[1] == 1:
        return decode.one_token((scale, interpret), query, key, value, None, log_decay, initial_state)
    run, static = _gated_linear, (scale, precision == 'highest', interpret)
    if log_decay is not None and log_decay.ndim == 4:
        from pallas_kernels.gated_linear.per_channel import per_channel  # it stands on this module

        run, static = per_channel, (scale, interpret)
    if segment_ids is None or interpret:
        return run(static, query, key, value, log_decay, initial_state, segment_ids)
    run = functools.partial(_without_beta, run, static)
    return apart.where_needed(run, query, key, value, None, log_decay, initial_state, segment_ids)


def _without_beta(run, static, query, key, value, beta, *rest):
    return run(static, query, key, value, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated_linear(static, *args):
    return _run(static, *args)[0]


def _run(static, q, k, v, log_decay, initial_state, segment_ids):
    """The results, and what the backward pass finds: the decays as the sweeps take them, and what pieces start with."""
    scale, exact, interpret = static
    decay = decays.cumulative(decays.steps(log_decay, segment_ids), q.shape[1], log_decay)
    state = None if initial_state is None else pad_state(initial_state)
    q8, k8, v8 = map(pad, (q, k, v))
    shared, begun = {'exact': exact, 'interpret': interpret}, None
    if takes(k8.shape[3], v8.shape[3]):
        begun = begin(k8, v8, decay, state, v8.shape[2], reverse=False, **shared)
        out, _, states, _, _ = run_twin(q8, k8, v8, decay, state, begun=begun, both=False, scale=scale, **shared)
    else:
        out, states, _ = run(q8, k8, v8, decay, state, scale=scale, **shared)
    out, last = out[:, : q.shape[1], :, : v.shape[3]], states[:, :, -1, : k.shape[3], : v.shape[3]]
    return (out, last), (decay, begun)


def _forward(static, *args):
    """The residuals are the arguments and what was found; `()` in place of None marks a log_decay that wants its gradient."""
    q, k, v, log_decay, initial_state, segment_ids = jax.tree.map(lambda x: x.value, args, is_leaf=is_primal)
    wanted = any(x.perturbed for x in jax.tree.leaves(args[3], is_leaf=is_primal))
    results, found = _run(static, q, k, v, log_decay, initial_state, segment_ids)
    return results, (q, k, v, log_decay, initial_state, segment_ids, kept(found), () if wanted else None)


def is_primal(x) -> bool:
    return hasattr(x, 'perturbed')


def _backward(static, saved, cotangents):
    q, k, v, log_decay, initial_state, segment_ids, (decay, begun), wanted = saved
    scale, exact, interpret = static
    do, dlast = cotangents
    T, (K, V) = q.shape[1], (k.shape[3], v.shape[3])
    do = jnp.zeros(v.shape, v.dtype) if isinstance(do, SymbolicZero) else do
    state = None if initial_state is None else pad_state(initial_state).swapaxes(2, 3)
    dstate = None if isinstance(dlast, SymbolicZero) else pad_state(dlast) / scale
    q8, k8, v8, do8 = map(pad, (q, k, v, do))
    grouped = wanted is not None
    transposed, first, met = None if dstate is None else dstate.swapaxes(2, 3), None, None
    begun = jax.tree.map(lambda x: x.swapaxes(2, 3), begun)
    if exact:
        options = {'grouped': grouped, 'exact': True, 'scale': scale, 'interpret': interpret}
        (dq, dk, dv), states, dstates = plain_sweeps(q8, k8, v8, do8, decay, state, transposed, begun=begun, **options)
    elif takes(k8.shape[3], v8.shape[3]):
        of = functools.partial(run_twin, grouped=grouped, scale=scale, interpret=interpret)
        partner = q8 if grouped else None
        dq, _, states, _, reads = of(do8, v8, k8, decay, state, partner, begun=begun, both=False, last=False)
        against, started = states if grouped else None, initial_state is not None
        dk, dv, dstates, met, writes = of(v8, do8, q8, decay, transposed, k8, against, reverse=True, last=started)
        if grouped:
            first = None if state is None else (state * dstates[:, :, 0]).sum(2)
            met = met.reshape(*met.shape[:3], -1)
        dstates = dstates.swapaxes(3, 4) if started or grouped else None
    else:
        sweep_ = functools.partial(run, scale=scale, precise=grouped, interpret=interpret)
        dq, states, reads = sweep_(do8, v8, k8, decay, state, q8 if grouped else None, grouped=grouped)
        of_values = functools.partial(sweep_, k8, q8, do8, decay, dstate, v8 if grouped else None, reverse=True)
        of_keys = functools.partial(run, v8, do8, q8, decay, transposed, reverse=True, scale=scale, interpret=interpret)
        back = functools.partial(backward_in_time, of_values, of_keys, state, states, dstate)
        dv, dstates, writes, dk, ends = back('bng' if grouped else None)
        first, met = (ends[:, :, :1], ends[:, :, 1:, None]) if grouped else (None, None)
    dq, dk = (over_groups(x[:, :T, :, :K], q.shape[2]) for x in (dq, dk))
    dstate0 = None
    if initial_state is not None:
        dstate0 = (dstates[:, :, 0, :K, :V] * scale).astype(initial_state.dtype)
    dlog_decay = None
    if log_decay is not None:
        dlog_decay = jnp.zeros_like(log_decay)
    if grouped:
        if exact:  # by states transposed
            each = felt(do8, v8, q8, k8, None, decay, state, states, transposed, dstates.swapaxes(3, 4))[..., :T] * scale
            each = jnp.where(decays.steps(log_decay, segment_ids) > decays.ERASE, jnp.moveaxis(each, 1, 2), 0)
        else:
            each = gradient(reads, writes, first, met, decay, T=T, scale=scale, interpret=interpret)
        each = each.sum((0, 1)) if log_decay.ndim == 1 else each
        dlog_decay = each.astype(log_decay.dtype)
    return dq, dk, dv[:, :T, :, :V], dlog_decay, dstate0, None


_gated_linear.defvjp(_forward, _backward, symbolic_zeros=True)


def plain_sweeps(q, k, v, do, decay, state, dstate, *, grouped, begun=None, **options):
    """The gradients by sweeps without dots.

    state, dstate: transposed, [B, N, V, K], before the first token and after the last, or None for zero.
    begun: transposed, what `begin` found; None: it is found here.

    Returns:
      (dq, dk, dv), the states after every chunk, [B, N, chunks, V, K], and their adjoints before it, [B, N, chunks, K, V], of
      the last chunk only if not `grouped`.
    """
    every = functools.partial(run_twin if takes(k.shape[3], v.shape[3]) else run, decay=decay, grouped=grouped, **options)
    if takes(k.shape[3], v.shape[3]):
        dq, _, states, *_ = every(do, v, k, state=state, begun=begun, both=False)
        dk, dv, dstates, *_ = every(v, do, q, state=dstate, partner=k, reverse=True)
    else:
        dq, states, _ = every(do, v, k, state=state)
        dk, dstates, _ = every(v, do, q, state=dstate, reverse=True)
        turned = None if dstate is None else dstate.swapaxes(2, 3)
        dv, *_ = run(k, q, do, decay, turned, reverse=True, **options)
    chunks = k.shape[1] // CHUNK  # pieces may have more
    return (dq, dk, dv), states[:, :, :chunks], dstates[:, :, :chunks].swapaxes(3, 4)


def anchors(spec: str, state, states, dstate, dstates):
    """<S, dS> where groups of chunks meet, both ends included, by einsum's `spec`: the gradient of the log-decay there.

    state, dstate: [B, N, x, y], before the first group and after the last, or None for zero. states, dstates: [B, N, groups,
    x, y], after each group and before it.
    """
    whole = lambda x, like: jnp.zeros_like(like[:, :, :1]) if x is None else x[:, :, None]
    states = jnp.concatenate([whole(state, states), states], axis=2)
    dstates = jnp.concatenate([dstates, whole(dstate, dstates)], axis=2)
    return jnp.einsum(spec, states, dstates, precision='highest')


def backward_in_time(of_values, of_keys, state, states, dstate, felt):
    """The two sweeps backward in time, and <S, dS> where groups of chunks meet, both ends included.

    Args:
      of_values, of_keys: `run` of dv and of dk, of all but `grouped` and `against`.
      state, states: transposed, [B, N, V, K] before the first group or None for zero, [B, N, groups, V, K] after each.
      dstate: [B, N, K, V] after the last, or None for zero.
      felt: einsum's letters of <S, dS>, of bngk; None: it is not wanted.

    Returns:
      dv, the states and the dots of its sweep, dk, <S, dS>.
    """
    if felt is None:
        return *of_values(), of_keys()[0], None
    dk, met, _ = of_keys(grouped=True, against=states)
    dv, dstates, writes = of_values()
    first = jnp.zeros_like(dstates) if state is None else state.swapaxes(2, 3)[:, :, None] * dstates
    ends = jnp.einsum(f'bngkv->{felt}', first), jnp.einsum(f'bngvk->{felt}', met)
    return dv, dstates, writes, dk, jnp.concatenate(ends, axis=felt.index('g'))


# Layout ------------------------------------------------------------------------------------------------------------------


def pad(x):
    """Lengths to whole chunks, widths to a multiple of 64: what the copy engine takes. Zero columns change nothing."""
    length, width = -x.shape[1] % CHUNK, -x.shape[3] % 64
    return jnp.pad(x, [(0, 0), (0, length), (0, 0), (0, width)]) if length or width else x


def pad_state(x):
    rows, cols = -x.shape[2] % 64, -x.shape[3] % 64
    return jnp.pad(x.astype(jnp.float32), [(0, 0), (0, 0), (0, rows), (0, cols)])


def over_groups(x, heads: int):
    """Gradients of heads that were shared: [B, T, N, H] -> [B, T, heads, H]."""
    B, T, N, H = x.shape
    return x if heads == N else x.reshape(B, T, heads, N // heads, H).sum(3, dtype=jnp.float32).astype(x.dtype)
