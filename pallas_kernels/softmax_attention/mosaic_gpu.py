"""Softmax attention on Hopper: any elementwise mask and score inside one fused kernel, forward and backward.

    o = softmax(score(scale * q k^T + bias), masked) v

`softmax_attention` has the signature of `attnx.ops.softmax_attention` without `impl`; `unsupported` says why a call
can't run here. README.md in this folder has the maths, the limits and what was measured.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import blocks, common, statistics, tile_eval
from pallas_kernels import elementwise as ew
from pallas_kernels.kept import kept_once
from pallas_kernels.softmax_attention import backward as backward_kernel
from pallas_kernels.softmax_attention import diagonal, functions, operand_gradients, tables, tiles, wide
from pallas_kernels.softmax_attention import forward as forward_kernel
from pallas_kernels.softmax_attention import schedule as plan
from pallas_kernels.softmax_attention.backward import HIDDEN, PADDING

WIDEST = 256


def unsupported(
    query,
    key,
    value,
    *,
    mask=None,
    score=None,
    bias=None,
    scale=None,
    sinks=None,
    dropout=None,
    return_lse=False,
    return_stats=False,
    seen=None,
) -> str | None:
    """Why this call, or with `seen` its backward pass, can't run on the kernel, with the nearest choice that can; or None."""
    dtypes = {str(jnp.result_type(x)) for x in (query, key, value)}
    if len(dtypes) > 1:
        return f'query, key and value differ in dtype ({", ".join(sorted(dtypes))}); cast them to one'
    if dtypes & {'bfloat16', 'float16'} != dtypes:
        return f'it takes bfloat16 and float16, given {dtypes.pop()}; cast, or use impl="xla"'
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        return 'query, key and value must be [B, T, N, H], [B, S, K, H], [B, S, K, Hv]'
    (B, T, N, H), (S, K), Hv = query.shape, key.shape[1:3], value.shape[3]
    if N % K:
        return f'{N} query heads are no multiple of {K} key heads'
    if max(H, Hv) > WIDEST:
        return f'head widths up to {WIDEST} fit, given {max(H, Hv)}; use impl="xla"'
    if min(B, T, S, H, Hv) < 1:
        return 'an empty dimension; use impl="xla"'
    reason = _hardware()
    if reason:
        return reason
    for name, f in (('mask', ew.as_mask(mask)), ('score', _with_bias(score, bias))):
        reason = f and _refuse(name, f, T, S)
        if reason:
            return reason
    return None


def _hardware() -> str | None:
    try:
        device = jax.devices('cuda')[0]
    except RuntimeError:
        return None  # nothing to say about a machine that is not here: lowering for one is fine
    capability = str(getattr(device, 'compute_capability', '9.0'))
    return None if capability == '9.0' else f'it needs compute capability 9.0 (Hopper), this GPU has {capability}'


def _refuse(name, f, T, S) -> str | None:
    operands, call = ew.flatten(f)
    for o in operands:
        dtype = jnp.result_type(o.array)
        if dtype.itemsize > 4 or not any(jnp.issubdtype(dtype, t) for t in (jnp.bool_, jnp.integer, jnp.floating)):
            return f'{name}: an operand has dtype {dtype}; kernels take up to 32 bits, real'
        if dtype.itemsize == 1 and dtype not in (jnp.bool_, jnp.int8, jnp.uint8):
            return f'{name}: an operand has dtype {dtype}; kernels take bool, int8, uint8, 16 and 32 bits'
    index = [jax.ShapeDtypeStruct((), jnp.int32)] * 4
    values = [jax.ShapeDtypeStruct((), jnp.result_type(o.array)) for o in operands]
    place = lambda i: ew.Index(*i, T, S)
    try:
        if isinstance(f, ew.Mask):
            jaxpr = jax.make_jaxpr(lambda i, v: call(place(i), v))(index, values)
        else:
            derivative = lambda s, i, v: jax.jvp(lambda s: call(s, place(i), v), (s,), (jnp.float32(1),))
            jaxpr = jax.make_jaxpr(derivative)(jax.ShapeDtypeStruct((), jnp.float32), index, values)
    except Exception as error:
        return f'{name}: tracing its function on scalars failed: {type(error).__name__}: {error}'
    reason = tile_eval.refusal(jaxpr)
    return f'{name}: {reason}; use impl="xla"' if reason else None


def _with_bias(score, bias):
    score = ew.as_score(score)
    if bias is None:
        return score
    letters, shape = '', []
    for c, n in zip('bhqk'[-bias.ndim :], bias.shape):
        if n > 1:
            letters, shape = letters + c, shape + [n]
    term = ew.Score((ew.Term(_add, (ew.Operand(jnp.reshape(bias, shape), letters),)),))
    return term if score is None else term >> score


def _add(s, i, value):
    return s + value.astype(s.dtype)


def softmax_attention(
    query,
    key,
    value,
    *,
    mask=None,
    score=None,
    bias=None,
    scale=None,
    sinks=None,
    dropout=None,
    return_lse=False,
    return_stats=False,
):
    """Softmax attention.

    Args:
      query, key, value: [B, T, N, H], [B, S, K, H], [B, S, K, Hv], bfloat16 or float16, N a multiple of K.
      mask, score: see `pallas_kernels.elementwise`.
      bias: floating, broadcastable to [B, N, T, S], added to the scaled logits before the score.
      scale: multiplies the logits; 1/sqrt(H) by default.
      sinks: [N] logits of a key without value that every query sees.
      dropout: `pallas_kernels.dropout.Dropout`.
      return_lse: also return the log-sum-exp of the logits, float32 [B, N, T].
      return_stats: also return `statistics.Statistics`, last: True, or the names of those that are wanted.

    Raises:
      ValueError: `unsupported` has a reason.
    """
    reason = unsupported(query, key, value, mask=mask, score=score, bias=bias, scale=scale, sinks=sinks, dropout=dropout)
    if reason:
        raise ValueError(f'softmax_attention on mosaic_gpu: {reason}')
    _, query, scale = positive(query, scale)
    mask, score, dropout = ew.as_mask(mask), _with_bias(score, bias), _seeded(dropout)
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    stats = statistics.asked(return_stats)
    out, lse, rows = _attention(scale, stats, query, key, value, mask, score, sinks, dropout)
    results = [out, *([lse] if return_lse else [])]
    if stats:
        results.append(statistics.of_rows(stats, lse, *rows, sinks))
    return tuple(results) if len(results) > 1 else out


def softmax_attention_backward(query, key, value, *, seen, mask=None, score=None, scale=None, dropout=None):
    """(dq, dk, dv, dscore) of `softmax_attention` over these keys, given what it returns over these keys and others.

    Args:
      seen: out [B, T, N, Hv] and lse [B, N, T] over all keys, and their cotangents; weights are exp(logit - lse).
      The rest as there; no sinks.
    """
    out, lse, dout, dlse = seen
    sign, query, scale = positive(query, scale)
    options = ew.as_mask(mask), ew.as_score(score), None, _seeded(dropout)
    saved = query, key, value, *options, out, lse * common.LOG2E
    dq, dk, dv, _, dscore, *_ = _backward(scale, False, saved, (dout.astype(value.dtype), dlse, None))
    return dq if sign == 1 else sign * dq, dk, dv, dscore


def positive(query, scale):
    """(sign, sign * query, scale > 0), by default 1 / sqrt(H): the kernels' running maximum wants a positive scale."""
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    sign = int(np.sign(scale))
    return sign, query if sign == 1 else sign * query, abs(scale) or 1.0


def _seeded(dropout):
    if dropout is not None and isinstance(dropout.seed, int):
        return dataclasses.replace(dropout, seed=np.uint32(dropout.seed & 0xFFFFFFFF))
    return dropout


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(scale, stats, q, k, v, mask, score, sinks, dropout):
    return _forward(scale, stats, q, k, v, mask, score, sinks, dropout)[0]


def _forward(scale, stats, q, k, v, mask, score, sinks, dropout):
    (B, T, N, H), (S, K), Hv = q.shape, k.shape[1:3], v.shape[3]
    q8, k8, v8 = _pad(q), _pad(k), _pad(v)
    widths = q8.shape[3], v8.shape[3]
    shape = tiles.forward(tiles.Call(B, T, S, N, K, *widths, mask is not None, functions.special(score)))
    bq, bk = 64 * shape.consumers, shape.keys
    nq, nk = common.cdiv(T, bq), common.cdiv(S, bk)
    spec = functions.make_spec(mask, score, dropout, T, S, bool(S % bk))
    classes, names = _classes(mask, B, N, T, S, bq, bk)
    if not isinstance(classes, np.ndarray):
        lists, *todo = tables.forward(classes, names, B, N, plan.processors())
    else:
        lists, cost, reach = None, np.full((1, 1, nq), nk), nk
        if spec.mask:
            lists = plan.forward_lists(classes, names)
            cost = lists[..., 0] + plan.MASK_COST * lists[..., 1]
            reach = max(1, lists[..., 0].max())
        # Keys and values that the heads at work visit: 16 MiB, so that they stay in the L2 cache.
        together = max(1, int(2**24 // (2 * reach * bk * (H + Hv)))) * (N // K)
        todo = plan.agenda(B, N, nq, cost + plan.ITEM_COST, together, plan.processors())
    operands = [functions.prepare(o, T, S, nq * bq, nk * bk, False) for o in spec.operands]
    run = functools.partial(forward_kernel.forward, spec=spec, tiles=shape, scale=scale, stats=stats)
    out, *rows = run(q8, k8, v8, *todo, lists, operands, sinks)
    out, (lse2, *rows) = kept_once((out[:, :T, :, :Hv], [x if x is None else x[..., :T] for x in rows]))
    rows = [x if x is None else x * common.LN2 for x in rows]
    return (out, lse2 * common.LN2, rows), (q, k, v, mask, score, sinks, dropout, out, lse2)


def _backward(scale, _, saved, cotangents):
    q, k, v, mask, score, sinks, dropout, out, lse2 = saved
    do, dlse, _ = cotangents
    H = q.shape[3]
    S, K, Hv = k.shape[1], k.shape[2], v.shape[3]
    # A row that sees nothing, or whose output and lse have no cotangent, adds nothing, were it NaN; one whose output,
    # lse or cotangent is not finite makes all it sees NaN.
    live = ((do != 0).any(-1).swapaxes(1, 2) | (dlse != 0)) & (lse2 != -jnp.inf)
    delta = (out.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1).swapaxes(1, 2) - dlse
    finite = jnp.isfinite(delta)
    base = jnp.where(live, jnp.where(finite, lse2, jnp.nan), HIDDEN)
    delta = jnp.where(live & finite, delta, 0.0)
    sweep = _wide if max(H, Hv) > 128 else _fused
    dq, dk, dv = sweep(scale, q, k, v, do, base, delta, mask, score, dropout)
    dk, dv = _over_groups(dk[:, :S, :, :H], K), _over_groups(dv[:, :S, :, :Hv], K)
    dsinks = None
    if sinks is not None:
        weight = jnp.where(live, jnp.exp2(sinks[:, None] * common.LOG2E - base), 0.0)
        dsinks = -(weight * delta).sum((0, 2))
    dscore = None
    if score is not None:
        dscore = _score_gradient(scale, q, k, v, do, base, delta, mask, score, dropout)
    return dq.astype(q.dtype), dk, dv, None, dscore, dsinks, None


_attention.defvjp(_forward, _backward)


def _classes(mask, B, N, T, S, bq, bk):
    """`schedule.packed` of parts of 64 x 64: where they depend on data, XLA makes them once for both passes."""
    return plan.packed(blocks.classify(mask, B, N, T, S, 64, 64), bq // 64, bk // 64)


def _fused(scale, q, k, v, do, base, delta, mask, score, dropout):
    """dq, and dk and dv for each query head, padded, by the fused kernel."""
    (B, T, N, H), S, Hv = q.shape, k.shape[1], v.shape[3]
    least = 128 if max(H, Hv) > 64 else 64  # it has one width for q and k of at least v's class
    q8, k8, v8, do8 = _pad(q, least), _pad(k, least), _pad(v), _pad(do)
    shape = tiles.backward(q8.shape[3], v8.shape[3])
    bq, bk = shape.queries, backward_kernel.KEYS
    nq, nk = common.cdiv(T, bq), common.cdiv(S, bk)
    spec = functions.make_spec(mask, score, dropout, T, S, bool(S % bk))
    fit = lambda x, fill: jnp.pad(x, [(0, 0), (0, 0), (0, nq * bq - T)], constant_values=fill)
    classes, _ = _classes(mask, B, N, T, S, bq, bk)
    owners = plan.divided(classes)
    if not isinstance(classes, np.ndarray):
        lists, ranks, totals = tables.backward(classes, plan.processors())
    else:
        lists, ranks, totals = plan.schedule(classes, owners)
    tail = plan.in_turn(lists, B * N, plan.TAIL)
    if tail is not None:
        ranks = np.concatenate([ranks, tail[None]], 1)
    tail = 0 if tail is None else len(tail)
    operands = [functions.prepare(o, T, S, nq * bq, nk * bk, True) for o in spec.operands]
    # So late that the blocks of a head have most likely ended: as many started as run at a time, twice.
    late = min(B * N, max(tail, common.cdiv(2 * plan.processors(), len(owners)) + 1))
    parts = int(owners[:, 3].max()) + 1
    kernel = functools.partial(backward_kernel.backward, tiles=shape, scale=scale, parts=parts, late=late, tail=tail)
    unit = -1 / (scale * common.LOG2E)
    arrays = q8, k8, v8, do8, fit(base * unit, PADDING * unit), fit(-delta, 0.0)
    dq, dk, dv, *parts = _over_batches(kernel, spec)(arrays, (lists, ranks, totals), operands)
    if parts:
        dk, dv = (plan.joined(x, part, owners) for x, part in zip((dk, dv), parts))
    return dq[:, :T, :, :H], dk, dv


def _over_batches(kernel, spec):
    """The backward kernel, under `jax.vmap` with a larger batch: members would share the counters that order dq."""

    @jax.custom_batching.custom_vmap
    def run(arrays, metadata, operands):
        # XLA would put slices of a loop's arrays and the kernel into one fusion, in which the counters that the kernel
        # is to find at 0 are another buffer than the one that was set to 0.
        args = lax.optimization_barrier((*arrays, *metadata, operands))
        return lax.optimization_barrier(kernel(*args, spec=spec))

    @run.def_vmap
    def rule(size, batched, arrays, metadata, operands):
        B = arrays[0].shape[1 if batched[0][0] else 0]
        rows = lambda x, own: functions.fold_rows(x if own else x[None], True, size, B)
        arrays = tuple(map(rows, arrays, batched[0]))
        metadata = tuple(functions.fold_rows(x, own, size, B) for x, own in zip(metadata, batched[1]))
        larger, operands = functions.fold(spec, operands, batched[2], size, B)
        found = _over_batches(kernel, larger)(arrays, metadata, operands)
        return tuple(x.reshape(size, B, *x.shape[1:]) for x in found), (True,) * len(found)

    return run


def _wide(scale, q, k, v, do, base, delta, mask, score, dropout):
    """As `_fused`, by one sweep a gradient."""
    (B, T, N, H), S = q.shape, k.shape[1]
    own, other = wide.OWN, wide.STREAMED
    Tp, Sp = (common.cdiv(n, own) * own for n in (T, S))
    fit = lambda x, fill: jnp.pad(x, [(0, 0), (0, 0), (0, Tp - T)], constant_values=fill)
    rows = fit(base, PADDING), fit(delta, 0.0)
    marked = lambda tiles: jnp.concatenate([tiles.any(-1, keepdims=True), tiles], -1).astype(jnp.int32)
    # Apart: as one loop of XLA's, with a thread a head, they took 100 us at T = 8192.
    unclean = marked(lax.optimization_barrier((~(rows[0] < HIDDEN / 2)).reshape(B, N, -1, other).any(-1)))
    found = {}
    for which in ('dv', 'dk', 'dq'):  # that of dk says which keys and values hold what is not finite
        by_key = which != 'dq'
        spec = functions.make_spec(mask, score, dropout, T, S, bool(S % (own if by_key else other)))
        classes = blocks.classify(mask, B, N, T, S, *((other, own) if by_key else (own, other)))
        classes = classes.swapaxes(-1, -2) if by_key else classes
        lists = (plan if isinstance(classes, np.ndarray) else tables).forward_lists(classes)
        operands = [functions.prepare(o, T, S, Tp, Sp, by_key) for o in spec.operands]
        # As many heads at a time as leave what they stream in the L2 cache.
        bytes_ = 2 * (T if by_key else S) * (H + v.shape[3])
        together = max(1, 2**24 // bytes_) * (1 if by_key else N // k.shape[2])
        order = plan.longest_first(lists[..., 0], B, N, together)
        run = functools.partial(wide.sweep, which, spec=spec, scale=scale)
        found[which], keys = run(*map(_pad, (q, k, v, do)), *rows, unclean, lists, order, operands)
        unclean = unclean if keys is None else marked(keys > 0)
    return found['dq'][:, :T, :, :H], found['dk'], found['dv']


def _score_gradient(scale, q, k, v, do, base, delta, mask, score, dropout):
    """The gradient of `score`: the same pytree, None for what is not floating. XLA drops what is not asked for."""
    leaves, tree = jax.tree.flatten(score)
    operands = ew.flatten(score)[0]
    assert len(leaves) == len(operands)
    floating = [n for n, x in enumerate(leaves) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    strips = [n for n in floating if set(operands[n].index) in ({'d'}, {'h', 'd'})]
    rest = [n for n in floating if n not in strips]
    found = [None] * len(leaves)
    (B, T, N, _), S = q.shape, k.shape[1]
    if strips:
        nq, nk = common.cdiv(T, diagonal.QUERIES), common.cdiv(S, diagonal.KEYS)
        classes = blocks.classify(mask, B, N, T, S, diagonal.QUERIES, diagonal.KEYS)
        xp = np if isinstance(classes, np.ndarray) else jnp
        todo = diagonal.lists(xp.broadcast_to(classes, (B, *classes.shape[1:])))
        spec = functions.make_spec(mask, score, dropout, T, S, bool(S % diagonal.KEYS))
        Tp, Sp = nq * diagonal.QUERIES, nk * diagonal.KEYS
        arrays = [functions.prepare(o, T, S, Tp, Sp, False) for o in spec.operands]
        fit = lambda x, fill: jnp.pad(x[..., :T], [(0, 0), (0, 0), (0, Tp - T)], constant_values=fill)
        rows = fit(base, HIDDEN), fit(delta, 0.0)
        for n in strips:
            tiles_ = diagonal.diagonal(*map(_pad, (q, k, v, do)), *rows, todo, arrays, spec=spec, which=n, scale=scale)
            x = diagonal.strip(tiles_, T, S)  # [N, d]
            index, shape = operands[n].index, leaves[n].shape
            if 'h' not in index or shape[index.index('h')] == 1:
                x = x.sum(0, keepdims='h' in index)
            found[n] = (x.T if index == 'dh' else x).astype(leaves[n].dtype)
    if rest:
        gradients = operand_gradients.of_score(scale, q, k, v, do, base, delta, mask, score, dropout, rest)
        for n, x in zip(rest, gradients):
            found[n] = x
    return jax.tree.unflatten(tree, found)


def _pad(x, least=64):
    """Lengths to a multiple of 8, widths to one of 64: what the copy engine takes. Zero columns change nothing."""
    length, width = -x.shape[1] % 8, max(least - x.shape[3], -x.shape[3] % 64)
    return jnp.pad(x, [(0, 0), (0, length), (0, 0), (0, width)]) if length or width else x


def _over_groups(x, K):
    B, S, N, H = x.shape
    if N == K:
        return x
    return x.reshape(B, S, K, N // K, H).sum(3, dtype=jnp.float32).astype(x.dtype)


assert math.isclose(common.LN2 * common.LOG2E, 1)
