"""Z = (I + diag(s) L diag(s))^-1 of every chunk, L_ij = k_i . k_j decayed from j to i for j < i; one warpgroup a chunk.

Blocks of 1, 2, 4, ... tokens are merged, all of one size at once:

    [[X, 0], [c, Y]]^-1 = [[X^-1, 0], [-Y^-1 c X^-1, Y^-1]]        Z <- Z - Z (A o M) Z

with A = diag(s) L diag(s) and M the mask of the corners c. Each factor is a true inverse, of moderate size; a series in powers
of A would cancel all digits for keys that repeat. These products are of float16 terms and float32 sums. One step of Newton's,
Z <- Z + Z (I - (I + A) Z), A as two terms, then squares the error.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common
from pallas_kernels.common import COL, ROW, TILE
from pallas_kernels.gated_linear import accumulate

CHUNK = 64
SQUARE = (CHUNK, CHUNK)
TOGETHER = 3  # chunks a block: 168 registers a thread


def inverses(k, strength, decay, *, interpret=False):
    """The inverses of all chunks.

    Args:
      k: [B, T', heads, K], bfloat16, T' a multiple of 8, K of 64, |k|^2 s^2 far below 65504.
      strength: s, the square root of beta, float32 [B, N, chunks, 64], N a multiple of heads.
      decay: as in the gated linear sweep, or None.

    Returns:
      bfloat16 [B, N, chunks, 2, 64, 64]: high and low terms, whose sum is Z to 16 bits.
    """
    (B, _, heads, K), (N, chunks), dtype = k.shape, strength.shape[1:3], k.dtype
    W = min(TOGETHER, B * N * chunks)
    f16, f32 = jnp.float16, jnp.float32

    def kernel(k_ref, strength_ref, decay_ref, out_ref, k_smem, a_smem, t_smem, o_smem, bar):
        wg = lax.axis_index('wg')
        mine = lax.axis_index('block') * W + wg
        number = jnp.minimum(mine, B * N * chunks - 1)  # the last block may do its last chunk again
        b, h, c = number // (N * chunks), lax.rem(number // chunks, N), lax.rem(number, chunks)
        plgpu.copy_gmem_to_smem(k_ref.at[b, pl.ds(c * CHUNK, CHUNK), h // (N // heads)], k_smem.at[wg], bar.at[wg])
        tile = lambda dim: plgpu.broadcasted_iota(jnp.int32, SQUARE, dim, layout=TILE)
        identity = lambda: jnp.where(tile(0) == tile(1), 1.0, 0.0)

        def zero():
            """What keeps the compiler from preparing the next levels' masks and addresses, for which registers are few."""
            return 0 if interpret else common.opaque_zero()

        def product(base, *lefts):
            """base + left @ what is stored."""

            def run(acc):
                if base is not None:
                    acc.set(base)
                right = t_smem.at[wg + zero()]
                for left in lefts:
                    acc.add(left, right)
                return acc.load(0)

            return accumulate.scoped(run, SQUARE, interpret=interpret)

        def store(x):
            t_smem.at[wg][...] = x.astype(f16)
            plgpu.commit_smem()

        def pairs(acc):
            acc.add(k_smem.at[wg], k_smem.at[wg].T)
            return acc.load(0)

        plgpu.barrier_wait(bar.at[wg])
        A = accumulate.scoped(pairs, SQUARE, interpret=interpret)
        A *= common.row(plgpu.load(strength_ref.at[b, h, c], layout=ROW, optimized=False), SQUARE)
        A *= common.col(plgpu.load(strength_ref.at[b, h, c], layout=COL, optimized=False), SQUARE)
        if decay_ref is not None:
            at = [x if n > 1 else 0 for x, n in zip((b, h, c), decay_ref.shape)]
            row = plgpu.load(decay_ref.at[*at], layout=ROW, optimized=False)
            col = plgpu.load(decay_ref.at[*at], layout=COL, optimized=False)
            A *= jnp.exp2(common.row(row, SQUARE) - common.col(col, SQUARE))
        A = jnp.where(tile(0) > tile(1), -A, 0.0)
        high = A.astype(f16)
        a_smem.at[wg][...] = (A - high.astype(f32)).astype(f16)

        def corner(level):
            """-A between the later and the earlier half of one block of 2 ** (level + 1) tokens."""
            i, j = tile(0) + zero(), tile(1)
            return jnp.where((i >> level == (j >> level) + 1) & ((i >> level) & 1 == 1), high.astype(f32), 0.0)

        rough = (identity() + corner(0)).astype(f16)
        for level in range(1, 6):
            store(rough)
            store(product(None, corner(level).astype(f16)))
            rough = product(rough.astype(f32), rough).astype(f16)
        store(rough)
        store(product(identity() - rough.astype(f32), high, a_smem.at[wg]))
        inverse = product(rough.astype(f32), rough)
        high = inverse.astype(dtype)
        o_smem.at[wg, 0][...] = high
        o_smem.at[wg, 1][...] = (inverse - high.astype(f32)).astype(dtype)
        plgpu.commit_smem()
        pl.when(number == mine)(lambda: plgpu.copy_smem_to_gmem(o_smem.at[wg], out_ref.at[b, h, c]))
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((B, N, chunks, 2, CHUNK, CHUNK), dtype),
        scratch_types=(
            common.swizzled((W, CHUNK, K), dtype),
            common.swizzled((W, CHUNK, CHUNK), f16),
            common.swizzled((W, CHUNK, CHUNK), f16),
            common.swizzled((W, 2, CHUNK, CHUNK), dtype),
            plgpu.Barrier(num_barriers=W),
        ),
        grid=(common.cdiv(B * N * chunks, W),),
        grid_names=('block',),
        num_threads=W,
        thread_name='wg',
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **({'interpret': plgpu.InterpretGPUParams(detect_races=True)} if interpret else {}),
    )(k, strength, decay)
