"""T = (I + diag(b) L)^-1 of every chunk, L_ij = k_i . k_j decayed from j to i for j < i; one block a chunk.

Blocks of 1, 2, 4, ... tokens are merged, all of one size at once:

    [[X, 0], [c, Y]]^-1 = [[X^-1, 0], [-Y^-1 c X^-1, Y^-1]]        T <- T - T (A o M) T

with A = diag(b) L and M the mask of the corners c. Each factor is a true inverse, of moderate size; a series in powers of A
would cancel all digits for keys that repeat. Products are of 16-bit terms, high and low, summed in float32.
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


def inverses(k, beta, decay, *, interpret=False):
    """The inverses of all chunks.

    Args:
      k: [B, T', heads, K], bfloat16, T' a multiple of 8, K of 64.
      beta: float32 [B, N, chunks, 64], N a multiple of heads.
      decay: as in the gated linear sweep, or None.

    Returns:
      bfloat16 [B, N, chunks, 2, 64, 64]: high and low terms, whose sum is T to 16 bits.
    """
    (B, _, heads, K), (N, chunks), dtype = k.shape, beta.shape[1:3], k.dtype

    def kernel(k_ref, beta_ref, decay_ref, out_ref, k_smem, t_smem, bar):
        b, h, c = lax.axis_index('b'), lax.axis_index('h'), lax.axis_index('c')
        plgpu.copy_gmem_to_smem(k_ref.at[b, pl.ds(c * CHUNK, CHUNK), h // (N // heads)], k_smem, bar)
        i = plgpu.broadcasted_iota(jnp.int32, SQUARE, 0, layout=TILE)
        j = plgpu.broadcasted_iota(jnp.int32, SQUARE, 1, layout=TILE)

        def split(x):
            high = x.astype(dtype)
            return high, (x - high.astype(jnp.float32)).astype(dtype)

        def store(x):
            for term, part in enumerate(split(x)):
                t_smem.at[term][...] = part
            plgpu.commit_smem()

        def times_stored(x):
            def run(acc):
                high, low = split(x)
                acc.add(high, t_smem.at[0])
                acc.add(low, t_smem.at[0])
                acc.add(high, t_smem.at[1])
                return acc.load(0)

            return accumulate.scoped(run, SQUARE, interpret=interpret)

        def products(acc):
            acc.add(k_smem, k_smem.T)
            return acc.load(0)

        plgpu.barrier_wait(bar)
        A = accumulate.scoped(products, SQUARE, interpret=interpret)
        A *= common.row(plgpu.load(beta_ref.at[b, h, c], layout=ROW, optimized=False), SQUARE)
        if decay_ref is not None:
            at = [x if n > 1 else 0 for x, n in zip((b, h, c), decay_ref.shape)]
            row = plgpu.load(decay_ref.at[*at], layout=ROW, optimized=False)
            col = plgpu.load(decay_ref.at[*at], layout=COL, optimized=False)
            A *= jnp.exp2(common.row(row, SQUARE) - common.col(col, SQUARE))

        def corner(level):
            """Pairs (i, j) of the later and the earlier half of one block of 2 ** (level + 1) tokens."""
            return (i >> level == (j >> level) + 1) & ((i >> level) & 1 == 1)

        inverse = jnp.where(i == j, 1.0, jnp.where(corner(0), -A, 0.0))
        for level in range(1, 6):
            store(inverse)
            store(times_stored(jnp.where(corner(level), A, 0.0)))
            inverse -= times_stored(inverse)
        store(inverse)
        plgpu.copy_smem_to_gmem(t_smem, out_ref.at[b, h, c])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((B, N, chunks, 2, CHUNK, CHUNK), dtype),
        scratch_types=(
            common.swizzled((CHUNK, K), dtype),
            common.swizzled((2, CHUNK, CHUNK), dtype),
            plgpu.Barrier(),
        ),
        grid=(B, N, chunks),
        grid_names=('b', 'h', 'c'),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **({'interpret': plgpu.InterpretGPUParams(detect_races=True)} if interpret else {}),
    )(k, beta, decay)
