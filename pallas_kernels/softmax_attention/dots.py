"""What each row of the backward starts from: sums over a head's columns, at the speed of memory."""

import os

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # a block
ON = bool(int(os.environ.get('DOTS', '1')))
# Eight neighbours of a row in a thread, 32 of each of eight rows in a warp: whole sectors of memory, of the sums too.
LINES = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 32), (16, 32), (8, 32), (8,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)


def dots(out, do):
    """The sum of out * do over columns, and how many of do's elements are not 0: float32 [B, N, T] each.

    Args:
      out, do: [B, T, N, H], 16-bit; T and H multiples of 64.
    """
    B, T, N, H = do.shape

    def kernel(out_ref, do_ref, dot_ref, some_ref):
        b, t, h = (lax.axis_index(name) for name in ('batch', 'tile', 'head'))
        rows = pl.ds(t * ROWS, ROWS)
        dot = some = None
        for at in range(0, H, 64):
            part = (b, rows, h, pl.ds(at, 64))
            x, y = (plgpu.load(ref.at[part], layout=LINES, optimized=False).astype(jnp.float32) for ref in (out_ref, do_ref))
            sums = (x * y).sum(axis=1), jnp.where(y != 0, 1.0, 0.0).sum(axis=1)
            dot, some = sums if dot is None else (dot + sums[0], some + sums[1])
        dot_ref.at[b, h, rows][...] = dot
        some_ref.at[b, h, rows][...] = some

    row = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    return plgpu.kernel(
        kernel,
        out_type=(row, row),
        grid=(B, T // ROWS, N),
        grid_names=('batch', 'tile', 'head'),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(out, do)
