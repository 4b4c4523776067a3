"""Forward kernel of softmax attention for Hopper.

A block works through (batch, head, query tile) items of `consumers` x 64 query rows, one block per multiprocessor and a
list of items for each where the work is known beforehand (`mosaic_gpu.agenda`). A producer warpgroup streams queries,
keys and values through rings, running ahead into the next item while the consumers finish the last. Each consumer
warpgroup issues S_j = Q K_j^T and then O += P_{j-1} V_{j-1}, and runs the softmax of S_j while that second product is
still on the tensor cores. Consumers take turns in issuing, so that one's softmax hides behind the other's products
(FlashAttention-3, arXiv:2407.08608). Which key tiles an item visits is a list made outside, those that need the mask
first; a kernel without a list visits all.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common
from pallas_kernels.common import LOG2E
from pallas_kernels.softmax_attention import functions

FLOOR = -1e30  # the running maximum's start: finite, so that a row that has seen nothing yields exp2(-inf - FLOOR) = 0


def forward(q, k, v, agenda, lists, operands, sinks, *, spec, tiles, scale):
    """softmax(score(scale * q k^T), masked) v.

    Args:
      q, k, v: [B, T', N, H], [B, S', K, H], [B, S', K, Hv], 16-bit; T' and S' padded to 8, H and Hv to 64.
      agenda: int32 [blocks, 1 + n]: per block the count of its items, and the items (b * N + h) * query tiles + tile.
      lists: int32 [B or 1, N or 1, query tiles, 2 + n]: how many key tiles to visit, how many of them with the mask,
        and the key tiles, those with the mask first; or None.
      operands: arrays of the mask and score functions, laid out by `functions.prepare`.
      sinks: float32 [N], or None.
      spec: `functions.Spec`, static.
      tiles: `tiles.Forward`, static.

    Returns:
      out [B, T', N, Hv] and the base-2 log-sum-exp [B, N, padded T] in float32.
    """
    B, T, N, H = q.shape
    S, K, Hv = k.shape[1], k.shape[2], v.shape[3]
    W, bkv, stages, dtype = tiles.consumers, tiles.keys, tiles.stages, q.dtype
    bq = 64 * W
    nq, nk = common.cdiv(T, bq), common.cdiv(S, bkv)
    group = N // K
    score, mask, dropout = spec.score, spec.mask, spec.dropout
    padded = (nq * bq, nk * bkv)
    shape = (64, bkv)
    c = scale * LOG2E
    stage_out = Hv <= 128  # else the output leaves through the queries' memory

    def kernel(q_ref, k_ref, v_ref, agenda_ref, lists_ref, operand_refs, sinks_ref, o_ref, lse_ref, scratch):
        q_smem, k_smem, v_smem, o_smem, q_bar, q_free, k_bar, v_bar, k_free, v_free, turn = scratch
        wg, block = lax.axis_index('wg'), lax.axis_index('block')

        def locate(n):
            """The n-th item of this block: batch, head, query tile, its counts, and its key tiles."""
            item = agenda_ref[block, n + 1]
            head, qi = lax.div(item, nq), lax.rem(item, nq)
            b, h = lax.div(head, N), lax.rem(head, N)
            if lists_ref is None:
                return b, h, qi, jnp.int32(nk), jnp.int32(0), lambda j: j
            row = (b if lists_ref.shape[0] > 1 else 0, h if lists_ref.shape[1] > 1 else 0, qi)
            return b, h, qi, lists_ref[(*row, 0)], lists_ref[(*row, 1)], lambda j: lists_ref[(*row, j + 2)]

        mine = agenda_ref[block, 0]

        @pl.when(wg < W)
        def _consume():
            plgpu.set_max_registers(tiles.registers[0], action='increase')

            def turn_wait():
                if tiles.turns:
                    plgpu.barrier_wait(turn.at[wg])

            def turn_pass():
                if tiles.turns:
                    plgpu.barrier_arrive(turn.at[lax.rem(wg + 1, W)])

            if tiles.turns:
                pl.when(wg == W - 1)(lambda: plgpu.barrier_arrive(turn.at[0]))

            @pl.loop(0, mine, init_carry=jnp.int32(0))
            def _item(n, base):
                b, h, qi, count, partial, entry = locate(n)
                q0 = qi * bq + wg * 64
                inputs = functions.Inputs(operand_refs, spec, b, h, padded, transposed=False)
                plgpu.barrier_wait(q_bar.at[wg])

                def softmax(s, tile, m, l, masked):
                    place = inputs.at(q0, tile * bkv, shape)
                    factor = c
                    if score:
                        s, factor = place.score(s, scale)
                        factor *= LOG2E
                    if mask:
                        s = lax.cond(masked, place.masked, lambda s: s, s)
                    m_new = jnp.maximum(m, s.max(axis=1) * factor)
                    alpha = jnp.exp2(m - m_new)
                    p = jnp.exp2(s * factor - common.row(m_new, shape))
                    l = l * alpha + p.sum(axis=1)
                    return p, m_new, l, alpha

                def used(p, tile):
                    """The weights as the value product takes them: made once no product reads the last ones."""
                    if dropout:
                        p = jnp.where(inputs.at(q0, tile * bkv, shape).kept(), p, 0.0)
                    return p.astype(dtype)

                def accumulate(o_acc):
                    def scores(acc, slot):
                        plgpu.barrier_wait(k_bar.at[slot])
                        turn_wait()
                        plgpu.wgmma(acc, q_smem.at[wg], k_smem.at[slot].T)

                    def run():
                        def first(acc):
                            slot = lax.rem(base, stages)
                            scores(acc, slot)
                            turn_pass()
                            s = acc[...]
                            plgpu.barrier_arrive(k_free.at[slot])
                            return s

                        s = pl.run_scoped(first, plgpu.ACC(shape, jnp.float32))
                        start = common.filled(64, FLOOR), common.filled(64, 0.0)
                        p, m, l, _ = softmax(s, entry(0), *start, partial > 0)
                        p = used(p, entry(0))

                        def step(j, carry):
                            p, m, l, tile = carry
                            following = entry(jnp.minimum(j + 1, count - 1))
                            slot, last = lax.rem(base + j, stages), lax.rem(base + j - 1, stages)

                            def products(acc):
                                scores(acc, slot)
                                plgpu.barrier_wait(v_bar.at[last])
                                plgpu.wgmma(o_acc, p, v_smem.at[last])
                                turn_pass()
                                s = plgpu.wgmma_accumulator_load(acc, wait_n=1)
                                plgpu.barrier_arrive(k_free.at[slot])
                                return s

                            s = pl.run_scoped(products, plgpu.ACC(shape, jnp.float32))
                            p, m, l, alpha = softmax(s, tile, m, l, j < partial)
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(v_free.at[last])
                            p = used(p, tile)
                            o = plgpu.wgmma_accumulator_load(o_acc, wait_n=None)
                            o_acc[...] = o * common.row(alpha, (64, Hv))
                            return p, m, l, following

                        carry = p, m, l, entry(jnp.minimum(1, count - 1))
                        p, m, l, _ = lax.fori_loop(1, count, step, carry)
                        if stage_out:
                            plgpu.barrier_arrive(q_free.at[wg])
                        last = lax.rem(base + count - 1, stages)
                        plgpu.barrier_wait(v_bar.at[last])
                        plgpu.wgmma(o_acc, p, v_smem.at[last])
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(v_free.at[last])
                        return m, l

                    def nothing():
                        if stage_out:
                            plgpu.barrier_arrive(q_free.at[wg])
                        return common.filled(64, FLOOR), common.filled(64, 0.0)

                    m, l = run() if lists_ref is None else lax.cond(count > 0, run, nothing)
                    alpha, empty = common.filled(64, 1.0), l == 0
                    if sinks_ref is not None:
                        sink = sinks_ref[h] * LOG2E
                        total = jnp.maximum(m, sink)
                        alpha = jnp.exp2(m - total)
                        l, m = l * alpha + jnp.exp2(sink - total), total
                    lse = jnp.where(empty, -jnp.inf, m + jnp.log2(l))
                    alpha *= jnp.where(empty, 0.0, (dropout.inverse_keep if dropout else 1.0) / l)
                    lse_ref.at[b, h, pl.ds(q0, 64)][...] = lse
                    return o_acc[...] * common.row(alpha, (64, Hv))

                out = pl.run_scoped(accumulate, plgpu.ACC((64, Hv), jnp.float32))
                staged = o_smem if stage_out else q_smem
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                staged.at[wg][...] = out.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staged.at[wg], o_ref.at[b, pl.ds(q0, 64), h])
                if not stage_out:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(q_free.at[wg])
                return base + count

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == W)
        def _produce():
            plgpu.set_max_registers(tiles.registers[1], action='decrease')

            @plgpu.warp_map
            def _warp(warp):
                @pl.when(warp == 0)
                def _keys():
                    @pl.loop(0, mine, init_carry=jnp.int32(0))
                    def _item(n, base):
                        b, h, _, count, _, entry = locate(n)
                        g = h // group

                        @pl.loop(0, count)
                        def _load(j):
                            i = base + j
                            slot = lax.rem(i, stages)
                            keys = pl.ds(entry(j) * bkv, bkv)
                            pl.when(i >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                            plgpu.copy_gmem_to_smem(k_ref.at[b, keys, g], k_smem.at[slot], k_bar.at[slot])
                            pl.when(i >= stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                            plgpu.copy_gmem_to_smem(v_ref.at[b, keys, g], v_smem.at[slot], v_bar.at[slot])

                        return base + count

                    @pl.loop(jnp.maximum(_item - stages, 0), _item)
                    def _drain(i):
                        plgpu.barrier_wait(k_free.at[lax.rem(i, stages)])
                        plgpu.barrier_wait(v_free.at[lax.rem(i, stages)])

                @pl.when(warp == 1)
                def _queries():
                    @pl.loop(0, mine)
                    def _item(n):
                        b, h, qi, *_ = locate(n)
                        for w in range(W):
                            pl.when(n > 0)(lambda w=w: plgpu.barrier_wait(q_free.at[w]))
                            rows = pl.ds(qi * bq + w * 64, 64)
                            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h], q_smem.at[w], q_bar.at[w])

                    for w in range(W):
                        plgpu.barrier_wait(q_free.at[w])

    def entry_point(*refs):
        pl.run_scoped(
            lambda *scratch: kernel(*refs, scratch),
            common.swizzled((W, 64, max(H, 0 if stage_out else Hv)), dtype),
            common.swizzled((stages, bkv, H), dtype),
            common.swizzled((stages, bkv, Hv), dtype),
            common.swizzled((W, 64, Hv), dtype) if stage_out else None,
            plgpu.Barrier(num_barriers=W),
            plgpu.Barrier(num_barriers=W),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=W, num_barriers=stages),
            plgpu.Barrier(num_arrivals=W, num_barriers=stages),
            plgpu.Barrier(num_barriers=W),
            collective_axes='wg',
        )

    return plgpu.kernel(
        entry_point,
        out_type=(
            jax.ShapeDtypeStruct((B, T, N, Hv), dtype),
            jax.ShapeDtypeStruct((B, N, nq * bq), jnp.float32),
        ),
        grid=(agenda.shape[0],),
        grid_names=('block',),
        num_threads=W + 1,
        thread_name='wg',
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(q, k, v, agenda, lists, operands, sinks)
