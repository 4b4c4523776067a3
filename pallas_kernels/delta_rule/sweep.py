"""The two sweeps of the delta rule that no gated linear sweep can do: the writes u, and what reaches them, w.

    write    S_t = a_t S_{t-1} + k_t^T u_t                u_t = b_t (v_t - a_t k_t S_{t-1})            o_t = q_t S_t
    reach    D_t = q_t^T do_t + a_{t+1} (D_{t+1} - k_{t+1}^T w_{t+1})            w_t = b_t k_t D_t

A chunk's u (or w) solve a triangular system whose inverse, the same for both, is computed before, for all chunks at once:

    Z = (I + diag(p) L diag(s))^-1        p s = b        L_ij = k_i . k_j decayed from j to i, j < i
    u = diag(s) Z diag(p) (V - K S)       w = diag(p) Z^T diag(s) (K D)

p a power of two near the root of b, so that u / b, what a token would have written, is exact however little it writes. The
inverse comes as two 16-bit terms, high and low. Its right side, the state that the keys read, and u (w) where it enters the
state are split likewise: a key that repeats makes large terms cancel. Blocks, rings and the state are those of
`pallas_kernels.gated_linear.sweep`.

An inverse of three terms, less I, asks for three of everything, and the sweeps are as good as float32 (`accumulate.product`).

With a decay per channel (`Channels`) the key that reads the state and the key that enters it differ, both and q come as two
terms, and the state's rows are scaled before and after each chunk, as `pallas_kernels.gated_linear.per_channel` explains.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common
from pallas_kernels.common import COL, ROW, TILE
from pallas_kernels.delta_rule.products import TERMS, decay_of
from pallas_kernels.gated_linear import accumulate
from pallas_kernels.gated_linear.accumulate import WHOLE, halves, multiply, product

CHUNK = 64
SQUARE = (CHUNK, CHUNK)
RING = 2


class Channels(NamedTuple):
    """What a decay per channel adds, each key as k and bfloat16 unless said otherwise."""

    k_low: Any = None  # added to k, which then is the key that meets the state: reads it forward in time, is read in reverse
    other: Any = None  # the key that enters the state
    other_low: Any = None
    q_low: Any = None
    scales: Any = None  # float32 [B, N, chunks, K]


SHARED = Channels()  # no channel decays on its own


def write(
    q, k, v, strength, inverse, decay, channels, state, *, every=None, scale=1.0, only_states=False, both=False, interpret=False
):
    """Forward in time.

    Args:
      q, k: [B, T', heads, K], bfloat16, K 64 or 128, T' a multiple of 8; heads divide N.
      v: [B, T', N, V], V a multiple of 64; None is zero.
      strength: p and s, float32 [B, N, chunks, 2, 64], 0 past the end.
      inverse: bfloat16 [B, N, chunks, terms, 64, 64], the terms of Z, two, or three of Z - I.
      decay: as in the gated linear sweep, or None.
      channels: `Channels`; `SHARED` without a decay per channel.
      state: float32 [B, N, K, V] or None.
      every: chunks between two emitted states; None emits the last only.
      scale: multiplies out.
      only_states: nothing else is computed.
      both: with q, u too.

    Returns:
      With q: out [B, T', N, V] and states [B, N, groups, K, V]. Without: u as its 16-bit terms, each as v, and states.
      Both: (out and u's terms) and states.
    """
    results = () if only_states else ('u',) if q is None else ('out', 'u') if both else ('out',)
    return _sweep(q, k, v, strength, inverse, decay, channels, state, False, every, scale, results, interpret)


def reach(q, k, do, strength, inverse, decay, channels, state, *, every=None, only_states=False, interpret=False):
    """Backward in time: w as its terms, and the states D, before each group of chunks and decayed to its first token."""
    results = () if only_states else ('u',)
    return _sweep(q, k, do, strength, inverse, decay, channels, state, True, every, 1.0, results, interpret)


@common.lowered_once('reverse', 'every', 'scale', 'results', 'interpret')
def _sweep(q, k, v, strength, inverse, decay, channels, state, reverse, every, scale, results, interpret):
    (B, T, heads, K), N, V, dtype = k.shape, strength.shape[1], (state if v is None else v).shape[3], k.dtype
    chunks = common.cdiv(T, CHUNK)
    every = min(every or chunks, chunks)
    groups = common.cdiv(chunks, every)
    k_low, other, other_low, q_low, scales = channels
    q_low = q_low if reverse else None
    terms = inverse.shape[3]
    precise = terms >= WHOLE
    by_rows = not (reverse or precise)  # the decay to the chunk's end is on what is written, not on keys, which stay exact
    W = 2 if V % 128 == 0 and scales is None else 1  # a decay per channel has more to keep in shared memory
    width, depth = 64 * W, K // 64
    parts, ring = V // width, min(RING if scales is None and not (precise and K == width == 128) else 1, chunks)
    has_out = 'out' in results
    arrivals = 3 + sum(x is not None for x in (q, v, decay, k_low, other, other_low, q_low, scales))
    registers = W == 2 and not interpret

    def kernel(*refs_and_scratch):
        *refs, (q_smem, k_smem, v_smem, b_smem, i_smem, g_smem, s_smem, r_smem, *extra, full, free, half) = refs_and_scratch
        q_ref, k_ref, v_ref, strength_ref, inverse_ref, decay_ref, state_ref, *refs = refs
        *extra_refs, out_ref, u_refs, states_ref = refs
        ql_smem, kl_smem, e_smem, el_smem, c_smem = extra
        e_smem = k_smem if e_smem is None else e_smem  # the key that enters the state
        b, h, part = lax.axis_index('b'), lax.axis_index('h'), lax.axis_index('v')
        wg = lax.axis_index('wg')
        place = lambda step: chunks - 1 - step if reverse else step

        @pl.when(wg < W)
        def _consume():
            if registers:
                plgpu.set_max_registers(232, action='increase')
            mine = pl.ds(wg * 64, 64)
            cols = pl.ds(part * width + wg * 64, 64)
            wide = lambda x: x.astype(jnp.float32)

            split = functools.partial(accumulate.split, terms=terms, dtype=dtype, packed=not interpret)
            products = functools.partial(product, terms=terms, interpret=interpret)

            def read_by_all():
                """Before memory is written that products have read."""
                if not interpret:
                    common.together()

            def copy_of(of, term):
                """Of the state."""
                return s_smem.at[of, term, pl.ds(0, K)]

            def keep_copy(S):
                read_by_all()
                for i in range(depth):
                    for term, part in enumerate(split(S[i])):
                        s_smem.at[wg, term, pl.ds(64 * i, 64)][...] = part
                plgpu.commit_smem()

            def visible():
                i = plgpu.broadcasted_iota(jnp.int32, SQUARE, 0, layout=TILE)
                j = plgpu.broadcasted_iota(jnp.int32, SQUARE, 1, layout=TILE)
                return i <= j if reverse else i >= j

            def rescale(S, slot):
                if c_smem is None:
                    return S
                factor = lambda i: plgpu.load(c_smem.at[slot, pl.ds(64 * i, 64)], layout=ROW, optimized=False)
                return tuple(x * common.row(factor(i), SQUARE) for i, x in enumerate(S))

            def step(s, S):
                slot, c = lax.rem(s, ring), place(s)
                here = wg if interpret else wg + common.opaque_zero()
                plgpu.barrier_wait(full.at[slot])
                if W > 1:  # half a chunk behind the first, whose arithmetic is under these products, and these are under its
                    pl.when(wg > 0)(lambda: plgpu.barrier_wait(half.at[slot]))
                if c_smem is not None:
                    S = rescale(S, slot)
                    keep_copy(S)
                decays = None if decay_ref is None else decay_of(terms)(g_smem.at[slot], reverse)
                factor = lambda n: plgpu.load(b_smem.at[slot, 1 - n if reverse else n], layout=ROW, optimized=False)
                strong = lambda x, n: x * common.row(factor(n), SQUARE)
                found = lambda x: x if decays is None else x * common.row(decays.read(), SQUARE)
                value = None if v_smem is None else v_smem.at[slot, :, mine]
                Z_of = lambda term: i_smem.at[slot, term].T if reverse else i_smem.at[slot, term]

                def weigh(a, b, a_low, b_low):
                    def run(acc):
                        acc.add(a.at[slot], b.at[slot].T)
                        if a_low is not None:
                            acc.add(a_low.at[slot], b.at[slot].T)
                        if b_low is not None:
                            acc.add(a.at[slot], b_low.at[slot].T)
                        weights = acc.load(0)
                        weights = weights if decays is None else weights * decays.pairs()
                        return jnp.where(visible(), weights, 0.0)

                    return accumulate.scoped(run, SQUARE, interpret=interpret)

                def right_side():
                    """What the inverse multiplies, before diag(s): V - K S, or K D with D as the token finds it."""

                    keys = [x.at[slot] for x in (k_smem, kl_smem) if x is not None]
                    copies = [copy_of(here, term) for term in range(terms)]
                    if not reverse:
                        predicted = found(products(keys, copies))
                        return -predicted if value is None else wide(plgpu.load(value, layout=TILE)) - predicted
                    if precise:
                        within = products(split(weigh(k_smem, q_smem, kl_smem, ql_smem)), [value])
                        return found(products(keys, copies)) + within

                    def run(acc):
                        multiply(acc, keys, copies, terms)
                        weights = split(weigh(k_smem, q_smem, kl_smem, ql_smem))
                        if decays is not None:
                            acc.set(found(acc.load(0)))
                        for term in weights:
                            acc.add(term, value)
                        return acc.load(0)

                    return accumulate.scoped(run, SQUARE, interpret=interpret)

                aside = by_rows and decays is not None  # u lies where the state's low copy was read, what is left of it is kept
                kept_at = lambda of, term: r_smem.at[of, term]
                told_at = (lambda of, term: s_smem.at[of, 1, pl.ds(CHUNK * term, CHUNK)]) if aside else kept_at
                (kept, mine_kept), (told, mine_told) = (
                    [[at(of, term) for term in range(terms)] for of in (here, wg)] for at in (kept_at, told_at)
                )

                def keep(*pairs):
                    read_by_all()
                    for x, places in pairs:
                        for part, place in zip(split(x), places):
                            place[...] = part
                    plgpu.commit_smem()

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                keep((strong(right_side(), 0), mine_kept))
                Z = [Z_of(term) for term in range(terms)]
                solved = products(Z, kept, parts=halves(plgpu.load(Z[0], layout=TILE)) if precise else None)
                if precise:  # Z is less I, and three terms are the number
                    solved += sum(wide(plgpu.load(term, layout=TILE)) for term in kept)
                solved = strong(solved, 1)
                if aside:
                    left = solved * common.row(decays.write(ROW), SQUARE)
                    keep((solved, mine_told[: TERMS if u_refs else has_out]), (left, mine_kept))
                else:
                    keep((solved, mine_kept))
                if W > 1:
                    pl.when(wg == 0)(lambda: plgpu.barrier_arrive(half.at[slot]))
                rows = pl.ds(c * CHUNK, CHUNK)
                for term, ref in enumerate(u_refs):
                    plgpu.copy_smem_to_gmem(mine_told[term], ref.at[b, rows, h, cols])

                def output():
                    def run(out):
                        heard = TERMS if precise else 1
                        multiply(out, [q_smem.at[slot]], [copy_of(here, term) for term in range(heard)], heard)
                        weights = accumulate.split(weigh(q_smem, e_smem, None, el_smem), TERMS, dtype)
                        if decays is not None:
                            out.set(found(out.load(0)))
                        # With c, q and the key were rounded once more already, by their decays.
                        multiply(out, weights, told[:heard], heard if c_smem is None else TERMS)
                        o = out.load(0)
                        return (o * scale if scale != 1 else o).astype(dtype)

                    return accumulate.scoped(run, SQUARE, interpret=interpret)

                o = output() if has_out else None

                written = None if decays is None or by_rows else decays.write(COL)

                def entering(i):
                    """Terms of the keys, i-th rows of the state, and of what they write."""
                    part = (slot, slice(None), pl.ds(64 * i, 64))
                    if by_rows:
                        yield [plgpu.load(x.at[*part].T, layout=TILE) for x in (e_smem, el_smem) if x is not None], kept
                        return
                    sources = [(e_smem, el_smem, kept, -1.0 if reverse else 1.0)]
                    sources += [(q_smem, ql_smem, [value], 1.0)] if reverse else []
                    for smem, low_smem, rights, sign in sources:
                        lefts = [plgpu.load(x.at[*part].T, layout=TILE) for x in (smem, low_smem) if x is not None]
                        keys = sum(map(wide, lefts)) * sign
                        exact = written is None and low_smem is None
                        keys = split(keys if written is None else keys * common.col(written, SQUARE))
                        yield keys[: 1 if exact else terms], rights

                def update(*accumulators):
                    for i, acc in enumerate(accumulators):
                        acc.set(S[i] if decays is None else S[i] * decays.total())
                    for i, acc in enumerate(accumulators):
                        for keys, rights in entering(i):
                            multiply(acc, keys, rights, terms)
                    return tuple(acc.load(0) for acc in accumulators)

                def precise_update(i):
                    x = S[i] if decays is None else S[i] * decays.total()
                    for keys, rights in entering(i):
                        x = products(keys, rights, base=x, parts=halves(keys[0]))
                    return x

                if precise:
                    S = tuple(map(precise_update, range(depth)))
                else:
                    S = accumulate.scoped(update, *[SQUARE] * depth, interpret=interpret)
                S = rescale(S, slot)
                plgpu.barrier_arrive(free.at[slot])
                if u_refs:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if o is not None:
                    read_by_all()
                    r_smem.at[wg, 0][...] = o
                if c_smem is None:
                    keep_copy(S)
                elif o is not None:
                    plgpu.commit_smem()
                if o is not None:
                    plgpu.copy_smem_to_gmem(r_smem.at[wg, 0], out_ref.at[b, rows, h, cols])
                passed = lax.rem(c, every) == 0 if reverse else (lax.rem(c + 1, every) == 0) | (c == chunks - 1)

                @pl.when(passed)
                def _emit():
                    for i in range(depth):
                        states_ref.at[b, h, c // every, pl.ds(64 * i, 64), cols][...] = S[i]

                return S

            if state_ref is None:
                S = tuple(plgpu.layout_cast(jnp.zeros(SQUARE, jnp.float32), TILE) for _ in range(depth))
            else:
                part_of = lambda i: state_ref.at[b, h, pl.ds(64 * i, 64), cols]
                S = tuple(plgpu.load(part_of(i), layout=TILE, optimized=False) for i in range(depth))
            if c_smem is None:
                keep_copy(S)
            lax.fori_loop(0, chunks, step, S)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == W)
        def _produce():
            if registers:
                plgpu.set_max_registers(40, action='decrease')

            def loads():
                shared = h // (N // heads)

                def load(slot, c):
                    rows = pl.ds(c * CHUNK, CHUNK)
                    copy = lambda source, smem: plgpu.copy_gmem_to_smem(source, smem.at[slot], full.at[slot])
                    for ref, smem in zip((k_ref, q_ref, *extra_refs[:4]), (k_smem, q_smem, ql_smem, kl_smem, *extra[2:4])):
                        if ref is not None:
                            copy(ref.at[b, rows, shared], smem)
                    if c_smem is not None:
                        copy(extra_refs[4].at[b, h, c], c_smem)
                    if v_ref is not None:
                        copy(v_ref.at[b, rows, h, pl.ds(part * width, width)], v_smem)
                    copy(strength_ref.at[b, h, c], b_smem)
                    copy(inverse_ref.at[b, h, c], i_smem)
                    if decay_ref is not None:
                        copy(common.entry(decay_ref, b, h, c), g_smem)

                return load

            common.feed(chunks, ring, place, free, loads)

    def entry_point(*refs):
        pl.run_scoped(
            lambda *scratch: kernel(*refs, scratch),
            None if q is None else common.swizzled((ring, CHUNK, K), dtype),
            common.swizzled((ring, CHUNK, K), dtype),
            None if v is None else common.swizzled((ring, CHUNK, width), dtype),
            plgpu.SMEM((ring, 2, CHUNK), jnp.float32),
            common.swizzled((ring, terms, CHUNK, CHUNK), dtype),
            None if decay is None else plgpu.SMEM((ring, 2, CHUNK), jnp.float32),
            common.swizzled((W, terms, K if precise else max(K, TERMS * CHUNK), 64), dtype),
            common.swizzled((W, terms, CHUNK, 64), dtype),
            *(None if x is None else common.swizzled((ring, CHUNK, K), dtype) for x in (q_low, k_low, other, other_low)),
            None if scales is None else plgpu.SMEM((ring, K), jnp.float32),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=ring),
            plgpu.Barrier(num_arrivals=W, num_barriers=ring),
            None if W == 1 else plgpu.Barrier(num_arrivals=1, num_barriers=ring),
            collective_axes='wg',
        )

    entry_point.__name__ = '_'.join(('reach' if reverse else 'write', *results))  # what profilers show
    array = jax.ShapeDtypeStruct((B, T, N, V), dtype)
    out_type = (
        array if has_out else None,
        (array,) * terms if 'u' in results else (),
        jax.ShapeDtypeStruct((B, N, groups, K, V), jnp.float32),
    )
    run = common.launch(entry_point, out_type, {'b': B, 'h': N, 'v': parts}, W + 1, interpret)
    out, u, states = run(q, k, v, strength, inverse, decay, state, q_low, k_low, other, other_low, scales)
    return (u if out is None else (out, *u) if u else out), states
