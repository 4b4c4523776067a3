"""Z = (I + diag(p) L diag(s))^-1 of every chunk, L_ij = k_i . k_j decayed from j to i for j < i; one block a chunk.

Blocks of 1, 2, 4, ... tokens are merged, all of one size at once:

    [[X, 0], [c, Y]]^-1 = [[X^-1, 0], [-Y^-1 c X^-1, Y^-1]]        Z <- Z - (Z A Z) o M

with A = diag(p) L diag(s) and M the mask of the corners c, which are 0 before. Each factor is a true inverse, of moderate size;
a series in powers of A would cancel all digits for keys that repeat. These products are of float16 terms and float32 sums. One
step of Newton's, Z <- Z + Z (I - (I + A) Z), A as two terms, then squares the error. Where Z is to be as good as float32 a
second one follows, Z <- Z + (I - Z (I + A)) Z, of bfloat16 terms, whose exponents are those of float32: beta may be tiny.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common
from pallas_kernels.common import COL, ROW, TILE
from pallas_kernels.delta_rule.products import TERMS, decay_of
from pallas_kernels.gated_linear import accumulate
from pallas_kernels.gated_linear.accumulate import WHOLE, product

CHUNK = 64
SQUARE = (CHUNK, CHUNK)


@common.lowered_once('terms', 'interpret')
def inverses(k, strength, decay, k_low=None, other=None, other_low=None, *, terms=TERMS, interpret=False):
    """The inverses of all chunks.

    Args:
      k: [B, T', heads, K], bfloat16, T' a multiple of 8, K of 64, |k|^2 beta far below 65504.
      strength: p and s, p s = beta, float32 [B, N, chunks, 2, 64], N a multiple of heads.
      decay: as in the gated linear sweep, or None.
      k_low, other, other_low: L_ij = (k_i + k_low_i) . (other_j + other_low_j) where given, else k_i . k_j.

    Returns:
      bfloat16 [B, N, chunks, terms, 64, 64]: of two terms, high and low, the sum is Z to 16 bits; of three Z - I.
    """
    (B, _, heads, K), (N, chunks), dtype = k.shape, strength.shape[1:3], k.dtype
    f16, f32 = jnp.float16, jnp.float32

    keys = k, k_low, other, other_low

    def kernel(*refs_and_scratch):
        key_refs, (strength_ref, decay_ref, out_ref, *scratch) = refs_and_scratch[:4], refs_and_scratch[4:]
        *key_smem, a_smem, t_smem, o_smem, n_smem, bar = scratch
        b, h, c = lax.axis_index('b'), lax.axis_index('h'), lax.axis_index('c')
        for ref, smem in zip(key_refs, key_smem):
            if ref is not None:
                plgpu.copy_gmem_to_smem(ref.at[b, pl.ds(c * CHUNK, CHUNK), h // (N // heads)], smem, bar)
        k_smem, kl_smem, other_smem, ol_smem = key_smem
        other_smem = k_smem if other_smem is None else other_smem
        tile = lambda dim: plgpu.broadcasted_iota(jnp.int32, SQUARE, dim, layout=TILE)
        identity = lambda: jnp.where(tile(0) == tile(1), 1.0, 0.0)

        def zero():
            """What keeps the compiler from preparing the next levels' masks and addresses, for which registers are few."""
            return 0 if interpret else common.opaque_zero()

        def add(base, *lefts):
            """base + left @ what is stored."""

            def run(acc):
                if base is not None:
                    acc.set(base)
                right = t_smem.at[zero()]
                for left in lefts:
                    acc.add(left, right)
                return acc.load(0)

            return accumulate.scoped(run, SQUARE, interpret=interpret)

        def corner(level):
            """Between the halves of one block of 2 ** (level + 1) tokens; above the diagonal too, where A and Z are 0."""
            return ((tile(0) + zero()) ^ tile(1)) >> level == 1

        def store(x):
            if not interpret:
                common.together()  # products have read what was there
            t_smem.at[0][...] = x.astype(f16)
            plgpu.commit_smem()

        def keep(smem, x):
            if not interpret:
                common.together()
            for term, part in enumerate(accumulate.split(x, terms, dtype)):
                smem.at[term][...] = part
            plgpu.commit_smem()

        def pairs(acc):
            acc.add(k_smem, other_smem.T)
            for left, right in ((kl_smem, other_smem), (k_smem, ol_smem)):
                if left is not None and right is not None:
                    acc.add(left, right.T)
            return acc.load(0)

        plgpu.barrier_wait(bar)
        A = accumulate.scoped(pairs, SQUARE, interpret=interpret)
        A *= common.row(plgpu.load(strength_ref.at[b, h, c, 0], layout=ROW, optimized=False), SQUARE)
        A *= common.col(plgpu.load(strength_ref.at[b, h, c, 1], layout=COL, optimized=False), SQUARE)
        if decay_ref is not None:
            at = [x if n > 1 else 0 for x, n in zip((b, h, c), decay_ref.shape)]
            A *= decay_of(terms)(decay_ref.at[*at], reverse=False).pairs()
        A = jnp.where(tile(0) > tile(1), -A, 0.0)
        if n_smem is not None:
            keep(n_smem, A)
        high = A.astype(f16)
        a_smem[...] = (A - high.astype(f32)).astype(f16)

        rough = jnp.where(corner(0), A, identity())  # rounded whole: choices among float16 take a step each
        for level in range(1, 6):
            store(rough)
            store(add(None, high))
            rough = jnp.where(corner(level), add(None, rough.astype(f16)), rough)
        rough = rough.astype(f16)
        store(rough)
        store(add(identity() - rough.astype(f32), high, a_smem))
        inverse = add(rough.astype(f32), rough)
        if n_smem is not None:
            keep(o_smem, inverse)
            parts = lambda smem: [smem.at[term] for term in range(terms)]
            residual = product(parts(o_smem), parts(n_smem), terms, identity() - inverse, interpret=interpret)
            residual = accumulate.split(residual, TERMS, dtype)
            inverse = product(residual, parts(o_smem)[:TERMS], TERMS, inverse - identity(), interpret=interpret)
        keep(o_smem, inverse)
        plgpu.copy_smem_to_gmem(o_smem, out_ref.at[b, h, c])
        plgpu.wait_smem_to_gmem(0)

    kernel.__name__ = 'inverses'  # what profilers show
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((B, N, chunks, terms, CHUNK, CHUNK), dtype),
        scratch_types=(
            *(None if x is None else common.swizzled((CHUNK, K), dtype) for x in keys),
            common.swizzled((CHUNK, CHUNK), f16),
            common.swizzled((1, CHUNK, CHUNK), f16),
            common.swizzled((terms, CHUNK, CHUNK), dtype),
            common.swizzled((terms, CHUNK, CHUNK), dtype) if terms >= WHOLE else None,
            plgpu.Barrier(num_arrivals=sum(x is not None for x in keys)),
        ),
        grid=(B, N, chunks),
        grid_names=('b', 'h', 'c'),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
        ),
        **common.interpreted(interpret),
    )(*keys, strength, decay)
