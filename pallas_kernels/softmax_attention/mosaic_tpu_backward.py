"""Backward kernel of softmax attention for TPU: dq, dk and dv in one sweep, the same bits every time.

Key-stationary: the table goes through the query tiles of each key tile. Tiles are transposed, [k, q], so that lse and
delta, one number a query, lie along lanes, and P^T dO and dS^T Q need no transposition. A head's dq stays in the chip's
memory in float32, where a step adds to the rows of its queries; steps run in order, so the sums have one order.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import blocks, tpu
from pallas_kernels.softmax_attention import mosaic_tpu_tiles as tiles
from pallas_kernels.softmax_attention.mosaic_tpu_tiles import LOG2E, Step

NT = (((1,), (1,)), ((), ()))
TN = (((0,), (0,)), ((), ()))
MASKED = 256  # keys at a time where the mask is evaluated too: its positions want registers


def backward(q, k, v, do, lse, delta, classes, *, spec, sizes, scale, span, out_dtype):
    """Gradients of the logits' inputs.

    Args:
      q, k, v, do: [B, N, T', H], [B, K, S', H], [B, K, S', Hv], [B, N, T', Hv], finite, whole tiles; scale > 0.
      lse, delta: float32 [B, N, 1, T']; lse in base 2, huge where a row adds nothing; delta = sum(o do) - dlse.
      classes: int8 [B|1, N|1, query tiles, key tiles], from `blocks.classify`.
      span: (first, count) of the query tiles to sum over; their dq must fit the chip's memory.
      out_dtype: of dk and dv.

    Returns:
      dq float32 [B, N, count tiles, H] without the factor `scale`; dk [B, N, S', H] and dv [B, N, S', Hv], per query head.
    """
    (B, N, _, H), (K, S, Hv), dtype = q.shape, v.shape[1:], q.dtype
    bq, bk, part, group = sizes.queries, sizes.keys, sizes.part, N // K
    at = np.arange(classes.shape[-2])[:, None] - span[0]
    xp = np if isinstance(classes, np.ndarray) else jnp
    classes = xp.where((at >= 0) & (at < span[1]), classes, blocks.EMPTY).astype(np.int8).swapaxes(-1, -2)
    table, steps = tiles.words(classes)
    lead, present = table.shape[:2], tiles.kinds(classes)
    operands = tiles.Operands(spec, sizes, lead, transposed=True)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dot = lambda a, b, dims: lax.dot_general(a, b, dims, precision, jnp.float32)
    count = len(operands.arrays)

    def kernel(table, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *refs):
        inputs_refs, (dq_ref, dk_ref, dv_ref, dk_acc, dv_acc, *columns) = refs[:count], refs[count:]
        b, h, t = (pl.program_id(i) for i in range(3))
        step = Step(table, lead, b, h, t)
        inputs = tiles.Inputs(operands, inputs_refs, columns, b, h)

        @pl.when(t == 0)
        def _():
            @pl.loop(0, span[1])
            def _(i):
                dq_ref[pl.ds(pl.multiple_of(i * bq, bq), bq)] = jnp.zeros((bq, H), jnp.float32)

        @pl.when(step.first)
        def _():
            dk_acc[...] = jnp.zeros_like(dk_acc)
            dv_acc[...] = jnp.zeros_like(dv_acc)
            inputs.enter()

        def compute(partial):
            rows = pl.ds(pl.multiple_of((step.column - span[0]) * bq, bq), bq)
            size = MASKED if partial and part % MASKED == 0 else part
            for first in range(0, bk, size):
                place = inputs.at(step, first, size)
                keys = place.keys
                q, k, do = q_ref[...], k_ref[keys], do_ref[...]
                s = dot(k, q, NT)
                factor, slope = scale, None
                if spec.score:
                    s, factor, slope = place.score(s, scale, derivative=True)
                p = jnp.exp2(s * (factor * LOG2E) - lse_ref[...])
                seen = place.visible() if partial else None
                if partial:
                    p = jnp.where(seen, p, 0.0)
                dp = dot(v_ref[keys], do, NT)
                used = p
                if spec.dropout:
                    kept, inverse = place.kept(), spec.dropout.inverse_keep
                    used, dp = jnp.where(kept, p * inverse, 0.0), jnp.where(kept, dp * inverse, 0.0)
                dv_acc[keys] += jnp.dot(used.astype(dtype), do, precision=precision, preferred_element_type=jnp.float32)
                ds = p * (dp - delta_ref[...])
                if slope is not None:
                    ds = ds * slope
                    if partial:  # 0 times the slope of a hidden logit, which may be infinite
                        ds = jnp.where(seen, ds, 0.0)
                ds = ds.astype(dtype)
                dk_acc[keys] += jnp.dot(ds, q, precision=precision, preferred_element_type=jnp.float32)
                dq_ref[rows] += dot(ds, k, TN)

        tiles.cases(step, present, compute)

        @pl.when(step.last)
        def _():
            dk_ref[...] = (dk_acc[...] * scale).astype(out_dtype)
            dv_ref[...] = dv_acc[...].astype(out_dtype)

    of = lambda b, h, t, w: Step(w, lead, b, h, t)
    query = lambda b, h, t, w: (b, h, of(b, h, t, w).column, 0)
    key = lambda b, h, t, w: (b, h // group, of(b, h, t, w).row, 0)
    own = lambda b, h, t, w: (b, h, of(b, h, t, w).row, 0)
    line = lambda b, h, t, w: (b, h, 0, of(b, h, t, w).column)
    f32 = jnp.float32
    return pl.pallas_call(
        kernel,
        name='softmax_attention_backward',
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, N, steps),
            in_specs=[*tiles.inputs_of_backward(bq, bk, H, Hv, query, key, line), *operands.specs],
            out_specs=[
                pl.BlockSpec((None, None, span[1] * bq, H), lambda b, h, t, w: (b, h, 0, 0)),
                pl.BlockSpec((None, None, bk, H), own),
                pl.BlockSpec((None, None, bk, Hv), own),
            ],
            scratch_shapes=[pltpu.VMEM((bk, H), f32), pltpu.VMEM((bk, Hv), f32), *operands.scratch],
        ),
        out_shape=[
            tpu.out_type((B, N, span[1] * bq, H), f32, q),
            tpu.out_type((B, N, S, H), out_dtype, q),
            tpu.out_type((B, N, S, Hv), out_dtype, q),
        ],
        compiler_params=tiles.parameters(tiles.resident(span[1] * bq, H)),
        cost_estimate=tiles.cost(B, N, classes, sizes, H, Hv, 5, (q, k, v, do)),
    )(table.reshape(-1), q, k, v, do, lse, delta, *operands.arrays)
