"""The states that the pieces of a sequence start with, from piece to piece: a product each, in one kernel."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common
from pallas_kernels.common import TILE
from pallas_kernels.gated_linear import accumulate
from pallas_kernels.gated_linear.accumulate import WHOLE, product

TERMS = WHOLE
SIDE = 64  # columns of a block, rows of a warpgroup


@common.lowered_once('reverse', 'interpret')
def chain(transitions, written, first, *, reverse=False, interpret=False):
    """S of each piece before it: `first`, or zero, and then transition S + written of the piece before (reverse: after) it.

    Args:
      transitions: float32 [B, pieces, N, K, K], K a multiple of 64.
      written: float32 [B, pieces, N, K, V], V a multiple of 64.
      first: float32 [B, N, K, V], or None.

    Returns:
      float32, as `written`; products are those of three bfloat16 terms, as good as float32.
    """
    B, pieces, N, K, V = written.shape
    groups = K // SIDE

    def kernel(transition_ref, written_ref, first_ref, out_ref, smem, bar):
        b, h, part, group = (lax.axis_index(name) for name in ('b', 'h', 'part', 'wg'))
        rows, columns = pl.ds(group * SIDE, SIDE), pl.ds(part * SIDE, SIDE)
        load = lambda ref: plgpu.load(ref, layout=TILE, optimized=False)

        def step(i, state):
            piece, slot = pieces - 1 - i if reverse else i, lax.rem(i, 2)
            transition = load(transition_ref.at[b, piece, h, rows])
            added = load(written_ref.at[b, piece, h, rows, columns])
            out_ref.at[b, piece, h, rows, columns][...] = state
            for term, x in enumerate(accumulate.split(state, TERMS, jnp.bfloat16)):
                smem.at[slot, term, rows][...] = x
            plgpu.commit_smem()
            plgpu.barrier_arrive(bar)
            lefts = accumulate.split(transition, TERMS, jnp.bfloat16)
            plgpu.barrier_wait(bar)  # the slot before was read by all

            return product(lefts, [smem.at[slot, term] for term in range(TERMS)], TERMS, added, interpret=interpret)

        nothing = plgpu.layout_cast(jnp.zeros((SIDE, SIDE), jnp.float32), TILE)
        lax.fori_loop(0, pieces, step, nothing if first_ref is None else load(first_ref.at[b, h, rows, columns]))

    kernel.__name__ = 'chain'  # what profilers show
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(written.shape, jnp.float32),
        scratch_types=(common.swizzled((2, TERMS, K, SIDE), jnp.bfloat16), plgpu.Barrier(num_arrivals=groups)),
        grid=(B, N, V // SIDE),
        grid_names=('b', 'h', 'part'),
        num_threads=groups,
        thread_name='wg',
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # two a store; `bar` stands between writing a slot, reading it, and writing again
        ),
        **common.interpreted(interpret),
    )(transitions, written, first)
