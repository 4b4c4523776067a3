"""Gradient of a strip (an operand by k - q, as a learned relative bias) of a score, for Hopper.

A strip's entry belongs to one diagonal of the logits, so a block takes all tiles of 128 queries by 64 keys of one head
whose first key is a fixed distance from their first query: each element of the tile then always meets the same entry,
and the gradients add up in registers, over query tiles and batch, without any exchange. S and dP are recomputed, two of
the backward's five products. What comes out, [heads, distances, 128, 64], is summed along its diagonals outside.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blocks, common
from pallas_kernels.common import LOG2E, ROW, TILE
from pallas_kernels.softmax_attention import functions
from pallas_kernels.softmax_attention.backward import HIDDEN

QUERIES, KEYS = 128, 64


def lists(classes):
    """The tiles of each distance: int8 [B, N or 1, nq, nk] -> int32 [N or 1, distances, 1 + B * nq].

    Distance x holds the key tiles 2 * q + x - 2 * (nq - 1). First the count, then 2 * (b * nq + q) + partial.
    """
    xp = np if isinstance(classes, np.ndarray) else jnp
    B, L, nq, nk = classes.shape
    X = 2 * (nq - 1) + nk
    tile = 2 * np.arange(nq)[None] + np.arange(X)[:, None] - 2 * (nq - 1)
    inside = (tile >= 0) & (tile < nk)
    found = classes[:, :, np.arange(nq)[None], np.clip(tile, 0, nk - 1)]  # [B, L, X, nq]
    found = xp.where(inside, found, blocks.EMPTY).transpose(1, 2, 0, 3).reshape(L, X, B * nq)
    order = xp.argsort(found == blocks.EMPTY, axis=-1, stable=True)
    entries = 2 * order + (xp.take_along_axis(found, order, -1) == blocks.PARTIAL)
    return xp.concatenate([(found != blocks.EMPTY).sum(-1)[..., None], entries], -1).astype(np.int32)


def strip(tiles, T: int, S: int):
    """Sums float32 [N, distances, 128, 64] along the diagonals: [N, T + S - 1]."""
    N, X = tiles.shape[:2]
    width = QUERIES + KEYS
    x = jnp.pad(tiles, [(0, 0), (0, 0), (0, 0), (0, QUERIES)]).reshape(N, X, -1)
    # In rows one entry longer, row i starts i entries earlier: column 127 + j - i holds (i, j).
    x = jnp.pad(x, [(0, 0), (0, 0), (QUERIES - 1, 1)]).reshape(N, X, QUERIES, width + 1).sum(2)[..., :width]
    parts = x.reshape(N, X, -1, KEYS)
    steps = parts.shape[2]
    total = jnp.zeros((N, X + steps - 1, KEYS), jnp.float32)
    for n in range(steps):
        total = total.at[:, n : n + X].add(parts[:, :, n])
    flat = total.reshape(N, -1)
    # Distance x starts at k0 - q0 = 64 * x - 128 * (nq - 1); entry d = k - q + T - 1 of the strip.
    nq = common.cdiv(T, QUERIES)
    first = QUERIES * (nq - 1) + QUERIES - 1 - (T - 1)
    return flat[:, first : first + T + S - 1]


def diagonal(q, k, v, do, lse, delta, todo, operands, *, spec, which, scale):
    """The gradient of operand `which` of the score, one tile a distance: float32 [N, distances, 128, 64].

    Arrays as in `backward.backward`, operands as in the forward kernel, `todo` from `lists`.
    """
    _, T, N, H = q.shape
    S, K, Hv = k.shape[1], k.shape[2], v.shape[3]
    dtype = q.dtype
    nq, nk = common.cdiv(T, QUERIES), common.cdiv(S, KEYS)
    X = todo.shape[1]
    group = N // K
    stages = 2 if max(H, Hv) <= 128 else 1
    shape = (64, KEYS)

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, todo_ref, operand_refs, out_ref, scratch):
        q_smem, do_smem, k_smem, v_smem, lse_smem, delta_smem, out_smem, full, free = scratch
        h, x = lax.axis_index('h'), X - 1 - lax.axis_index('x')
        wg = lax.axis_index('wg')
        row = (h if todo_ref.shape[0] > 1 else 0, x)
        count = todo_ref[(*row, 0)]

        def locate(j):
            entry = todo_ref[(*row, j + 1)]
            tile = lax.div(entry, 2)
            b, qi = lax.div(tile, nq), lax.rem(tile, nq)
            return b, qi * QUERIES, (2 * qi + x - 2 * (nq - 1)) * KEYS, lax.rem(entry, 2) == 1

        @pl.when(wg < 2)
        def _consume():
            plgpu.set_max_registers(240, action='increase')
            mine = pl.ds(wg * 64, 64)

            def step(j, total):
                slot = lax.rem(j, stages)
                b, q0, k0, partial = locate(j)
                inputs = functions.Inputs(operand_refs, spec, b, h, (nq * QUERIES, nk * KEYS), transposed=False)
                place = inputs.at(q0 + wg * 64, k0, shape)

                def products(s_acc, dp_acc):
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(s_acc, q_smem.at[slot, mine], k_smem.at[slot].T)
                    plgpu.wgmma(dp_acc, do_smem.at[slot, mine], v_smem.at[slot].T)
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                    s, factor, slope = place.score_by_operand(s, scale, which)
                    base = plgpu.load(lse_smem.at[slot, mine], layout=ROW, optimized=False)
                    p = jnp.exp2(s * (factor * LOG2E) - common.row(base, shape))
                    dp = dp_acc[...]
                    if spec.dropout:
                        dp = jnp.where(place.kept(), dp * spec.dropout.inverse_keep, 0.0)
                    less = plgpu.load(delta_smem.at[slot, mine], layout=ROW, optimized=False)
                    plgpu.barrier_arrive(free.at[slot])
                    ds = p * (dp - common.row(less, shape))
                    ds = jnp.where(common.row(base, shape) > HIDDEN / 2, 0.0, ds if slope is None else ds * slope)
                    if spec.mask:  # last, for 0 times what is not finite is NaN
                        hide = lambda ds: jnp.where(place.visible(), ds, 0.0)
                        ds = lax.cond(partial, hide, lambda ds: ds, ds)
                    return ds

                return total + pl.run_scoped(products, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))

            zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), TILE)
            out_smem.at[wg][...] = lax.fori_loop(0, count, step, zero)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[h, x, mine])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == 2)
        def _load():
            plgpu.set_max_registers(24, action='decrease')
            g = h // group

            @plgpu.warp_map
            def _warp(warp):
                @pl.when(warp == 0)
                def _():
                    @pl.loop(0, count)
                    def _step(j):
                        slot = lax.rem(j, stages)
                        b, q0, k0, _ = locate(j)
                        rows, keys = pl.ds(q0, QUERIES), pl.ds(k0, KEYS)
                        pl.when(j >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                        for source, target in (
                            (q_ref.at[b, rows, h], q_smem),
                            (k_ref.at[b, keys, g], k_smem),
                            (do_ref.at[b, rows, h], do_smem),
                            (v_ref.at[b, keys, g], v_smem),
                            (lse_ref.at[b, h, rows], lse_smem),
                            (delta_ref.at[b, h, rows], delta_smem),
                        ):
                            plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

                    @pl.loop(jnp.maximum(count - stages, 0), count)
                    def _drain(j):
                        plgpu.barrier_wait(free.at[lax.rem(j, stages)])

    def entry_point(*refs):
        pl.run_scoped(
            lambda *scratch: kernel(*refs, scratch),
            common.swizzled((stages, QUERIES, H), dtype),
            common.swizzled((stages, QUERIES, Hv), dtype),
            common.swizzled((stages, KEYS, H), dtype),
            common.swizzled((stages, KEYS, Hv), dtype),
            plgpu.SMEM((stages, QUERIES), jnp.float32),
            plgpu.SMEM((stages, QUERIES), jnp.float32),
            common.swizzled((2, 64, KEYS), jnp.float32),
            plgpu.Barrier(num_arrivals=6, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            collective_axes='wg',
        )

    entry_point.__name__ = 'softmax_diagonal'  # what profilers show
    return plgpu.kernel(
        entry_point,
        out_type=jax.ShapeDtypeStruct((N, X, QUERIES, KEYS), jnp.float32),
        grid=(N, X),
        grid_names=('h', 'x'),
        num_threads=3,
        thread_name='wg',
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(q, k, v, do, lse, delta, todo, operands)
