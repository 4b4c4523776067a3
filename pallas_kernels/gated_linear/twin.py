"""The sweep of (q, k, v), and in the same one that of (p, v, k), whose state is the same transposed.

    S_t = a_t S_{t-1} + k_t^T v_t    o_t = q_t S_t    r_t = p_t S_t^T

Backward in time, with q = v, k = do, v = q and p = k, these are dk and dv. As in `sweep` a block computes a head and each
consumer warpgroup owns 64 columns of the state. For r it also reads what the other one keeps, so they meet twice a chunk:
before they read the state's copies, and before decayed values and results take their place. Copies are made while pairs are
compared, decayed values while the state is read.
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

TERMS = 3  # of a float32 number
block = lambda i: pl.ds(64 * i, 64)


def takes(K: int, V: int) -> bool:
    """Whether states of these widths, multiples of 64, are swept so."""
    return K == V and K <= 128


@common.lowered_once('both', 'reverse', 'precise', 'exact', 'terms', 'every', 'scale', 'interpret')
def twin(
    q,
    k,
    v,
    decay,
    state,
    partner=None,
    against=None,
    *,
    both=True,
    reverse=False,
    precise=False,
    exact=False,
    terms=TERMS,
    every=None,
    scale=1.0,
    interpret=False,
):
    """Runs one or both recurrences over all tokens.

    Args:
      q, k, v, decay, state, against, reverse, every, scale: as `sweep` takes them, one array each, of widths that `takes`.
      partner: p, [B, T', Np, V], or None where neither r nor dots are wanted.
      both: r is wanted.
      precise: the state is multiplied by q as three 16-bit terms, and dots are wanted.
      exact: as of `sweep`.
      terms: 16-bit terms that decayed values enter the state as: three are float32, one or two good for results of 16 bits, and
        states are not emitted.

    Returns:
      out, r: [B, T', N, V], [B, T', N, K], bfloat16; r is None without `both`.
      states: as of `sweep`; with `against` the last, float32 [B, N, 1, K, V]; None where terms are fewer than three.
      met: with `against`, float32 [B, N, groups, V / 64, 64], as of `sweep`; else None.
      dots: if precise, as of `sweep`; else None.
    """
    (B, T, _, K), V, dtype = k.shape, v.shape[3], k.dtype
    arrays = (q, k, v) if partner is None else (q, k, v, partner)
    N = max(x.shape[2] for x in arrays)
    chunks, W = common.cdiv(T, CHUNK), V // 64
    every = min(every or chunks, chunks)
    read_decay = accumulate.Exact if exact else accumulate.Decay
    constant = decay is not None and decay.shape[2] == 1 and not (both or precise)  # else there are no registers to keep it in
    copies, decayed = TERMS if precise else 1, terms * (decay is not None)
    per = max(copies, common.cdiv(decayed + 1 + both, W))  # where copies lay, decayed values and results come
    ring = min(4, chunks, (common.SMEM_LIMIT - 3072 - 2 * per * K * V) // (2 * CHUNK * sum(x.shape[3] for x in arrays)))

    def kernel(*refs_and_scratch):
        *refs, (smem, g_smem, s_smem, full, free, kept, read) = refs_and_scratch
        sources, (decay_ref, state_ref, against_ref, *results) = refs[: len(arrays)], refs[len(arrays) :]
        out_ref, other_ref, states_ref, met_ref, dots_ref = results
        q_smem, k_smem, v_smem, p_smem = (*smem, None)[:4]
        b, h, wg = lax.axis_index('b'), lax.axis_index('h'), lax.axis_index('wg')
        place = lambda step: chunks - 1 - step if reverse else step

        @pl.when(wg < W)
        def _consume():
            if W > 1 and not interpret:
                plgpu.set_max_registers(232, action='increase')
            mine = block(wg)
            spot = lambda at, n: s_smem.at[at, n % per, block(n // per)]  # where decayed values and results are kept
            split = functools.partial(accumulate.split, dtype=dtype)

            shared = accumulate.Kept(read_decay(common.entry(decay_ref, b, h, 0), reverse)) if constant else None

            def within(strict):
                i, j = (plgpu.broadcasted_iota(jnp.int32, SQUARE, dim, layout=TILE) for dim in (0, 1))
                later = j if reverse else i
                return later > (i if reverse else j) if strict else later >= (i if reverse else j)

            def step(s, S):
                slot, c = lax.rem(s, ring), place(s)
                rows = pl.ds(c * CHUNK, CHUNK)
                here = wg if interpret else wg + common.opaque_zero()
                mine = block(here)
                plgpu.barrier_wait(full.at[slot])
                decays = shared if g_smem is None else read_decay(g_smem.at[slot], reverse)

                def keep_copy():
                    for i in range(W):
                        for term, part in enumerate(split(S[i], copies, nearest=both or copies < TERMS)):
                            s_smem.at[here, term, block(i)][...] = part
                    if not both:
                        return plgpu.commit_smem()
                    if not interpret:
                        common.publish()
                    plgpu.barrier_arrive(kept)

                def meet_other():
                    of = lambda i: against_ref.at[b, h, c // every, block(i), mine]
                    parts = [S[i] * plgpu.load(of(i), layout=TILE, optimized=False) for i in range(W)]
                    met_ref.at[b, h, c // every, here][...] = sum(parts[1:], parts[0]).sum(axis=1)

                def compare(weights, products):
                    """The weights of pairs for out and for r; the dots of what tokens have from others of the chunk."""
                    weights.add(q_smem.at[slot], k_smem.at[slot].T)
                    if both or precise:
                        of = (slot,) if both else (slot, slice(None), mine)
                        products.add(p_smem.at[*of], v_smem.at[*of].T)
                    # A branch, before which the compiler does not begin what is to run beside the products. Where results left
                    # from, the state's copies come.
                    pl.when(s > 0)(lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True))
                    keep_copy()
                    pairs = jnp.where(within(False), 1.0 if decays is None else decays.pairs(), 0.0)
                    x, y = weights.load(int(both or precise)) * pairs, products.load()
                    dots = None
                    if precise:  # every warpgroup has all of these, and halves add up exactly
                        dots = jnp.where(within(True), x * y, 0.0).sum(axis=1) * (1 / W if both else 1.0)
                    return [x.astype(dtype) for x in ((x, y * pairs) if both else (x,))], dots

                def read_state(*accumulators):
                    out, other = (*accumulators, None)[:2]
                    for term in reversed(range(copies)):
                        out.add(q_smem.at[slot], s_smem.at[here, term])
                    for i in range(W if both else 0):
                        other.add(p_smem.at[slot, :, block(i)], s_smem.at[i, 0, mine].T)
                    if against_ref is not None:
                        reached = (lax.rem(c + 1, every) == 0) | (c == chunks - 1) if reverse else lax.rem(c, every) == 0
                        pl.when(reached)(meet_other)
                    terms = None if both else decayed_values()  # meanwhile, where there are registers
                    found = [acc.load(W * (both and n == 0)) for n, acc in enumerate(accumulators)]
                    if both:
                        plgpu.barrier_arrive(read)
                    elif not interpret:
                        common.together()
                    if decays is not None:
                        found = [x * common.row(decays.read(), SQUARE) for x in found]
                    if precise:
                        of_mine = plgpu.load(p_smem.at[slot, :, mine], layout=TILE).astype(jnp.float32)
                        dots_ref.at[b, h, here, rows][...] = dots + (found[0] * of_mine).sum(axis=1)
                    for acc, x in zip(accumulators, found):
                        acc.set(x)
                    for acc, left, right in zip(accumulators, weights, (v_smem, k_smem)):
                        acc.add(left, right.at[slot, :, mine])
                    if both:
                        plgpu.barrier_wait(read)
                    keep(terms or ())
                    for n, acc in enumerate(accumulators):
                        x = acc.load(len(accumulators) - 1 - n)
                        spot(here, decayed + n)[...] = (x * scale if scale != 1 else x).astype(dtype)

                def decayed_values():
                    """What the keys write, decayed to the chunk's end: float32, hence as terms."""
                    if decays is None:
                        return []
                    values = plgpu.load(v_smem.at[slot, :, mine], layout=TILE).astype(jnp.float32)
                    return split(values * common.row(decays.write(ROW), SQUARE), terms, nearest=terms < TERMS)

                def keep(terms):
                    for n, term in enumerate(terms):
                        spot(here, n)[...] = term

                def write_state(*accumulators):
                    right = [v_smem.at[slot, :, mine]] if decays is None else [spot(here, n) for n in range(decayed)]
                    keys = [k_smem.at[slot, :, block(i)].T for i in range(W)]
                    for left, acc in zip(keys, accumulators):
                        for term in reversed(right):
                            acc.add(left, term)
                    for n, ref in enumerate((out_ref, other_ref) if both else (out_ref,)):
                        plgpu.copy_smem_to_gmem(spot(here, decayed + n), ref.at[b, rows, h, mine])
                    total = 1.0 if decays is None else decays.total()
                    if exact:
                        keys = [[plgpu.load(x, layout=TILE)] for x in keys]
                        return tuple(accumulate.exactly(total * x, left, right, interpret) for x, left in zip(S, keys))
                    # Not summed onto the state by the tensor core, which cuts digits off where an addition would round.
                    return tuple(total * x + acc.load() for x, acc in zip(S, accumulators))

                weights, dots = accumulate.scoped(compare, SQUARE, SQUARE, interpret=interpret)
                if both:
                    plgpu.barrier_wait(kept)
                accumulate.scoped(read_state, *[SQUARE] * (1 + both), interpret=interpret)
                if both:
                    keep(decayed_values())
                plgpu.commit_smem()
                S = accumulate.scoped(write_state, *[SQUARE] * (0 if exact else W), interpret=interpret)
                plgpu.barrier_arrive(free.at[slot])
                if against_ref is None and states_ref is not None:
                    passed = lax.rem(c, every) == 0 if reverse else (lax.rem(c + 1, every) == 0) | (c == chunks - 1)

                    @pl.when(passed)
                    def _emit():
                        for i in range(W):
                            states_ref.at[b, h, c // every, block(i), mine][...] = S[i]

                return S

            if state_ref is None:
                S = tuple(plgpu.layout_cast(jnp.zeros(SQUARE, jnp.float32), TILE) for _ in range(W))
            else:
                part_of = lambda i: state_ref.at[b, h, block(i), mine]
                S = tuple(plgpu.load(part_of(i), layout=TILE, optimized=False) for i in range(W))
            S = lax.fori_loop(0, chunks, step, S)
            for i in range(W if against_ref is not None else 0):
                states_ref.at[b, h, 0, block(i), mine][...] = S[i]
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == W)
        def _produce():
            if W > 1 and not interpret:
                plgpu.set_max_registers(40, action='decrease')

            def load(slot, c):
                for ref, to in zip(sources, smem):
                    source = ref.at[b, pl.ds(c * CHUNK, CHUNK), h // (N // ref.shape[2])]
                    plgpu.copy_gmem_to_smem(source, to.at[slot], full.at[slot])
                if g_smem is not None:
                    plgpu.copy_gmem_to_smem(common.entry(decay_ref, b, h, c), g_smem.at[slot], full.at[slot])

            common.feed(chunks, ring, place, free, lambda: load)

    def entry_point(*refs):
        pl.run_scoped(
            lambda *scratch: kernel(*refs, scratch),
            tuple(common.swizzled((ring, CHUNK, x.shape[3]), dtype) for x in arrays),
            None if decay is None or constant else plgpu.SMEM((ring, 2, CHUNK), jnp.float32),
            common.swizzled((W, per, K, 64), dtype),
            plgpu.Barrier(num_arrivals=len(arrays) + (decay is not None and not constant), num_barriers=ring),
            plgpu.Barrier(num_arrivals=W, num_barriers=ring),
            plgpu.Barrier(num_arrivals=W),
            plgpu.Barrier(num_arrivals=W),
            collective_axes='wg',
        )

    entry_point.__name__ = 'twin' + '_back' * reverse  # what profilers show
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    out_type = (
        jax.ShapeDtypeStruct((B, T, N, V), dtype),
        jax.ShapeDtypeStruct((B, T, N, K), dtype) if both else None,
        f32((B, N, common.cdiv(chunks, every) if against is None else 1, K, V)) if terms == TERMS else None,
        None if against is None else f32((B, N, common.cdiv(chunks, every), W, 64)),
        f32((B, N, W, chunks * CHUNK)) if precise else None,
    )
    return common.launch(entry_point, out_type, {'b': B, 'h': N}, W + 1, interpret)(*arrays, decay, state, against)
