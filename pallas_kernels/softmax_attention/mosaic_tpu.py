"""Softmax attention on TPU: any elementwise mask and score inside one fused kernel, forward and backward.

    o = softmax(score(scale * q k^T + bias), masked) v

`softmax_attention` has the signature of `attnx.ops.softmax_attention` without `impl`; `unsupported` says why a call
can't run here. README.md in this folder has the maths, the limits, and what was compiled and interpreted.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import blocks, tpu
from pallas_kernels import dropout as dropout_lib
from pallas_kernels import elementwise as ew
from pallas_kernels.softmax_attention import functions, mosaic_gpu
from pallas_kernels.softmax_attention import mosaic_tpu_backward as backward_kernel
from pallas_kernels.softmax_attention import mosaic_tpu_forward as forward_kernel
from pallas_kernels.softmax_attention import mosaic_tpu_operands as operand_kernel
from pallas_kernels.softmax_attention import mosaic_tpu_tiles as tiles
from pallas_kernels.softmax_attention.mosaic_tpu_tiles import LN2, LOG2E, Sizes

WIDEST = 256
RESIDENT = 2**25  # bytes of the chip's memory for dq; more queries are taken in spans
HIDDEN = 1e30  # base-2 log-sum-exp given to the backward kernel for rows that add nothing: all weights become 0
SIDES = (1024, 512, 256, 128)
PART = 512


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
    if not dtypes <= {'bfloat16', 'float32'}:
        return f'it takes bfloat16 and float32, given {dtypes.pop()}; cast, or use impl="xla"'
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        return 'query, key and value must be [B, T, N, H], [B, S, K, H], [B, S, K, Hv]'
    (B, T, N, H), (S, K), Hv = query.shape, key.shape[1:3], value.shape[3]
    if N % K:
        return f'{N} query heads are no multiple of {K} key heads'
    if max(H, Hv) > WIDEST:
        return f'head widths up to {WIDEST}, given {max(H, Hv)}; use impl="xla"'
    if min(B, T, S, H, Hv) < 1:
        return 'an empty dimension; use impl="xla"'
    if -(-T // SIDES[0]) * -(-S // SIDES[0]) > tiles.MOST_WORDS or max(T, S) > tiles.MOST_BLOCKS * SIDES[-1]:
        return f'the table of tiles of {T} queries and {S} keys exceeds the scalar memory; use impl="xla"'
    if reason := tpu.partitioned():
        return reason
    if return_stats:
        return 'it makes no statistics of heads (return_stats)'
    for name, f in (('mask', ew.as_mask(mask)), ('score', mosaic_gpu._with_bias(score, bias))):
        reason = f and mosaic_gpu._refuse(name, f, T, S)
        if reason:
            return reason
    return None


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
      query, key, value: [B, T, N, H], [B, S, K, H], [B, S, K, Hv], bfloat16 or float32, N a multiple of K. Products of
        float32 are exact to float32 (several passes of the matrix unit).
      mask, score: see `pallas_kernels.elementwise`.
      bias: floating, broadcastable to [B, N, T, S], added to the scaled logits before the score.
      scale: multiplies the logits; 1/sqrt(H) by default.
      sinks: [N] logits of a key without value that every query sees.
      dropout: `pallas_kernels.dropout.Dropout`.
      return_lse: also return the log-sum-exp of the logits, float32 [B, N, T].
      return_stats: refused.

    Raises:
      ValueError: `unsupported` has a reason.
    """
    options = {'mask': mask, 'score': score, 'bias': bias, 'scale': scale, 'sinks': sinks, 'dropout': dropout}
    out, lse = attend(query, key, value, **options)
    return (out, lse) if return_lse else out


def attend(query, key, value, *, mask=None, score=None, bias=None, scale=None, sinks=None, dropout=None, sides=None):
    """`softmax_attention` with lse, on tiles of `sides` = (queries, keys, part), multiples of 128; None: by shape."""
    options = {'mask': mask, 'score': score, 'bias': bias}
    if reason := unsupported(query, key, value, **options):
        raise ValueError(f'softmax_attention on mosaic_tpu: {reason}')
    _, query, scale = mosaic_gpu.positive(query, scale)
    dropout = _seeded(dropout)
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    mask, score = ew.as_mask(mask), mosaic_gpu._with_bias(score, bias)
    return _attention(_Static(scale, sides), query, key, value, mask, score, sinks, dropout)


def softmax_attention_backward(query, key, value, *, seen, mask=None, score=None, scale=None, dropout=None):
    """(dq, dk, dv, dscore) of `softmax_attention` over these keys, given what it returns over these keys and others.

    Args:
      seen: out [B, T, N, Hv] and lse [B, N, T] over all keys, and their cotangents; weights are exp(logit - lse).
      The rest as there; no sinks.
    """
    out, lse, dout, dlse = seen
    sign, query, scale = mosaic_gpu.positive(query, scale)
    options = ew.as_mask(mask), ew.as_score(score), None, _seeded(dropout)
    saved = query, key, value, *options, out, lse * LOG2E
    dq, dk, dv, _, dscore, *_ = _backward(_Static(scale, None), saved, (dout.astype(value.dtype), dlse))
    return dq if sign == 1 else sign * dq, dk, dv, dscore


def _seeded(dropout):
    if dropout is None or not dropout.threshold:
        return None
    return dropout_lib.Dropout(dropout.rate, dropout_lib.u32(dropout.seed))


class _Static(NamedTuple):
    scale: float
    sides: tuple[int, int, int] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, mask, score, sinks, dropout):
    return _forward(static, q, k, v, mask, score, sinks, dropout)[0]


def _forward(static, q, k, v, mask, score, sinks, dropout):
    sizes, classes = _tiling(static, q, k, mask)
    # A vector of key or value that is not finite makes the logits of its column NaN, one of query those of its row. The
    # mask replaces them; zeros in v keep 0 · NaN out of the value product.
    (_, q_ok), (_, k_ok), (v_clean, v_ok) = (_clean(x) for x in (q, k, v))
    poisoned = lambda x, ok: jnp.where(ok[..., None], x, jnp.nan)
    arrays = _tiles(poisoned(q, q_ok), sizes.T), _tiles(poisoned(k, k_ok & v_ok), sizes.S), _tiles(v_clean, sizes.S)
    spec = _spec(mask, score, dropout, q.shape[1], k.shape[1], sizes)
    out, lse2 = forward_kernel.forward(*arrays, sinks, classes, spec=spec, sizes=sizes, scale=static.scale)
    out, lse2 = out.swapaxes(1, 2)[:, : q.shape[1]], lse2[:, :, 0, : q.shape[1]]
    return (out, lse2 * LN2), (q, k, v, mask, score, sinks, dropout, out, lse2)


def _backward(static, saved, cotangents):
    q, k, v, mask, score, sinks, dropout, out, lse2 = saved
    do, dlse = cotangents
    (_, T, N, H), (S, K), f32 = q.shape, k.shape[1:3], jnp.float32
    sizes, classes = _tiling(static, q, k, mask)
    # Zeros in place of what is not finite: the rows that it concerns have a NaN lse, or get one here. A row that sees
    # nothing, or whose output and lse have no cotangent, adds nothing, were it NaN.
    (q, _), (k, _), (v, _) = (_clean(x) for x in (q, k, v))
    live = ((do != 0).any(-1).swapaxes(1, 2) | (dlse != 0)) & (lse2 != -jnp.inf)
    do, do_ok = _clean(do)
    lse2 = jnp.where(do_ok.swapaxes(1, 2), lse2, jnp.nan)
    delta = (out.astype(f32) * do.astype(f32)).sum(-1).swapaxes(1, 2) - dlse
    delta = jnp.where(live & ~jnp.isnan(lse2), delta, 0.0)
    lse_in = jnp.where(live, lse2, HIDDEN)
    pad = [(0, 0), (0, 0), (0, sizes.T - T)]
    lines = [jnp.pad(x, pad, constant_values=fill)[:, :, None] for x, fill in ((lse_in, HIDDEN), (delta, 0.0))]
    arrays = _tiles(q, sizes.T), _tiles(k, sizes.S), _tiles(v, sizes.S), _tiles(do, sizes.T), *lines
    spec = _spec(mask, score, dropout, T, S, sizes)
    count = sizes.T // sizes.queries
    most = max(1, RESIDENT // tiles.resident(sizes.queries, H))
    spans = [(first, min(most, count - first)) for first in range(0, count, most)]
    whole = len(spans) == 1 and N == K
    run = functools.partial(
        backward_kernel.backward,
        *arrays,
        classes,
        spec=spec,
        sizes=sizes,
        scale=static.scale,
        out_dtype=q.dtype if whole else f32,
    )
    parts = [run(span=span) for span in spans]
    dq = jnp.concatenate([part[0] for part in parts], 2) if len(parts) > 1 else parts[0][0]
    dq = (dq[:, :, :T] * static.scale).astype(q.dtype).swapaxes(1, 2)
    dk, dv = (_over_groups(sum(part[n] for part in parts)[:, :, :S], K).astype(q.dtype).swapaxes(1, 2) for n in (1, 2))
    dsinks = None
    if sinks is not None:
        weight = jnp.where(live, jnp.exp2(sinks[:, None] * LOG2E - lse2), 0.0)
        dsinks = -(weight * delta).sum((0, 2))
    dscore = None
    if score is not None:
        leaves, tree = jax.tree.flatten(score)
        wanted = functools.partial(
            operand_kernel.gradient, *arrays, classes, spec=spec, sizes=sizes, scale=static.scale
        )  # a call each: XLA drops those that are not asked for
        floating = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
        found = [wanted(which=n).astype(jnp.result_type(x)) if floating(x) else None for n, x in enumerate(leaves)]
        dscore = jax.tree.unflatten(tree, found)
    return dq, dk, dv, None, dscore, dsinks, None


_attention.defvjp(_forward, _backward)


def _tiling(static, q, k, mask) -> tuple[Sizes, object]:
    """The tile and the classes of all tiles. Where the mask is known while tracing, the tile of least estimated cost."""
    (B, T, N, _), S = q.shape, k.shape[1]
    whole = lambda n, side: -(-n // side) * side

    def classified(bq, bk, part):
        sizes = Sizes(bq, bk, part, whole(T, bq), whole(S, bk))
        return sizes, blocks.classify(mask, B, N, T, S, bq, bk)

    if static.sides:
        sizes, classes = classified(*static.sides)
        return sizes, tiles.fitting(classes)
    known = isinstance(blocks.classify(mask, B, N, T, S, whole(T, 128), whole(S, 128)), np.ndarray)
    best = None
    for bq in SIDES:
        for bk in SIDES:
            count = -(-T // bq) * -(-S // bk)
            if count > 2**14 or (not known and max(bq, bk) > 512):
                continue
            classes = blocks.classify(mask, B, N, T, S, bq, bk) if known else np.ones(count)
            # Cycles of a step on v6e and v5e, by the compiler: a fixed part, and one that grows with the tile.
            cost = (classes != blocks.EMPTY).mean() * count * (350 + 850 * bq * bk / 2**18)
            if best is None or cost < best[0]:
                best = cost, bq, bk
    sizes, classes = classified(*best[1:], min(best[2], PART))
    return sizes, tiles.fitting(classes)


def _spec(mask, score, dropout, T, S, sizes) -> functions.Spec:
    """Padding is hidden: keys always, queries from a score, which may make NaN of what is not there."""
    if score is not None and sizes.T > T:
        inside = ew.Mask(_is_query)
        mask = inside if mask is None else mask & inside
    return functions.make_spec(mask, score, dropout, T, S, sizes.S > S)


def _is_query(i):
    return i.q < i.q_len


def _clean(x):
    """x with zeros for what is not finite, and for each of its vectors whether all of it is finite."""
    finite = jnp.isfinite(x)
    return jnp.where(finite, x, 0), finite.all(-1)


def _tiles(x, length):
    """[B, T, N, H] -> [B, N, length, H]."""
    return jnp.pad(x.swapaxes(1, 2), [(0, 0), (0, 0), (0, length - x.shape[1]), (0, 0)])


def _over_groups(x, K):
    B, N, S, H = x.shape
    return x if N == K else x.reshape(B, K, N // K, S, H).sum(2)
