"""Forward kernel of softmax attention for TPU.

The grid is (batch, head, step); a table in scalar memory says which tile a step takes, so that empty tiles are neither
fetched nor computed, and Pallas fetches the next tile while this one is worked on. Row statistics are kept in all 128
lanes (FlashAttention's recurrence, arXiv:2205.14135, in base 2); keys are taken `part` at a time, so that the vector
unit's work on one part hides behind the products of the next.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.softmax_attention import mosaic_tpu_tiles as tiles
from pallas_kernels.softmax_attention.mosaic_tpu_tiles import LANES, LOG2E, Step, wide

FLOOR = -1e30  # the running maximum's start: finite, so that a row that has seen nothing yields exp2(-inf - FLOOR) = 0
NT = (((1,), (1,)), ((), ()))


def forward(q, k, v, sinks, classes, *, spec, sizes, scale):
    """softmax(score(scale * q k^T), masked) v.

    Args:
      q, k, v: [B, N, T', H], [B, K, S', H], [B, K, S', Hv], T' and S' whole tiles; scale > 0. v is finite.
      sinks: float32 [N], or None.
      classes: int8 [B|1, N|1, query tiles, key tiles], from `blocks.classify`.
      spec: `functions.Spec`. sizes: `Sizes`.

    Returns:
      out [B, N, T', Hv] and the base-2 log-sum-exp [B, N, 1, T'] in float32; 0 and -inf where a row sees nothing.
    """
    (B, N, T, H), (K, _, Hv), dtype = q.shape, v.shape[1:], q.dtype
    bq, bk, part, group = sizes.queries, sizes.keys, sizes.part, N // K
    table, steps = tiles.words(classes)
    lead, present = table.shape[:2], tiles.kinds(classes)
    operands = tiles.Operands(spec, sizes, lead, transposed=False)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    count = len(operands.arrays)

    def kernel(table, q_ref, k_ref, v_ref, *refs):
        inputs_refs, sinks_ref, (o_ref, lse_ref, m_ref, l_ref, acc_ref, *columns) = (
            refs[:count], refs[count] if sinks is not None else None, refs[count + (sinks is not None) :]
        )  # fmt: skip
        b, h, t = (pl.program_id(i) for i in range(3))
        step = Step(table, lead, b, h, t)
        inputs = tiles.Inputs(operands, inputs_refs, columns, b, h)

        @pl.when(step.first)
        def _():
            m_ref[...] = jnp.full_like(m_ref, FLOOR)
            l_ref[...] = jnp.zeros_like(l_ref)
            acc_ref[...] = jnp.zeros_like(acc_ref)
            inputs.enter()

        def compute(partial):
            for n in range(bk // part):
                place = inputs.at(step, n * part, part)
                keys = place.keys
                s = lax.dot_general(q_ref[...], k_ref[keys], NT, precision, jnp.float32)
                factor = scale
                if spec.score:
                    s, factor = place.score(s, scale)
                factor *= LOG2E
                if partial:
                    s = place.masked(s)
                m = m_ref[...]
                m_new = jnp.maximum(m, jnp.max(s, 1, keepdims=True) * factor)
                alpha = jnp.exp2(m - m_new)
                p = jnp.exp2(s * factor - wide(m_new, part))
                m_ref[...] = m_new
                l_ref[...] = l_ref[...] * alpha + jnp.sum(p, 1, keepdims=True)
                if spec.dropout:
                    p = jnp.where(place.kept(), p, 0.0)
                pv = jnp.dot(p.astype(dtype), v_ref[keys], precision=precision, preferred_element_type=jnp.float32)
                acc_ref[...] = acc_ref[...] * wide(alpha, Hv) + pv

        tiles.cases(step, present, compute)

        @pl.when(step.last)
        def _():
            m, l = m_ref[...], l_ref[...]
            empty, alpha = l == 0, 1.0
            if sinks_ref is not None:
                sink = sinks_ref[h] * LOG2E
                total = jnp.maximum(m, sink)
                alpha = jnp.exp2(m - total)
                l, m = l * alpha + jnp.exp2(sink - total), total
            keep = spec.dropout.inverse_keep if spec.dropout else 1.0
            alpha = jnp.where(empty, 0.0, alpha * (keep / jnp.where(empty, 1.0, l)))
            o_ref[...] = (acc_ref[...] * wide(alpha, Hv)).astype(o_ref.dtype)
            lse_ref[...] = jnp.where(empty, -jnp.inf, m + jnp.log2(jnp.where(empty, 1.0, l))).T[:1]

    row = lambda b, h, t, w: (b, h, Step(w, lead, b, h, t).row, 0)
    key = lambda b, h, t, w: (b, h // group, Step(w, lead, b, h, t).column, 0)
    extra = [] if sinks is None else [sinks]
    return pl.pallas_call(
        kernel,
        name='softmax_attention_forward',
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, N, steps),
            in_specs=[
                pl.BlockSpec((None, None, bq, H), row),
                pl.BlockSpec((None, None, bk, H), key),
                pl.BlockSpec((None, None, bk, Hv), key),
                *operands.specs,
                *(pl.BlockSpec(memory_space=pltpu.SMEM) for _ in extra),
            ],
            out_specs=[
                pl.BlockSpec((None, None, bq, Hv), row),
                pl.BlockSpec((None, None, 1, bq), lambda b, h, t, w: (b, h, 0, Step(w, lead, b, h, t).row)),
            ],
            scratch_shapes=[
                pltpu.VMEM((bq, LANES), jnp.float32),
                pltpu.VMEM((bq, LANES), jnp.float32),
                pltpu.VMEM((bq, Hv), jnp.float32),
                *operands.scratch,
            ],
        ),
        out_shape=[
            tpu.out_type((B, N, T, Hv), dtype, q),
            tpu.out_type((B, N, 1, T), jnp.float32, q),
        ],
        compiler_params=tiles.parameters(),
        cost_estimate=tiles.cost(B, N, classes, sizes, H, Hv, 2, (q, k, v)),
    )(table.reshape(-1), q, k, v, *operands.arrays, *extra)
