"""What a decay per channel does to arrays before and after the sweeps, read and written once: two elementwise kernels.

With G the log-decay summed from a chunk's first token to each token, E its last, `scaled` makes x exp(+-(G - E/2)) and
`unscaled` what follows for the gradients. One warpgroup takes a chunk of 64 tokens and 128 channels of a head, a thread a
channel: sums over tokens are float32 additions in a register, and nothing is exchanged.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common
from pallas_kernels.gated_linear import accumulate, decays
from pallas_kernels.gated_linear.sweep import CHUNK

PART = 128  # channels of a block
LINE = plgpu.Layout.WG_STRIDED((PART,), vec_size=1)
AHEAD = 8  # tokens whose loads are in flight at once


def step(log_decay):
    """A step's base-2 logarithm, coarse and fine: multiples of 2^-11, whose sums are exact, and the rest."""
    x = jnp.maximum(log_decay * common.LOG2E, decays.ERASE)
    coarse = common.whole(x * 2.0**11) * 2.0**-11
    return coarse, x - coarse


def factor(coarse, fine):
    """2^(coarse + fine), the sum not rounded, and its inverse."""
    whole = common.whole(coarse)
    rest = (coarse - whole) + fine
    return common.power_of_two(whole) * jnp.exp2(rest), common.power_of_two(-whole) * jnp.exp2(-rest)


class _Chunk:
    """The tokens of a block in every array; of one with fewer heads, the head that it shares."""

    def __init__(self, N: int):
        self.b, self.c, self.h = (lax.axis_index(name) for name in 'bch')
        self.N, self.channels = N, pl.ds(lax.axis_index('part') * PART, PART)

    def at(self, ref, t):
        return ref.at[self.b, self.c * CHUNK + t, self.h // (self.N // ref.shape[2]), self.channels]

    def load(self, ref, tokens):
        return [plgpu.load(self.at(ref, t), layout=LINE, optimized=False).astype(jnp.float32) for t in tokens]

    def emit(self, ref, value):
        ref.at[self.b, self.h, self.c, self.channels][...] = value


def _nothing():
    return plgpu.layout_cast(jnp.zeros((PART,), jnp.float32), LINE)


def _over(tokens, body, carry):
    """carry = body(some tokens' numbers, carry) over all `tokens` of a chunk, in their order."""
    first, sign = tokens[0], tokens[1] - tokens[0]
    some = lambda i, carry: body([first + sign * (i * AHEAD + j) for j in range(AHEAD)], carry)
    return lax.fori_loop(0, CHUNK // AHEAD, some, carry)


def _halves(chunk, decay_ref):
    """E/2, coarse and fine, and the least step."""

    def add(tokens, sums):
        coarse, fine, least = sums
        for x in map(step, chunk.load(decay_ref, tokens)):
            coarse, fine, least = coarse + x[0], fine + x[1], jnp.minimum(least, x[0])
        return coarse, fine, least

    coarse, fine, least = _over(range(CHUNK), add, (_nothing(),) * 3)
    return coarse * 0.5, fine * 0.5, least


def _call(body, name, out_type, B, chunks, N, K, interpret):
    body.__name__ = name  # what profilers show
    run = plgpu.kernel(
        body,
        out_type=out_type,
        grid=(B, chunks, N, K // PART),
        grid_names=('b', 'c', 'h', 'part'),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # two a store; no thread reads what another writes
        ),
        **common.interpreted(interpret),
    )
    return lambda *arrays: common.waited(run(*arrays), interpret)


def scaled(log_decay, wanted, *, interpret=False):
    """Arrays times the factors of their tokens and channels.

    Args:
      log_decay: float32 [B, T, N, K], natural, T and K whole chunks and multiples of `PART`.
      wanted: (x, power, terms) for each: x [B, T, heads, K], heads divide N, read once where it stands twice; power of
        exp(G - E/2), 1 or -1; how many 16-bit terms of the result are kept, of which three are a float32.

    Returns:
      The terms of each, [B, T, N, K] in x's dtype, largest first; exp(E/2), float32 [B, N, chunks, K]; a bound on what the
      factors span, likewise: `fits` of it says whether they are to be used.
    """
    (B, T, N, K), chunks = log_decay.shape, log_decay.shape[1] // CHUNK
    arrays = list({id(x): x for x, *_ in wanted}.values())
    sources = [next(i for i, y in enumerate(arrays) if y is x) for x, *_ in wanted]
    powers = [power for _, power, _ in wanted]

    def body(decay_ref, x_refs, out_refs, between_ref, bound_ref):
        chunk = _Chunk(N)
        coarse, fine, least = _halves(chunk, decay_ref)
        chunk.emit(between_ref, factor(coarse, fine)[0])
        chunk.emit(bound_ref, jnp.minimum(2.0 * coarse, 3.0 * least))

        def scale(tokens, sums):
            steps = map(step, chunk.load(decay_ref, tokens))
            values = [chunk.load(ref, tokens) for ref in x_refs]
            for t, x, *here in zip(tokens, steps, *values):
                sums = sums[0] + x[0], sums[1] + x[1]
                factors = factor(*sums)
                for source, power, outs in zip(sources, powers, out_refs):
                    parts = accumulate.split(here[source] * factors[power < 0], len(outs), outs[0].dtype)
                    for out_ref, part in zip(outs, parts):
                        chunk.at(out_ref, t)[...] = part
            return sums

        _over(range(CHUNK), scale, (-coarse, -fine))

    vector = jax.ShapeDtypeStruct((B, N, chunks, K), jnp.float32)
    out_type = tuple((jax.ShapeDtypeStruct((B, T, N, K), x.dtype),) * terms for x, _, terms in wanted), vector, vector
    return _call(body, 'scaled', out_type, B, chunks, N, K, interpret)(log_decay, arrays)


def unscaled(log_decay, q, k, dq, dk, own, resets, dr=None, *, interpret=False):
    """Gradients of q and k from those of scaled ones, and the sums of log_decay's gradient.

    Args:
      log_decay: as in `scaled`.
      q, k: [B, T, heads, K].
      dq, dk: float32 [B, T, N, K], of q exp(G - E/2) and k exp(E/2 - G), without what a token has from itself.
      own: float32 [B, N, T], which of these times k (q) is what it has.
      resets: int32 [B, T], 1 where a document begins, or None.
      dr: None, or as dk, of k exp(G - E/2), which is read and not written: with the opposite sign.

    Returns:
      dq and dk by the N heads, float32 where these share the heads of q and k; the sum of a_t - b_t, which
      `log_decay.gradient` explains, over t and what follows it in its chunk and document, 0 where a document begins:
      float32 [B, T, N, K].
    """
    (B, T, N, K), chunks = log_decay.shape, log_decay.shape[1] // CHUNK

    def body(decay_ref, q_ref, k_ref, dq_ref, dk_ref, own_ref, resets_ref, dr_ref, q_out, k_out, sums_out):
        chunk = _Chunk(N)
        coarse, fine, _ = _halves(chunk, decay_ref)

        def back(tokens, carry):
            coarse, fine, total = carry
            steps = map(step, chunk.load(decay_ref, tokens))
            refs = [ref for ref in (q_ref, k_ref, dq_ref, dk_ref, dr_ref) if ref is not None]
            for t, x, q, k, dq, dk, *dr in zip(tokens, steps, *(chunk.load(ref, tokens) for ref in refs)):
                grow, shrink = factor(coarse, fine)
                dq, dk, row = dq * grow, dk * shrink, chunk.c * CHUNK + t
                own, dr = own_ref[chunk.b, chunk.h, row], sum(x * grow for x in dr)
                chunk.at(q_out, t)[...] = (dq + own * k).astype(q_out.dtype)
                chunk.at(k_out, t)[...] = (dk - dr + own * q).astype(k_out.dtype)
                total += q * dq - k * (dk + dr)
                if resets_ref is not None:
                    total = jnp.where(resets_ref[chunk.b, row] > 0, 0.0, total)
                chunk.at(sums_out, t)[...] = total
                coarse, fine = coarse - x[0], fine - x[1]
            return coarse, fine, total

        _over(range(CHUNK - 1, -1, -1), back, (coarse, fine, _nothing()))

    wide = jax.ShapeDtypeStruct((B, T, N, K), jnp.float32)
    like = lambda x: wide if x.shape[2] < N else jax.ShapeDtypeStruct(x.shape, x.dtype)
    run = _call(body, 'unscaled', (like(q), like(k), wide), B, chunks, N, K, interpret)
    return run(log_decay, q, k, dq, dk, own, resets, dr)
