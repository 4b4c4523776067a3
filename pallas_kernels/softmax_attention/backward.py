"""Backward kernel of softmax attention for Hopper: dq, dk and dv in one sweep, bit-reproducible.

A block owns 128 keys of one query head, 64 per consumer warpgroup, and visits the query tiles of its list; keys that many
more queries see than others are shared by several blocks. Tiles
are transposed, [keys, queries]: S^T = K Q^T and dP^T = V dO^T stay in registers, where P^T and dS^T are the left
operands of dV += P^T dO and dK += dS^T Q; dS^T also goes to shared memory for dQ = dS K. Two warps take turns to
add dQ tiles to global memory in float32. The additions to one tile happen in an order fixed outside (`ranks`), kept by a
counter per tile, so that a second run is bit-equal; blocks start at different tiles, so that in the steady state none
waits. The key blocks of a head are neighbours in the grid, which keeps the head's dQ in the L2 cache.

What is not finite meets a zero weight only as 0: a block cleans its keys and values, and tiles that hold rows without
weight, or rows whose weights are all NaN, have those rows' q and do set to 0. NaN comes in by `base` alone.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common
from pallas_kernels.common import COL, LINES, LOG2E, ROW, TILE
from pallas_kernels.softmax_attention import functions

KEYS = 128  # keys a block, 64 per consumer


HIDDEN, PADDING = 1e30, 1e29  # base-2 log-sum-exp of rows without weight, and of rows that are not there


def backward(q, k, v, do, base, shift, lists, ranks, totals, operands, *, spec, tiles, scale, late, parts=0, tail=0):
    """Gradients of the logits' inputs.

    Args:
      q, k, v, do: [B, T', N, H], [B, S', K, H], [B, S', K, Hv], [B, T', N, Hv]; padded as in the forward kernel.
      base, shift: float32 [B, N, padded T]: what the sums of the products start from. base = -lse / scale, in base 2 lse is
        HIDDEN for rows that add nothing, NaN for rows that turn all they see into NaN, PADDING beyond T;
        shift = dlse - sum(o * do), finite.
      lists: int32 [B or 1, N or 1, blocks, 3 + n]: per block the count, the key tile, -1 or, where several blocks share
        that tile, the part that this one gives, and then 2 * query tile + partial.
      ranks: int32 [B or 1, N or 1, blocks, query tiles]: when a block's contribution is added to a dQ tile. With a `tail` [1,
        1 + tail, ...]: those of all other heads, and of each in it.
      totals: int32 [B or 1, N or 1, query tiles]: how many contributions each dQ tile gets.
      operands: arrays of the functions, laid out by `functions.prepare(..., transposed=True)`.
      late: as many heads behind its own a block finds one whose dQ tiles it makes 16-bit; as many launches have no keys.
      parts: how many blocks share a key tile with others.
      tail: of so many heads, the last ones, the first blocks are launched, then the second ones, and so on.

    Returns:
      dq [B, padded T, N, H]; dk [B, S', N, H] and dv [B, S', N, Hv], per query head, undefined in key tiles that blocks
      share; and where there are `parts`, theirs, [B, 128 parts, N, H] and [B, 128 parts, N, Hv].
    """
    B, T, N, H = q.shape
    S, K, Hv = k.shape[1], k.shape[2], v.shape[3]
    bq, stages, outs, dtype = tiles.queries, tiles.stages, 2, q.dtype
    nq, nk, blocks = common.cdiv(T, bq), common.cdiv(S, KEYS), lists.shape[2]
    group = N // K
    shape = (64, bq)
    c = scale * LOG2E
    least = -HIDDEN / 2 / c  # of base, where a row has weight
    by_rows = bq == 128  # dQ is shared out by query rows, else by columns of H
    half = (64, H) if by_rows else (64, H // 2)

    def kernel(q_ref, k_ref, v_ref, do_ref, base_ref, shift_ref, lists_ref, ranks_ref, totals_ref, operand_refs, *rest):
        narrow_ref, dq_ref, dk_ref, dv_ref, dk_part_ref, dv_part_ref, scratch = rest
        k_smem, v_smem, q_smem, do_smem, base_smem, shift_smem, ds_smem, dq_smem = scratch[:8]
        kv_bar, q_bar, q_free, ds_bar, dq_full, dq_free, scrubbed = scratch[8:]
        turns = pl.get_global(plgpu.SemaphoreType.REGULAR((B * N * nq,)))
        launched, place, wg = lax.axis_index('head'), lax.axis_index('block'), lax.axis_index('wg')
        of = lambda head: (lax.div(head, N), lax.rem(head, N))
        own = lambda ref, b, h: (b if ref.shape[0] > 1 else 0, h if ref.shape[1] > 1 else 0)
        attend = pl.when(launched < B * N)
        head, block = jnp.minimum(launched, B * N - 1), place
        if tail:
            first = B * N - tail
            turn = (head - first) * blocks + place
            block = jnp.where(head < first, place, lax.div(turn, tail))
            head = jnp.where(head < first, head, first + lax.rem(turn, tail))
        b, h = of(head)
        at = (*own(lists_ref, b, h), block)
        ranks_at = (0, jnp.maximum(head - first + 1, 0), block) if tail else (*own(ranks_ref, b, h), block)
        count, ki, part = (lists_ref[(*at, n)] for n in range(3))
        entry = lambda j: lists_ref[(*at, j + 3)]

        def narrowed(done):
            """The 16-bit dQ of one head, of which this warpgroup makes its share of the tiles."""
            b, h = of(done)

            @pl.loop(0, lax.div(nq - (2 * place + wg) + 2 * blocks - 1, 2 * blocks))
            def _(n):
                tile = 2 * place + wg + 2 * blocks * n
                total = totals_ref[(*own(totals_ref, b, h), tile)]
                plgpu.semaphore_wait(turns.at[done * nq + tile], total, decrement=False, memory_scope='gpu')
                for row in range(0, bq, 64):
                    part = (b, pl.ds(tile * bq + row, 64), h)
                    x = plgpu.load(dq_ref.at[part], layout=LINES, optimized=False)
                    narrow_ref.at[part][...] = jnp.where(total > 0, x * scale, 0.0).astype(dtype)

        def consume():
            mine = pl.ds(wg * 64, 64)
            k0 = ki * KEYS + wg * 64
            inputs = functions.Inputs(operand_refs, spec, b, h, (nq * bq, nk * KEYS), transposed=True)
            plgpu.barrier_wait(kv_bar)
            common.clean([k_smem.at[0, mine], v_smem.at[0, mine]])

            def addend(place):
                """What the accumulator of the logits may start with, beside the log-sum-exp: see `Place.addend`."""
                nothing = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), TILE)
                return place.addend(nothing, scale) if spec.score else {}

            def weights(s, place, e, slot, start):
                """P^T from the logits' products; and the score's slope."""
                slope = None
                if start is None:
                    s, factor, slope = place.score(s, scale, derivative=True)
                    base_col = plgpu.load(base_smem.at[slot], layout=COL, optimized=False)
                    p = jnp.exp2(s * (factor * LOG2E) + common.col(base_col * c, shape))
                else:
                    p = jnp.exp2(s * c + common.row(start['r'] * c, shape) if start else s * c)
                if spec.mask:

                    def hide(*tiles):
                        seen = place.visible()
                        return tuple(x if x is None else jnp.where(seen, x, 0.0) for x in tiles)

                    p, slope = lax.cond(lax.rem(e, 2) == 1, hide, lambda *tiles: tiles, p, slope)
                return p, slope

            def scrub(ref, base_ref):
                """Sets rows without a finite weight to 0."""
                for at in range(0, bq, 64):
                    rows = pl.ds(at, 64)
                    base_row = plgpu.load(base_ref.at[rows], layout=ROW, optimized=False)
                    for column in range(0, ref.shape[-1], 64):
                        part = ref.at[rows, pl.ds(column, 64)]
                        x = plgpu.load(part, layout=TILE).astype(jnp.float32)
                        part[...] = jnp.where(common.row(base_row, x.shape) > least, x, 0.0).astype(dtype)

            def accumulate(dk_acc, dv_acc):
                def step(j, e):
                    following = entry(jnp.minimum(j + 1, count - 1))
                    slot, buffer = lax.rem(j, stages), lax.rem(j, 2)
                    zero = common.opaque_zero()

                    plgpu.barrier_wait(q_bar.at[slot])

                    base_col = plgpu.load(base_smem.at[slot], layout=COL, optimized=False)

                    @pl.when(common.any_to(base_col, least) > 0)
                    def _scrub():
                        pl.when(wg == 0)(lambda: scrub(q_smem.at[slot], base_smem.at[slot]))
                        pl.when(wg == 1)(lambda: scrub(do_smem.at[slot], base_smem.at[slot]))
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(scrubbed)
                        plgpu.barrier_wait(scrubbed)

                    def logits(s_acc, dp_acc):
                        place = inputs.at((e // 2) * bq, k0, shape)
                        start = addend(place)
                        if start is not None:
                            s_acc[...] = common.col(base_col + start['c'] if start else base_col, shape)
                        if not spec.dropout:
                            dp_acc[...] = common.col(plgpu.load(shift_smem.at[slot], layout=COL, optimized=False), shape)
                        plgpu.wgmma(s_acc, k_smem.at[zero, mine], q_smem.at[slot].T)
                        plgpu.wgmma(dp_acc, v_smem.at[zero, mine], do_smem.at[slot].T)
                        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                        p, slope = weights(s, place, e, slot, start)
                        if spec.dropout:
                            keep = place.kept()
                            inverse = spec.dropout.inverse_keep
                            used = jnp.where(keep, p * inverse, 0.0).astype(dtype)
                        else:
                            used = p.astype(dtype)
                        dp = dp_acc[...]
                        if spec.dropout:
                            shift_col = plgpu.load(shift_smem.at[slot], layout=COL, optimized=False)
                            dp = jnp.where(keep, dp * inverse, 0.0) + common.col(shift_col, shape)
                        plgpu.wgmma(dv_acc, used, do_smem.at[slot])
                        ds = p * dp if slope is None else p * dp * slope
                        return ds.astype(dtype)

                    ds = pl.run_scoped(logits, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))
                    ds_smem.at[buffer, mine][...] = ds
                    common.publish()
                    plgpu.barrier_arrive(ds_bar)
                    plgpu.wgmma(dk_acc, ds, q_smem.at[slot])
                    plgpu.barrier_wait(ds_bar)

                    def queries(acc):
                        if by_rows:
                            plgpu.wgmma(acc, ds_smem.at[buffer, :, mine].T, k_smem.at[zero])
                        else:
                            columns = pl.ds(wg * (H // 2), H // 2)
                            plgpu.wgmma(acc, ds_smem.at[buffer].T, k_smem.at[zero, :, columns])
                        return acc[...]

                    dq = pl.run_scoped(queries, plgpu.ACC(half, jnp.float32))
                    plgpu.barrier_arrive(q_free.at[slot])
                    out = lax.rem(j, outs)
                    pl.when(j >= outs)(lambda: plgpu.barrier_wait(dq_free.at[out]))
                    if by_rows:
                        dq_smem.at[out, mine][...] = dq
                    else:
                        dq_smem.at[out, :, pl.ds(wg * (H // 2), H // 2)][...] = dq
                    common.publish()
                    plgpu.barrier_arrive(dq_full.at[out])
                    return following

                lax.fori_loop(0, count, step, entry(0))
                return dk_acc[...], dv_acc[...]

            dk, dv = pl.run_scoped(accumulate, plgpu.ACC((64, H), jnp.float32), plgpu.ACC((64, Hv), jnp.float32))
            # The last dQ products of both warpgroups read all of K: both must be through before it is overwritten.
            plgpu.barrier_arrive(ds_bar)
            plgpu.barrier_wait(ds_bar)
            v_smem.at[0, mine][...] = dv.astype(dtype)
            k_smem.at[0, mine][...] = (dk * scale).astype(dtype)
            plgpu.commit_smem()

            def store(dk_ref, dv_ref, tile):
                rows = pl.ds(tile * KEYS + wg * 64, 64)
                plgpu.copy_smem_to_gmem(v_smem.at[0, mine], dv_ref.at[b, rows, h])
                plgpu.copy_smem_to_gmem(k_smem.at[0, mine], dk_ref.at[b, rows, h])

            if parts:
                pl.when(part < 0)(lambda: store(dk_ref, dv_ref, ki))
                pl.when(part >= 0)(lambda: store(dk_part_ref, dv_part_ref, part))
            else:
                store(dk_ref, dv_ref, ki)

            @pl.loop(jnp.maximum(count - outs, 0), count)
            def _drain(j):
                plgpu.barrier_wait(dq_free.at[lax.rem(j, outs)])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def move():
            g = h // group

            @plgpu.warp_map
            def _warp(warp):
                @pl.when(warp == 0)
                def _load():
                    keys = pl.ds(ki * KEYS, KEYS)
                    plgpu.copy_gmem_to_smem(k_ref.at[b, keys, g], k_smem.at[0], kv_bar)
                    plgpu.copy_gmem_to_smem(v_ref.at[b, keys, g], v_smem.at[0], kv_bar)

                    @pl.loop(0, count)
                    def _(j):
                        slot = lax.rem(j, stages)
                        rows = pl.ds((entry(j) // 2) * bq, bq)
                        pl.when(j >= stages)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h], q_smem.at[slot], q_bar.at[slot])
                        plgpu.copy_gmem_to_smem(base_ref.at[b, h, rows], base_smem.at[slot], q_bar.at[slot])
                        plgpu.copy_gmem_to_smem(shift_ref.at[b, h, rows], shift_smem.at[slot], q_bar.at[slot])
                        plgpu.copy_gmem_to_smem(do_ref.at[b, rows, h], do_smem.at[slot], q_bar.at[slot])

                    @pl.loop(jnp.maximum(count - stages, 0), count)
                    def _(j):
                        plgpu.barrier_wait(q_free.at[lax.rem(j, stages)])

                # One addition takes about as long as a step: waiting for the turn, the copy, telling the next. Hence two.
                @pl.when((warp == 1) | (warp == 2))
                def _add():
                    out = warp - 1

                    @pl.loop(0, lax.div(count - out + 1, 2))
                    def _(n):
                        j = 2 * n + out
                        tile = entry(j) // 2
                        rank = ranks_ref[(*ranks_at, tile)]
                        turn = turns.at[head * nq + tile]
                        target = dq_ref.at[b, pl.ds(tile * bq, bq), h]
                        plgpu.barrier_wait(dq_full.at[out])
                        plgpu.semaphore_wait(turn, rank, decrement=False, memory_scope='gpu')
                        first = rank == 0
                        pl.when(first)(lambda: plgpu.copy_smem_to_gmem(dq_smem.at[out], target))
                        add = lambda: plgpu.copy_smem_to_gmem(dq_smem.at[out], target, reduction_op='add')
                        pl.when(jnp.logical_not(first))(add)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        plgpu.barrier_arrive(dq_free.at[out])
                        plgpu.wait_smem_to_gmem(0)
                        plgpu.semaphore_signal(turn, 1, memory_scope='gpu')

        @pl.when(wg < 2)
        def _consume():
            plgpu.set_max_registers(tiles.registers[0], action='increase')
            pl.when(launched >= late)(lambda: narrowed(launched - late))
            attend(consume)

        @pl.when(wg == 2)
        def _move():
            plgpu.set_max_registers(tiles.registers[1], action='decrease')
            attend(move)

    def entry_point(*refs):
        pl.run_scoped(
            lambda *scratch: kernel(*refs, scratch),
            common.swizzled((1, KEYS, H), dtype),
            common.swizzled((1, KEYS, Hv), dtype),
            common.swizzled((stages, bq, H), dtype),
            common.swizzled((stages, bq, Hv), dtype),
            plgpu.SMEM((stages, bq), jnp.float32),
            plgpu.SMEM((stages, bq), jnp.float32),
            common.swizzled((2, KEYS, bq), dtype),
            common.swizzled((outs, bq, H), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=outs),
            plgpu.Barrier(num_barriers=outs),
            plgpu.Barrier(num_arrivals=2),
            collective_axes='wg',
        )

    keys = lambda rows: [jax.ShapeDtypeStruct((B, rows, N, width), dtype) if rows else None for width in (H, Hv)]
    entry_point.__name__ = 'softmax_backward'  # what profilers show
    found = plgpu.kernel(
        entry_point,
        out_type=(*(jax.ShapeDtypeStruct((B, nq * bq, N, H), x) for x in (dtype, jnp.float32)), *keys(S), *keys(parts * KEYS)),
        grid=(B * N + late, blocks),
        grid_names=('head', 'block'),
        num_threads=3,
        thread_name='wg',
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(q, k, v, do, base, shift, lists, ranks, totals, operands)
    return tuple(x for n, x in enumerate(found) if x is not None and n != 1)
