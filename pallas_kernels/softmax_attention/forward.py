"""Forward kernel of softmax attention for Hopper.

One block computes `consumers` x 64 query rows of one head. A producer warp streams key and value tiles through two
rings; each consumer warpgroup issues S_j = Q K_j^T and then O += P_{j-1} V_{j-1}, and runs the softmax of S_j while that
second product is still on the tensor cores. Consumers take turns in issuing, so that one's softmax hides behind the
other's products (FlashAttention-3, arXiv:2407.08608). Which key tiles a block visits, and whether it must mask them, is
a list made outside; a kernel without a list visits all.
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


def forward(q, k, v, lists, operands, sinks, *, spec, tiles, scale):
    """softmax(score(scale * q k^T), masked) v.

    Args:
      q, k, v: [B, T', N, H], [B, S', K, H], [B, S', K, Hv], 16-bit; T' and S' padded to 8, H and Hv to 64.
      lists: int32 [B or 1, N or 1, query tiles, 1 + n]: the count and then 2 * key tile + partial; or None.
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
    c = LOG2E if score else scale * LOG2E

    def kernel(q_ref, k_ref, v_ref, lists_ref, operand_refs, sinks_ref, o_ref, lse_ref, scratch):
        q_smem, k_smem, v_smem, o_smem, q_bar, k_bar, v_bar, k_free, v_free, turn = scratch
        b, h = lax.axis_index('b'), lax.axis_index('h')
        qi = nq - 1 - lax.axis_index('q')  # causal masks: longest first
        wg = lax.axis_index('wg')
        if lists_ref is None:
            count = jnp.int32(nk)
            entry = lambda j: 2 * j
        else:
            at = (b if lists_ref.shape[0] > 1 else 0, h if lists_ref.shape[1] > 1 else 0, qi)
            count = lists_ref[(*at, 0)]
            entry = lambda j: lists_ref[(*at, j + 1)]

        @pl.when(wg < W)
        def _consume():
            plgpu.set_max_registers(tiles.registers[0], action='increase')
            q0 = qi * bq + wg * 64
            inputs = functions.Inputs(operand_refs, spec, b, h, padded, transposed=False)

            def turn_wait():
                if tiles.turns:
                    plgpu.barrier_wait(turn.at[wg])

            def turn_pass():
                if tiles.turns:
                    plgpu.barrier_arrive(turn.at[lax.rem(wg + 1, W)])

            if tiles.turns:
                pl.when(wg == W - 1)(lambda: plgpu.barrier_arrive(turn.at[0]))

            def softmax(s, e, m, l):
                k0 = (e // 2) * bkv
                place = inputs.at(q0, k0, shape)
                if score:
                    s = place.score(s * scale)
                if mask:
                    s = lax.cond(lax.rem(e, 2) == 1, place.masked, lambda s: s, s)
                m_new = jnp.maximum(m, s.max(axis=1) * c)
                alpha = jnp.exp2(m - m_new)
                p = jnp.exp2(s * c - common.row(m_new, shape))
                l = l * alpha + p.sum(axis=1)
                if dropout:
                    p = jnp.where(place.kept(), p, 0.0)
                return p.astype(dtype), m_new, l, alpha

            def accumulate(o_acc):
                def scores(acc, slot):
                    plgpu.barrier_wait(k_bar.at[slot])
                    turn_wait()
                    plgpu.wgmma(acc, q_smem.at[wg], k_smem.at[slot].T)

                def run():
                    def first(acc):
                        scores(acc, 0)
                        turn_pass()
                        s = acc[...]
                        plgpu.barrier_arrive(k_free.at[0])
                        return s

                    plgpu.barrier_wait(q_bar)
                    s = pl.run_scoped(first, plgpu.ACC(shape, jnp.float32))
                    p, m, l, _ = softmax(s, entry(0), common.filled(64, FLOOR), common.filled(64, 0.0))

                    def step(j, carry):
                        p, m, l, e = carry
                        following = entry(jnp.minimum(j + 1, count - 1))
                        slot, last = lax.rem(j, stages), lax.rem(j - 1, stages)

                        def products(acc):
                            scores(acc, slot)
                            plgpu.barrier_wait(v_bar.at[last])
                            plgpu.wgmma(o_acc, p, v_smem.at[last])
                            turn_pass()
                            s = plgpu.wgmma_accumulator_load(acc, wait_n=1)
                            plgpu.barrier_arrive(k_free.at[slot])
                            return s

                        s = pl.run_scoped(products, plgpu.ACC(shape, jnp.float32))
                        p, m, l, alpha = softmax(s, e, m, l)
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(v_free.at[last])
                        o = plgpu.wgmma_accumulator_load(o_acc, wait_n=None)
                        o_acc[...] = o * common.row(alpha, (64, Hv))
                        return p, m, l, following

                    p, m, l, _ = lax.fori_loop(1, count, step, (p, m, l, entry(jnp.minimum(1, count - 1))))
                    last = lax.rem(count - 1, stages)
                    plgpu.barrier_wait(v_bar.at[last])
                    plgpu.wgmma(o_acc, p, v_smem.at[last])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(v_free.at[last])
                    return m, l

                def nothing():
                    plgpu.barrier_wait(q_bar)
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
            staged = q_smem if o_smem is None else o_smem  # this warpgroup's queries are read for the last time above
            staged.at[wg][...] = out.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged.at[wg], o_ref.at[b, pl.ds(q0, 64), h])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == W)
        def _produce():
            plgpu.set_max_registers(tiles.registers[1], action='decrease')
            g = h // group

            @plgpu.warp_map
            def _warp(warp):
                @pl.when(warp == 0)
                def _():
                    for w in range(W):
                        plgpu.copy_gmem_to_smem(
                            q_ref.at[b, pl.ds(qi * bq + w * 64, 64), h], q_smem.at[w], q_bar
                        )

                    @pl.loop(0, count)
                    def _load(j):
                        slot = lax.rem(j, stages)
                        keys = pl.ds((entry(j) // 2) * bkv, bkv)

                        @pl.when(j >= stages)
                        def _():
                            plgpu.barrier_wait(k_free.at[slot])

                        plgpu.copy_gmem_to_smem(k_ref.at[b, keys, g], k_smem.at[slot], k_bar.at[slot])

                        @pl.when(j >= stages)
                        def _():
                            plgpu.barrier_wait(v_free.at[slot])

                        plgpu.copy_gmem_to_smem(v_ref.at[b, keys, g], v_smem.at[slot], v_bar.at[slot])

                    @pl.loop(jnp.maximum(count - stages, 0), count)
                    def _drain(j):
                        slot = lax.rem(j, stages)
                        plgpu.barrier_wait(k_free.at[slot])
                        plgpu.barrier_wait(v_free.at[slot])

    def entry_point(*refs):
        pl.run_scoped(
            lambda *scratch: kernel(*refs, scratch),
            common.swizzled((W, 64, H), dtype),
            common.swizzled((stages, bkv, H), dtype),
            common.swizzled((stages, bkv, Hv), dtype),
            common.swizzled((W, 64, Hv), dtype) if Hv != H else None,
            plgpu.Barrier(num_arrivals=W),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=W, num_barriers=stages),
            plgpu.Barrier(num_arrivals=W, num_barriers=stages),
            plgpu.Barrier(num_barriers=W),
            collective_axes='wg',
        )

    sizes = {'b': B, 'h': N, 'q': nq}
    return plgpu.kernel(
        entry_point,
        out_type=(
            jax.ShapeDtypeStruct((B, T, N, Hv), dtype),
            jax.ShapeDtypeStruct((B, N, nq * bq), jnp.float32),
        ),
        grid=tuple(sizes[n] for n in tiles.order),
        grid_names=tuple(tiles.order),
        num_threads=W + 1,
        thread_name='wg',
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(q, k, v, lists, operands, sinks)
