"""One sweep of a state that two queries read, or that two keys write: what gives two gradients of the delta rule at once.

    S_t = a_t S_{t-1} + k_t^T v_t [- k'_t^T v'_t]        o_t = q_t S_t        o'_t = -q'_t S_t

backward in time with a_{t+1} S_{t+1}. The second of either is subtracted, and leaves out what a token has from itself. Forward
in time, with q = do, q' = w, k = u and v the keys, these are dq and the part of dk that states make; backward in time, with
q = u, k = do, v the queries, k' = w and v' the keys, S is the adjoint of the state and o the rest of dk.

A block computes a head and each consumer warpgroup owns 64 columns of v, hence of the state, as in `gated_linear.sweep`.
Queries, keys and values have rings of their own: all of them twice do not fit, and queries are read for the last time in the
middle of a chunk. Arrays of two terms, the state's copies, weights of pairs and decayed values are known to 16 bits.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common
from pallas_kernels.common import ROW, TILE
from pallas_kernels.gated_linear import accumulate
from pallas_kernels.gated_linear.sweep import CHUNK, SQUARE

TERMS = 2
block = lambda i: pl.ds(64 * i, 64)


def slots(budget: int, *sizes: int) -> list[int]:
    """One slot or two of each, the first ones first, of these sizes."""
    found = [1] * len(sizes)
    for n in range(len(sizes)):
        found[n] += sum(map(int.__mul__, found, sizes)) + sizes[n] <= budget
    return found


@common.lowered_once('dots', 'reverse', 'scale', 'interpret')
def joint(
    queries, keys, values, decay, state, partner=None, base=None, *, dots=False, reverse=False, scale=1.0, interpret=False
):
    """Runs the recurrence over all tokens.

    Args:
      queries, keys: one or two, each a tuple of one or two terms [B, T', N, K], bfloat16, K 64 or 128, T' a multiple of 64.
      values: as many as keys, [B, T', Nv, V], V 64 or 128, Nv a divisor of N.
      decay: as `sweep` takes it, or None.
      state: float32 [B, N, K, V] before the sweep's first token, or None for zero.
      partner: [B, T', Np, V], where there are dots and two queries, of the first; that of the last query is the last value.
      base: float32 [B, T', N, V] that is added to the first result, after the scale, or None.
      dots: wanted.
      scale: multiplies results (not dots).

    Returns:
      out: of each query [B, T', N, V], bfloat16 of the first, float32 of the second.
      dots: float32 [B, N, V / 64, T'], sums over 64 columns of partner_t o_t and what both queries have, not scaled and
        without what a token has from itself; or None.
    """
    partner = partner if dots and len(queries) == 2 else None
    (B, T, N, K), V, dtype = keys[0][0].shape, values[0].shape[3], keys[0][0].dtype
    chunks, W, depth = T // CHUNK, V // 64, K // 64
    flat = lambda x: jax.tree.leaves(x)
    room = max(K, 64 * len(values))  # decayed values come where copies of the state lay, when these were read
    tile = 2 * CHUNK * 64
    sizes = len(flat(keys)) * depth, len(values) * W, len(flat(queries)) * depth + W * (partner is not None)
    budget = common.SMEM_LIMIT - 3072 - 2 * TERMS * W * 64 * room
    key_ring, value_ring, query_ring = (min(n, chunks) for n in slots(budget // tile, *sizes))
    arrivals = len(flat(keys)) + (decay is not None), len(values) * W, len(flat(queries)) + W * (partner is not None)

    def kernel(*refs_and_scratch):
        *refs, (q_smem, k_smem, v_smem, p_smem, g_smem, s_smem, k_full, v_full, q_full, k_free, v_free, q_free) = (
            refs_and_scratch
        )
        q_ref, k_ref, v_ref, decay_ref, state_ref, partner_ref, base_ref, out_refs, dots_ref = refs
        b, h, wg = lax.axis_index('b'), lax.axis_index('h'), lax.axis_index('wg')
        place = lambda step: chunks - 1 - step if reverse else step

        @pl.when(wg < W)
        def _consume():
            if W > 1 and not interpret:
                plgpu.set_max_registers(232, action='increase')
            split = functools.partial(accumulate.split, terms=TERMS, dtype=dtype)
            multiply = functools.partial(accumulate.multiply, terms=TERMS)
            wide = lambda ref: plgpu.load(ref, layout=TILE).astype(jnp.float32)

            def fresh(n):
                """The number, of which the compiler keeps nothing that it makes of it: addresses and masks fill registers."""
                return n if interpret else n + common.opaque_zero()

            def earlier(strict):
                i, j = (plgpu.broadcasted_iota(jnp.int32, SQUARE, dim, layout=TILE) for dim in (0, 1))
                j = fresh(j)
                now, then = (j, i) if reverse else (i, j)
                return now > then if strict else now >= then

            def read_by_all():
                """Before memory is written that products have read."""
                if not interpret:
                    common.together()

            def keep_copy(S):
                read_by_all()
                at = fresh(wg)
                for i in range(depth):
                    for term, part in enumerate(split(S[i])):
                        s_smem.at[at, term, block(i)][...] = part
                plgpu.commit_smem()

            def step(s, S):
                c = place(s)
                rows, cols = pl.ds(c * CHUNK, CHUNK), block(fresh(wg))
                k_slot, v_slot, q_slot = (lax.rem(s, ring) for ring in (key_ring, value_ring, query_ring))
                plgpu.barrier_wait(k_full.at[k_slot])
                plgpu.barrier_wait(q_full.at[q_slot])
                plgpu.barrier_wait(v_full.at[v_slot])
                decays = lambda: accumulate.Decay(g_smem.at[fresh(k_slot)], reverse)
                query_of = lambda r: [x.at[fresh(q_slot)] for x in q_smem[r]]
                value_of = lambda w: v_smem[w].at[fresh(v_slot), fresh(wg)]
                partner_of = lambda r: value_of(-1) if p_smem is None or r else p_smem.at[fresh(q_slot), fresh(wg)]

                def base_of(r):
                    if base_ref is None or r:
                        return None
                    return plgpu.load(base_ref.at[b, rows, h, cols], layout=TILE, optimized=False)

                def compare(r, w):
                    """The weights of pairs, as terms; the dots with what tokens have from others of the chunk."""

                    def run(acc, *products):
                        multiply(acc, query_of(r), [x.at[fresh(k_slot)].T for x in k_smem[w]])
                        for product in products:
                            product.add(partner_of(r), value_of(w).T)
                        x = acc.load(len(products))
                        x = x if decay is None else x * decayed
                        x, y = jnp.where(earlier(r + w > 0), -x if w else x, 0.0), None
                        for product in products:
                            y = x * product.load(0)
                            y = (y if r + w else jnp.where(earlier(True), y, 0.0)).sum(axis=1)
                        return split(x), y

                    return accumulate.scoped(run, *[SQUARE] * (1 + dots), interpret=interpret)

                def read_state(r, weights, met):
                    """What query r has, in float32; the dots with all that tokens have from others."""

                    def run(acc):
                        multiply(acc, query_of(r), [s_smem.at[fresh(wg), n, pl.ds(0, K)] for n in range(TERMS)])
                        added = base_of(r)
                        found = acc.load(0)
                        found = found if decay is None else found * common.row(decays().read(), SQUARE)
                        total = sum(met, (found * wide(partner_of(r))).sum(axis=1)) if dots else None
                        acc.set(found)
                        for w, terms in enumerate(weights):
                            multiply(acc, terms, [value_of(w)])
                        out = acc.load(0) * (-scale if r else scale)
                        return out if added is None else out + added, total

                    return accumulate.scoped(run, SQUARE, interpret=interpret)

                def enter():
                    """What the keys write, decayed to the chunk's end and with its sign, as terms in memory."""
                    found = []
                    for w in range(len(values)):
                        of = value_of(w)
                        if decay is None and not w:
                            found.append([of])
                            continue
                        x = -wide(of) if w else wide(of)
                        terms = [x.astype(dtype)] if decay is None else split(x * common.row(decays().write(ROW), SQUARE))
                        first = TERMS * w * (decay is not None)
                        for n, term in enumerate(terms):
                            spot(first + n)[...] = term
                        found.append([spot(first + n) for n in range(len(terms))])
                    return found

                def write_state(*accumulators):
                    for i, acc in enumerate(accumulators):
                        for w, right in enumerate(entering):
                            multiply(acc, [x.at[k_slot, :, block(i)].T for x in k_smem[w]], right)
                    plgpu.copy_smem_to_gmem(staged(), out_refs[0].at[b, rows, h, cols])
                    whole = 1.0 if decay is None else decays().total()
                    # Not summed onto the state by the tensor core, which cuts digits off where an addition would round.
                    return tuple(whole * x + acc.load(0) for x, acc in zip(S, accumulators))

                decayed = None if decay is None else decays().pairs()
                total = None
                for r in reversed(range(len(queries))):
                    result, felt = read_state(r, *zip(*(compare(r, w) for w in range(len(keys)))))
                    if r:
                        out_refs[r].at[b, rows, h, cols][...] = result
                    if dots:
                        total = felt if total is None else felt - total
                plgpu.barrier_arrive(q_free.at[q_slot])
                if dots:
                    dots_ref.at[b, h, fresh(wg), rows][...] = total
                spot = lambda n: s_smem.at[fresh(wg), n % TERMS, block(n // TERMS)]
                # The first result leaves from where a value was that entered, which only this warpgroup reads.
                staged = lambda: spot(1) if decay is None else value_of(0)
                read_by_all()
                entering = enter()
                staged()[...] = result.astype(dtype)
                plgpu.commit_smem()
                S = accumulate.scoped(write_state, *[SQUARE] * depth, interpret=interpret)
                plgpu.barrier_arrive(k_free.at[k_slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(v_free.at[v_slot])
                keep_copy(S)
                return S

            if state_ref is None:
                S = tuple(plgpu.layout_cast(jnp.zeros(SQUARE, jnp.float32), TILE) for _ in range(depth))
            else:
                S = tuple(
                    plgpu.load(state_ref.at[b, h, block(i), block(wg)], layout=TILE, optimized=False) for i in range(depth)
                )
            keep_copy(S)
            lax.fori_loop(0, chunks, step, S)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == W)
        def _produce():
            if W > 1 and not interpret:
                plgpu.set_max_registers(40, action='decrease')

            @plgpu.warp_map
            def _warp(warp):
                @pl.when(warp == 0)
                def _():
                    rings = (key_ring, k_free), (query_ring, q_free), (value_ring, v_free)

                    @pl.loop(0, chunks)
                    def _load(s):
                        c = place(s)
                        tokens = lambda ref: ref.at[b, pl.ds(c * CHUNK, CHUNK), h // (N // ref.shape[2])]
                        k_slot, q_slot, v_slot = slots = [lax.rem(s, ring) for ring, _ in rings]

                        def ready(n):
                            ring, free = rings[n]
                            pl.when(s >= ring)(lambda: plgpu.barrier_wait(free.at[slots[n]]))

                        def parts(ref, smem, slot, full):
                            for w in range(W):
                                plgpu.copy_gmem_to_smem(tokens(ref).at[:, block(w)], smem.at[slot, w], full.at[slot])

                        ready(0)
                        for ref, smem in zip(flat(k_ref), flat(k_smem)):
                            plgpu.copy_gmem_to_smem(tokens(ref), smem.at[k_slot], k_full.at[k_slot])
                        if decay_ref is not None:
                            at = [x if n > 1 else 0 for x, n in zip((b, h, c), decay_ref.shape)]
                            plgpu.copy_gmem_to_smem(decay_ref.at[*at], g_smem.at[k_slot], k_full.at[k_slot])
                        ready(1)
                        for ref, smem in zip(flat(q_ref), flat(q_smem)):
                            plgpu.copy_gmem_to_smem(tokens(ref), smem.at[q_slot], q_full.at[q_slot])
                        if p_smem is not None:
                            parts(partner_ref, p_smem, q_slot, q_full)
                        ready(2)
                        for ref, smem in zip(v_ref, v_smem):
                            parts(ref, smem, v_slot, v_full)

                    for ring, free in rings:

                        @pl.loop(max(chunks - ring, 0), chunks)
                        def _drain(s, ring=ring, free=free):
                            plgpu.barrier_wait(free.at[lax.rem(s, ring)])

    def entry_point(*refs):
        ringed = lambda ring, *shape: common.swizzled((ring, *shape), dtype)
        halves = lambda ring: ringed(ring, W, CHUNK, 64)
        barriers = [
            plgpu.Barrier(num_arrivals=n, num_barriers=ring) for n, ring in zip(arrivals, (key_ring, value_ring, query_ring))
        ]
        pl.run_scoped(
            lambda *scratch: kernel(*refs, scratch),
            jax.tree.map(lambda _: ringed(query_ring, CHUNK, K), queries),
            jax.tree.map(lambda _: ringed(key_ring, CHUNK, K), keys),
            tuple(halves(value_ring) for _ in values),
            None if partner is None else halves(query_ring),
            None if decay is None else plgpu.SMEM((key_ring, 2, CHUNK), jnp.float32),
            ringed(W, TERMS, room, 64),
            *barriers,
            *(plgpu.Barrier(num_arrivals=W, num_barriers=ring) for ring in (key_ring, value_ring, query_ring)),
            collective_axes='wg',
        )

    entry_point.__name__ = 'joint' + '_back' * reverse  # what profilers show
    return plgpu.kernel(
        entry_point,
        out_type=(
            tuple(jax.ShapeDtypeStruct((B, T, N, V), x) for x, _ in zip((dtype, jnp.float32), queries)),
            jax.ShapeDtypeStruct((B, N, W, T), jnp.float32) if dots else None,
        ),
        grid=(B, N),
        grid_names=('b', 'h'),
        num_threads=W + 1,
        thread_name='wg',
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # two a store; `read_by_all` stands where threads must wait
        ),
        **common.interpreted(interpret),
    )(queries, keys, values, decay, state, partner, base)
