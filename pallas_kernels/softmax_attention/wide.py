"""Backward kernels of softmax attention for Hopper at head widths above 128: one gradient at a time.

The accumulators of dk and dv of 64 keys would fill the registers at these widths, so each of dq, dk and dv has a sweep of
its own that recomputes the weights: 3 + 3 + 2 products where the fused backward has 5. A block owns 128 rows of its side,
64 a consumer warpgroup, and streams the tiles of the other side; sums stay in registers, no two blocks write to one
place, so a second run is bit-equal.

                own   streamed   tile           sum
    dq          q do   k v       [q, k]     dS K
    dk          k v    q do      [k, q]     dS^T Q
    dv          k      q do      [k, q]     P^T dO

What is not finite counts as 0, and NaN comes in by `lse` alone: a block cleans its own rows, and of the other side the tiles
that hold such a thing. Rows of q or do that do have no weight or lse NaN; which keys and values do, the sweep of dk says,
whose blocks own them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common
from pallas_kernels.common import COL, LOG2E, ROW
from pallas_kernels.softmax_attention import functions

OWN, STREAMED = 128, 64  # rows a block owns, rows a step


def sweep(which, q, k, v, do, lse, delta, unclean, lists, order, operands, *, spec, scale):
    """One gradient of the logits' inputs: 'dq' [B, T', N, H], 'dk' [B, S', N, H] or 'dv' [B, S', N, Hv], per query head.

    Returns it and, with 'dk', int32 [B, N, tiles]: whether a tile of keys or values holds what is not finite; else None.

    Args:
      which: 'dq', 'dk' or 'dv'.
      q, k, v, do, lse, delta: as in `backward.backward`, lse and delta padded to whole tiles of 128.
      unclean: int32 [B, N, 1 + tiles]: whether a tile of the other side may hold what is not finite, first whether any may.
      lists: int32 [B or 1, N or 1, own tiles, 2 + n]: how many tiles to stream, how many of them with the mask, which.
      order: int32 [B * N * own tiles]: the blocks as they are launched, each (b * N + h) * own tiles + tile.
      operands: arrays of the functions, laid out by `functions.prepare(..., transposed=which != 'dq')`.
    """
    (B, T, N, H), (S, K), Hv, dtype = q.shape, k.shape[1:3], v.shape[3], q.dtype
    by_key, with_dp = which != 'dq', which != 'dv'
    own, streamed = ((k, v), (q, do)) if by_key else ((q, do), (k, v))
    grouped, width = N // K, Hv if which == 'dv' else H
    tiles = common.cdiv(own[0].shape[1], OWN)
    padded = tuple(common.cdiv(n, OWN) * OWN for n in (T, S))
    shape, c = (64, STREAMED), scale * LOG2E
    used = (OWN * (H + Hv * with_dp) + 2 * STREAMED * H) * 2 + 4 * STREAMED * 4
    stages = 2, 2 if used + 4 * STREAMED * Hv + 1024 <= common.SMEM_LIMIT else 1
    cols = lambda x: common.col(x, shape)

    def kernel(own_refs, streamed_refs, lse_ref, delta_ref, unclean_ref, lists_ref, order_ref, operand_refs, *rest):
        out_ref, found_ref, scratch = rest
        own_smem, streamed_smem, out_smem, lse_smem, delta_smem, own_bar, full, free, cleaned = scratch
        item, wg = order_ref[lax.axis_index('block')], lax.axis_index('wg')
        head, i = lax.div(item, tiles), lax.rem(item, tiles)
        b, h = lax.div(head, N), lax.rem(head, N)
        at = (b if lists_ref.shape[0] > 1 else 0, h if lists_ref.shape[1] > 1 else 0, i)
        count, partial = lists_ref[(*at, 0)], lists_ref[(*at, 1)]
        entry = lambda j: lists_ref[(*at, j + 2)]

        @pl.when(wg < 2)
        def _consume():
            plgpu.set_max_registers(240, action='increase')
            mine, r0 = pl.ds(wg * 64, 64), i * OWN + wg * 64
            inputs = functions.Inputs(operand_refs, spec, b, h, padded, transposed=by_key)
            if not by_key:
                lse_row, delta_row = (
                    plgpu.load(ref.at[b, h, pl.ds(r0, 64)], layout=ROW, optimized=False) for ref in (lse_ref, delta_ref)
                )
            plgpu.barrier_wait(own_bar)
            found = common.clean([smem.at[0, mine] for smem in own_smem if smem is not None])
            if found_ref is not None:
                found_ref[b, h, 2 * i + wg] = found

            def accumulate(acc):
                careful = unclean_ref[b, h, 0] > 0

                def step(j, tile):
                    then = entry(jnp.minimum(j + 1, count - 1))
                    one, two = (lax.rem(j, n) for n in stages)
                    zero = common.opaque_zero()
                    q0, k0 = (tile * STREAMED, r0) if by_key else (r0, tile * STREAMED)
                    place = inputs.at(q0, k0, shape)

                    def spread(smem, row):
                        if by_key:
                            return cols(plgpu.load(smem.at[one], layout=COL, optimized=False))
                        return common.row(row, shape)

                    base = lambda: spread(lse_smem, None if by_key else lse_row)
                    less = lambda: spread(delta_smem, None if by_key else delta_row)

                    def weights(s):
                        slope = None
                        if spec.score:
                            s, factor, slope = place.score(s, scale, derivative=True)
                            p = jnp.exp2(s * (factor * LOG2E) - base())
                        else:
                            p = jnp.exp2(s * c - base())

                        def hide(*tiles):
                            seen = place.visible()
                            return tuple(x if x is None else jnp.where(seen, x, 0.0) for x in tiles)

                        return lax.cond(j < partial, hide, lambda *x: x, p, slope) if spec.mask else (p, slope)

                    def scrub():
                        for n, slot in enumerate((one, two)):
                            pl.when(wg == n)(lambda n=n, slot=slot: common.scrub([streamed_smem[n].at[slot]]))
                        plgpu.barrier_arrive(cleaned)
                        plgpu.barrier_wait(cleaned)

                    plgpu.barrier_wait(full[0].at[one])

                    @pl.when(careful)
                    def _look():
                        plgpu.barrier_wait(full[1].at[two])
                        pl.when(unclean_ref[b, h, tile + 1] > 0)(scrub)

                    def products(s_acc, *dp_acc):
                        plgpu.wgmma(s_acc, own_smem[0].at[zero, mine], streamed_smem[0].at[one].T)
                        pl.when(jnp.logical_not(careful))(lambda: plgpu.barrier_wait(full[1].at[two]))
                        if with_dp:
                            plgpu.wgmma(dp_acc[0], own_smem[1].at[zero, mine], streamed_smem[1].at[two].T)
                        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1 if with_dp else 0)
                        p, slope = weights(s)
                        keep = place.kept() if spec.dropout else None
                        dropped = lambda x: jnp.where(keep, x * spec.dropout.inverse_keep, 0.0) if spec.dropout else x
                        if not with_dp:
                            return dropped(p).astype(dtype)
                        dp = dp_acc[0][...]
                        plgpu.barrier_arrive(free[1].at[two])
                        dp = dropped(dp) - less()
                        ds = p * dp if slope is None else p * dp * slope
                        return ds.astype(dtype)

                    x = pl.run_scoped(products, *[plgpu.ACC(shape, jnp.float32)] * (1 + with_dp))
                    plgpu.wgmma(acc, x, streamed_smem[1].at[two] if which == 'dv' else streamed_smem[0].at[one])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free[0].at[one])
                    if not with_dp:
                        plgpu.barrier_arrive(free[1].at[two])
                    return then

                lax.fori_loop(0, count, step, entry(0))
                return acc[...]

            out = pl.run_scoped(accumulate, plgpu.ACC((64, width), jnp.float32))
            if which != 'dv':
                out = out * scale
            part = (own_smem[0] if out_smem is None else out_smem).at[0, mine]
            part[...] = out.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(part, out_ref.at[b, pl.ds(r0, 64), h])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == 2)
        def _load():
            plgpu.set_max_registers(24, action='decrease')
            own_head, other_head = (h // grouped, h) if by_key else (h, h // grouped)

            @plgpu.warp_map
            def _warp(warp):
                @pl.when(warp == 0)
                def _():
                    for ref, smem in zip(own_refs, own_smem):
                        if smem is not None:
                            plgpu.copy_gmem_to_smem(ref.at[b, pl.ds(i * OWN, OWN), own_head], smem.at[0], own_bar)

                    @pl.loop(0, count)
                    def _(j):
                        rows = pl.ds(entry(j) * STREAMED, STREAMED)
                        for n in range(2):
                            slot = lax.rem(j, stages[n])
                            pl.when(j >= stages[n])(lambda n=n, slot=slot: plgpu.barrier_wait(free[n].at[slot]))
                            source, target = streamed_refs[n].at[b, rows, other_head], streamed_smem[n].at[slot]
                            plgpu.copy_gmem_to_smem(source, target, full[n].at[slot])
                            if by_key and n == 0:
                                plgpu.copy_gmem_to_smem(lse_ref.at[b, h, rows], lse_smem.at[slot], full[0].at[slot])
                                plgpu.copy_gmem_to_smem(delta_ref.at[b, h, rows], delta_smem.at[slot], full[0].at[slot])

                    for n in range(2):

                        @pl.loop(jnp.maximum(count - stages[n], 0), count)
                        def _drain(j, n=n):
                            plgpu.barrier_wait(free[n].at[lax.rem(j, stages[n])])

    def entry_point(*refs):
        vectors = plgpu.SMEM((2, STREAMED), jnp.float32) if by_key else None
        pl.run_scoped(
            lambda *scratch: kernel(*refs, scratch),
            (
                common.swizzled((1, OWN, H), dtype),
                common.swizzled((1, OWN, own[1].shape[3]), dtype) if with_dp else None,
            ),
            tuple(common.swizzled((n, STREAMED, x.shape[3]), dtype) for n, x in zip(stages, streamed)),
            common.swizzled((1, OWN, width), dtype) if width != H else None,
            vectors,
            vectors,
            plgpu.Barrier(num_arrivals=1 + with_dp),
            (plgpu.Barrier(num_arrivals=1 + 2 * by_key, num_barriers=stages[0]), plgpu.Barrier(num_barriers=stages[1])),
            tuple(plgpu.Barrier(num_arrivals=2, num_barriers=n) for n in stages),
            plgpu.Barrier(num_arrivals=2),
            collective_axes='wg',
        )

    entry_point.__name__ = f'softmax_{which}'  # what profilers show
    return plgpu.kernel(
        entry_point,
        out_type=(
            jax.ShapeDtypeStruct((B, own[0].shape[1], N, width), dtype),
            jax.ShapeDtypeStruct((B, N, 2 * tiles), jnp.int32) if which == 'dk' else None,
        ),
        grid=order.shape,
        grid_names=('block',),
        num_threads=3,
        thread_name='wg',
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(own, streamed, lse, delta, unclean, lists, order, operands)
