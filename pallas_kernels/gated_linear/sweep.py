"""One sweep over the chunks of a decaying recurrence, the kernel of `gated_linear` and of each of its gradients.

    forward   S_t = a_t S_{t-1} + k_t^T v_t    o_t = q_t S_t
    reverse   S_t = a_{t+1} S_{t+1} + k_t^T v_t    o_t = q_t S_t

One block computes one head and up to 128 columns of v. A producer warp streams chunks of 64 tokens through a ring of shared
memory; each consumer warpgroup owns 64 columns of v, so that warpgroups exchange nothing. Its part of the state stays in
float32 registers; a 16-bit copy in shared memory is the right operand of q S.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common
from pallas_kernels.common import COL, ROW, TILE
from pallas_kernels.gated_linear import accumulate
from pallas_kernels.gated_linear.accumulate import multiply

CHUNK = 64
SQUARE = (CHUNK, CHUNK)


def terms_of(x) -> tuple:
    """A sweep's array as its terms."""
    return () if x is None else x if isinstance(x, tuple) else (x,)


def columns(K: int, V: int) -> int:
    """Columns of v that a block computes."""
    return 128 if K <= 128 and V % 128 == 0 else 64


def stages(K: int, V: int, keys: int, values: int, copies: int, outputs: int) -> int:
    """Chunks that fit in the ring: of arrays as wide as the key, as wide as the value; beside copies of the state and out."""
    width = columns(K, V)
    fixed = 2 * K * width * copies + 2 * CHUNK * width * outputs
    return min(4, (common.SMEM_LIMIT - 3072 - fixed) // (2 * CHUNK * (K * keys + width * values)))


@common.lowered_once(
    'by_columns', 'reverse', 'strict', 'precise', 'exact', 'wide', 'own', 'every', 'scale', 'heads', 'interpret'
)
def sweep(
    q,
    k,
    v,
    decay,
    state,
    partner=None,
    scales=None,
    base=None,
    against=None,
    *,
    by_columns=False,
    reverse=False,
    strict=False,
    precise=False,
    exact=False,
    wide=False,
    own=False,
    every=None,
    scale=1.0,
    heads=0,
    interpret=False,
):
    """Runs the recurrence over all tokens.

    Args:
      q, k: [B, T', Nq, K], [B, T', Nk, K], bfloat16, K in 64, 128, 192, 256, T' a multiple of 8; N, the number of
        heads computed, is the most heads of q, k and v (or `heads`), and a multiple of each. q may be None: only states
        are computed. Each may be a tuple of such arrays, as may v: the terms, largest first, of what is better known than that.
      v: [B, T', Nv, V], V a multiple of 64.
      decay: float32 [B or 1, N or 1, chunks or 1, 2, 64], base-2 logarithms of the decay, summed from the chunk's first token
        to each token, inclusive, as `decays.cumulative` makes them; a step of -128 erases. None: no decay.
      state: float32 [B, N, K, V] before the sweep's first token, or None for zero.
      partner: [B, T', Np, V], bfloat16, or None. With it, with `base` and with `wide`, T' is a multiple of 64.
      scales: float32 [B, N, chunks, K], or [.., V] where `by_columns`: the state's rows (columns) are multiplied by it before
        and again after each chunk. None: not.
      base: float32 [B, T', N, V] that is added to out, after the scale, or None.
      against: float32 [B, N, groups, K, V], or None. With it the sweep emits, in place of states, sums of products of these and
        of the state with which it comes to the group: of rows 64 apart where `by_columns`, else of 64 columns too.
      every: chunks between two emitted states; None emits the last only.
      strict: out leaves out the part q_t k_t^T v_t that a token has from itself.
      precise: the state and the weights of pairs are multiplied as two 16-bit terms or more, for what is known so well.
      exact: states are as good as float32 makes them: decays are to the last bit, and sums of products are short. Slower.
      wide: out is float32.
      own: without partner, dots are the products q_t . k_t, once for every 64 columns.
      scale: multiplies out (not the states).

    Returns:
      out: [B, T', N, V], bfloat16 (float32 if wide); None without q.
      states: float32 [B, N, groups of `every` chunks, K, V], after the sweep passed the group; with `against` [.., 64, V] where
        `by_columns`, else [.., V / 64, 64].
      dots: float32 [B, N, V / 64, chunks * 64]: sums over 64 columns of partner_t o_t, less the part q_t k_t^T v_t of o_t
        that token t has from itself, not scaled; None without partner and `own`.
    """
    q, k, v = map(terms_of, (q, k, v))
    (B, T, _, K), V, dtype = k[0].shape, v[0].shape[3], k[0].dtype
    N = max(heads, *(x.shape[2] for x in (*q, *k, *v)))
    chunks = common.cdiv(T, CHUNK)
    every = min(every or chunks, chunks)
    groups = common.cdiv(chunks, every)
    width = columns(K, V)
    W, depth, parts = width // 64, K // 64, V // width
    best = 2 if 2 in map(len, (q, k, v)) else 3  # terms of what is to be good to float32; what has two is not
    copies = 0 if not q else best if partner is not None or precise else 1
    outputs = int(bool(q) and not wide)
    apart = (
        decay is not None and copies < best
    )  # else decayed values take the place of the state's copies, when these were read
    ring = min(stages(K, V, len(q + k), len(v), copies, outputs + best * apart), max(chunks, 1))
    arrivals = len(q + k + v) + sum(x is not None for x in (decay, scales))
    channels = width if by_columns else K
    registers = W == 2 and not interpret
    simple = partner is None and base is None and not precise
    read_decay = accumulate.Exact if exact else accumulate.Decay
    early, pair = depth <= 2 and simple, 2 if depth <= 2 else 1  # a state of 256 rows leaves few registers

    def kernel(*refs_and_scratch):
        *refs, (q_smem, k_smem, v_smem, g_smem, c_smem, s_smem, w_smem, o_smem, full, free) = refs_and_scratch
        q_ref, k_ref, v_ref, decay_ref, state_ref, partner_ref, scales_ref, base_ref, against_ref, *refs = refs
        out_ref, states_ref, dots_ref = refs
        b, h, part = lax.axis_index('b'), lax.axis_index('h'), lax.axis_index('v')
        wg = lax.axis_index('wg')
        place = lambda step: chunks - 1 - step if reverse else step

        @pl.when(wg < W)
        def _consume():
            if registers:
                plgpu.set_max_registers(232, action='increase')
            mine = pl.ds(wg * 64, 64)
            cols = pl.ds(part * width + wg * 64, 64)

            def visible():
                i = plgpu.broadcasted_iota(jnp.int32, SQUARE, 0, layout=TILE)
                j = plgpu.broadcasted_iota(jnp.int32, SQUARE, 1, layout=TILE)
                if strict:
                    return i < j if reverse else i > j
                return i <= j if reverse else i >= j

            def diagonal():
                i = plgpu.broadcasted_iota(jnp.int32, SQUARE, 0, layout=TILE)
                j = plgpu.broadcasted_iota(jnp.int32, SQUARE, 1, layout=TILE)
                return i == j

            split = lambda x, terms: accumulate.split(x, terms, dtype, nearest=terms < 3)  # three are x however they are made

            def rescale(S, slot):
                if by_columns:
                    factor = plgpu.load(c_smem.at[slot, mine], layout=COL, optimized=False)
                    return tuple(x * common.col(factor, SQUARE) for x in S)
                factor = lambda i: plgpu.load(c_smem.at[slot, pl.ds(64 * i, 64)], layout=ROW, optimized=False)
                return tuple(x * common.row(factor(i), SQUARE) for i, x in enumerate(S))

            def read_by_all():
                """Before memory is written that products have read."""
                if not interpret:
                    common.together()

            def keep_copy(S):
                if q_smem:
                    read_by_all()
                    for i in range(depth):
                        for term, part in enumerate(split(S[i], copies)):
                            s_smem.at[wg, term, pl.ds(64 * i, 64)][...] = part
                    plgpu.commit_smem()

            of_group = lambda ref, c, i: ref.at[b, h, c // every, pl.ds(64 * i, 64), cols]
            dots_of = lambda rows: dots_ref.at[b, h, part * W + wg, rows]

            def partner_of(s):
                """16 bits a number, asked for a chunk ahead."""
                if partner_ref is None:
                    return None
                rows = pl.ds(place(jnp.minimum(s, chunks - 1)) * CHUNK, CHUNK)
                source = partner_ref.at[b, rows, h // (N // partner_ref.shape[2]), cols]
                return plgpu.load(source, layout=TILE, optimized=False)

            def meet(S, c):
                """<S, against> where the sweep comes to a group."""
                other = lambda i: plgpu.load(of_group(against_ref, c, i), layout=TILE, optimized=False)
                total = sum((S[i] * other(i) for i in range(1, depth)), S[0] * other(0))
                if by_columns:
                    of_group(states_ref, c, 0)[...] = total
                else:
                    states_ref.at[b, h, c // every, part * W + wg][...] = total.sum(axis=1)

            def step(s, carry):
                (S, other), slot, c = carry, lax.rem(s, ring), place(s)
                rows = pl.ds(c * CHUNK, CHUNK)
                here = wg if interpret else wg + common.opaque_zero()
                plgpu.barrier_wait(full.at[slot])

                decays = None if decay_ref is None else read_decay(g_smem.at[slot], reverse)
                if c_smem is not None:
                    S = rescale(S, slot)
                    keep_copy(S)
                values = [x.at[slot, :, mine] for x in v_smem]
                queries = [x.at[slot] for x in q_smem]

                def read(out):
                    return multiply(out, queries, [s_smem.at[here, term] for term in range(copies)], copies)

                def decayed_values():
                    """What the keys write, decayed to the chunk's end: float32, hence as terms."""
                    if decays is None:
                        return values
                    value = sum(plgpu.load(x, layout=TILE).astype(jnp.float32) for x in values)
                    place = (
                        (lambda at, term: w_smem.at[at, term]) if apart else lambda at, term: s_smem.at[at, term, pl.ds(0, 64)]
                    )
                    found = split(value * common.row(decays.write(ROW), SQUARE), best)
                    if not (apart and q_smem):  # else they met when they kept the copy
                        read_by_all()
                    for term, part in enumerate(found):
                        place(wg, term)[...] = part
                    plgpu.commit_smem()
                    return [place(here, term) for term in range(best)]

                def write_state(S):
                    """The state after the chunk."""
                    right = decayed_values()
                    total = 1.0 if decays is None else decays.total()
                    if exact:
                        keys_of = lambda i: [plgpu.load(x.at[slot, :, pl.ds(64 * i, 64)].T, layout=TILE) for x in k_smem]
                        return tuple(accumulate.exactly(total * x, keys_of(i), right, interpret) for i, x in enumerate(S))

                    def of_rows(first):
                        def run(*accumulators):
                            for i, acc in enumerate(accumulators):
                                part = (slot, slice(None), pl.ds(64 * (first + i), 64))
                                multiply(acc, [x.at[*part].T for x in k_smem], right, best)
                            return tuple(acc.load(0) for acc in accumulators)

                        # Not summed onto the state by the tensor core, which cuts digits off where an addition would round.
                        written = accumulate.scoped(run, *[SQUARE] * min(pair, depth - first), interpret=interpret)
                        return tuple(total * x + y for x, y in zip(S[first : first + pair], written))

                    return sum(map(of_rows, range(0, depth, pair)), ())

                def compare(out=None):
                    """The weights of pairs, as terms; the partner's dots with what tokens have from others of the chunk.

                    With `out`, the state is read meanwhile.
                    """

                    def run(acc, *met):
                        multiply(acc, queries, [x.at[slot].T for x in k_smem], best if precise else 2)
                        for product in met:  # other_i . v_j, of 64 columns
                            multiply(product, [other], [x.T for x in values], best)
                        weights = acc.load(read(out) if out is not None else len(met) and len(values))
                        if own:
                            dots_of(rows)[...] = jnp.where(diagonal(), weights, 0.0).sum(axis=1)
                        weights = weights if decays is None else weights * decays.pairs()
                        pairs, dots = jnp.where(visible(), weights, 0.0), None
                        for product in met:  # from pairs alone, all of them float32
                            earlier = pairs if strict else jnp.where(diagonal(), 0.0, pairs)
                            dots = (earlier * product.load(0)).sum(axis=1)
                        return split(pairs, kept), dots

                    return accumulate.scoped(run, SQUARE, *[SQUARE] * (other is not None), interpret=interpret)

                # With c, q and k were rounded once more already, by their decays; values of two terms go into sums of sweeps.
                kept = best if precise and wide else 2 if c_smem is not None or best == 2 else 1
                compared = None if partner_ref is None else compare()  # before the state's product, for registers

                def read_state(out):
                    if compared:
                        read(out)
                    weights, dots = compared or compare(out)
                    if decays is not None or other is not None:
                        before = out.load(0) if decays is None else out.load(0) * common.row(decays.read(), SQUARE)
                        if other is not None:
                            dots += (before * other.astype(jnp.float32)).sum(axis=1)
                        out.set(before)
                    multiply(out, weights, values, kept)
                    added = (
                        None if base_ref is None else plgpu.load(base_ref.at[b, rows, h, cols], layout=TILE, optimized=False)
                    )
                    new = write_state(S) if early else None  # while the last product runs
                    o = out.load(0)
                    o = o * scale if scale != 1 else o
                    o = o if added is None else o + added
                    if wide:
                        out_ref.at[b, rows, h, cols][...] = o
                    else:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        o_smem.at[wg][...] = o.astype(dtype)
                    return new, dots

                dots = new = None
                if q_smem:
                    new, dots = accumulate.scoped(read_state, SQUARE, interpret=interpret)
                S = write_state(S) if new is None else new
                if c_smem is not None:
                    S = rescale(S, slot)
                plgpu.barrier_arrive(free.at[slot])
                following = partner_of(s + 1)
                if c_smem is None:
                    keep_copy(S)
                elif o_smem is not None:
                    plgpu.commit_smem()
                if o_smem is not None:
                    plgpu.copy_smem_to_gmem(o_smem.at[wg], out_ref.at[b, rows, h, cols])
                if dots is not None:
                    dots_of(rows)[...] = dots

                passed = lax.rem(c, every) == 0 if reverse else (lax.rem(c + 1, every) == 0) | (c == chunks - 1)

                if against_ref is not None:
                    pl.when(passed & (s < chunks - 1))(lambda: meet(S, place(s + 1)))
                else:

                    @pl.when(passed)
                    def _emit():
                        for i in range(depth):
                            of_group(states_ref, c, i)[...] = S[i]

                return S, following

            if state_ref is None:
                S = tuple(plgpu.layout_cast(jnp.zeros(SQUARE, jnp.float32), TILE) for _ in range(depth))
            else:
                part_of = lambda i: state_ref.at[b, h, pl.ds(64 * i, 64), cols]
                S = tuple(plgpu.load(part_of(i), layout=TILE, optimized=False) for i in range(depth))
            if c_smem is None:
                keep_copy(S)
            if against_ref is not None:
                meet(S, place(0))
            lax.fori_loop(0, chunks, step, (S, partner_of(0)))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == W)
        def _produce():
            if registers:
                plgpu.set_max_registers(40, action='decrease')

            def loads():
                head = lambda ref: h // (N // ref.shape[2])
                first = pl.ds(part * width, width)

                def load(slot, c):
                    rows = pl.ds(c * CHUNK, CHUNK)
                    copy = lambda source, smem: plgpu.copy_gmem_to_smem(source, smem.at[slot], full.at[slot])
                    for ref, smem in zip((*k_ref, *q_ref), (*k_smem, *q_smem)):
                        copy(ref.at[b, rows, head(ref)], smem)
                    for ref, smem in zip(v_ref, v_smem):
                        copy(ref.at[b, rows, head(ref), first], smem)
                    if decay_ref is not None:
                        copy(common.entry(decay_ref, b, h, c), g_smem)
                    if scales_ref is not None:
                        source = scales_ref.at[b, h, c]
                        copy(source.at[first] if by_columns else source, c_smem)

                return load

            common.feed(chunks, ring, place, free, loads)

    emitted = (K, V) if against is None else (64, V) if by_columns else (V // 64, 64)

    def entry_point(*refs):
        pl.run_scoped(
            lambda *scratch: kernel(*refs, scratch),
            tuple(common.swizzled((ring, CHUNK, K), dtype) for _ in q),
            tuple(common.swizzled((ring, CHUNK, K), dtype) for _ in k),
            tuple(common.swizzled((ring, CHUNK, width), dtype) for _ in v),
            None if decay is None else plgpu.SMEM((ring, 2, CHUNK), jnp.float32),
            None if scales is None else plgpu.SMEM((ring, channels), jnp.float32),
            common.swizzled((W, copies, K, 64), dtype) if q else None,
            common.swizzled((W, best, CHUNK, 64), dtype) if apart else None,
            common.swizzled((W, CHUNK, 64), dtype) if outputs else None,
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=ring),
            plgpu.Barrier(num_arrivals=W, num_barriers=ring),
            collective_axes='wg',
        )

    entry_point.__name__ = 'sweep' + '_back' * reverse + '_states' * (not q)  # what profilers show
    out_type = (
        jax.ShapeDtypeStruct((B, T, N, V), jnp.float32 if wide else dtype) if q else None,
        jax.ShapeDtypeStruct((B, N, groups, *emitted), jnp.float32),
        jax.ShapeDtypeStruct((B, N, parts * W, chunks * CHUNK), jnp.float32) if own or partner is not None else None,
    )
    run = common.launch(entry_point, out_type, {'b': B, 'h': N, 'v': parts}, W + 1, interpret)
    return run(q, k, v, decay, state, partner, scales, base, against)
