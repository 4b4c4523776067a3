"""One step of decoding from a paged cache on TPU: sequences of different lengths, a few new tokens each.

Scalar memory holds each sequence's length and which pages are its own; the index maps read them, so that only pages in use
are fetched, and Pallas fetches the next ones while these are worked on. The query heads of a group, and the new tokens,
are the rows of one tile. No derivative: training does not page.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.softmax_attention.mosaic_tpu_forward import FLOOR, NT
from pallas_kernels.softmax_attention.mosaic_tpu_tiles import LANES, LN2, LOG2E, wide

KEYS = 512  # keys a grid step, of as many pages


def unsupported(
    query, key_pages, value_pages, pages, lengths, *, scale=None, window=None, softcap=None, sinks=None
) -> str | None:
    """Why this call can't run, or None."""
    given = f'given query {query.shape}, key_pages {key_pages.shape}, value_pages {value_pages.shape}'
    if query.ndim != 4 or key_pages.ndim != 4 or value_pages.ndim != 4 or key_pages.shape[:3] != value_pages.shape[:3]:
        return f'expected query [B, T, N, H], key_pages [K, P, size, H], value_pages [K, P, size, Hv]; {given}'
    (B, T, N, H), (K, _, size, width) = query.shape, key_pages.shape
    if N % K or width != H:
        return f'query and key_pages disagree in H, or K does not divide N; {given}'
    dtypes = sorted({str(x.dtype) for x in (query, key_pages, value_pages)})
    if len(dtypes) > 1 or dtypes[0] not in ('bfloat16', 'float32'):
        return f'query and pages must all be bfloat16 or float32, given {", ".join(dtypes)}'
    if pages.ndim != 2 or pages.shape[0] != B or lengths.shape != (B,):
        return f'expected pages int32 [B, n] and lengths int32 [B] with B={B}, given {pages.shape} and {lengths.shape}'
    if size % 16:
        return f'a page holds a multiple of 16 tokens, given {size}'
    if max(H, value_pages.shape[3]) > 256 or T * (N // K) > 1024:
        return f'widths up to 256 and 1024 rows a key head (T N / K), given {H}, {value_pages.shape[3]} and {T * (N // K)}'
    if pages.size + B > 220_000:
        return f'the table of pages exceeds the scalar memory: {pages.size} entries'
    return tpu.partitioned()


def paged_attention(query, key_pages, value_pages, pages, lengths, *, scale=None, window=None, softcap=None, sinks=None):
    """Causal softmax attention of the last T tokens of each sequence over its cached keys and values.

    Args:
      query: [B, T, N, H]: of tokens lengths - T ... lengths - 1; keys and values of these are in the cache already.
      key_pages, value_pages: [K, P, size, H] and [K, P, size, Hv], the pool that all sequences share; K divides N.
      pages: int32 [B, n]: where the tokens i size ... (i + 1) size - 1 of a sequence are; entries beyond its length are
        not read. Whatever stands in unused slots of pages, NaN too, is not seen.
      lengths: int32 [B], at most n size. A sequence of length 0 gets 0. Of a length below T, the queries of negative
        positions get 0.
      scale: 1/sqrt(H) by default, positive.
      window: keys a token sees, itself included; None: all. Pages before it are fetched, and skipped.
      softcap: a number c: logits become c tanh(logit / c).
      sinks: float [N]: a logit a head that takes part in the denominator and has no value.

    Returns:
      out [B, T, N, Hv] and lse float32 [B, N, T], -inf where nothing is seen.

    Raises:
      ValueError: `unsupported` has a reason.
    """
    options = {'scale': scale, 'window': window, 'softcap': softcap, 'sinks': sinks}
    if reason := unsupported(query, key_pages, value_pages, pages, lengths, **options):
        raise ValueError(f'paged_attention: {reason}')
    (B, T, N, H), (K, _, size, _), Hv, dtype = query.shape, key_pages.shape, value_pages.shape[3], query.dtype
    scale = H**-0.5 if scale is None else float(scale)
    G, n = N // K, pages.shape[1]
    rows = -(-T * G // 16) * 16
    together = max(1, min(n, KEYS // size))
    steps = -(-n // together)
    keys = together * size
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    q = query.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    q = jnp.pad(q, [(0, 0), (0, 0), (0, rows - T * G), (0, 0)])
    sink = jnp.full((N,), -jnp.inf) if sinks is None else sinks
    sink = jnp.tile(sink.astype(jnp.float32).reshape(K, G), (1, T)) * LOG2E  # a row's
    sink = jnp.broadcast_to(jnp.pad(sink, [(0, 0), (0, rows - T * G)])[..., None], (K, rows, LANES))

    def kernel(pages, lengths, q_ref, sink_ref, *refs):
        k_refs, v_refs = refs[:together], refs[together : 2 * together]
        o_ref, lse_ref, m_ref, l_ref, acc_ref = refs[2 * together :]
        b, t = pl.program_id(0), pl.program_id(2)
        length, start = lengths[b], t * keys

        @pl.when(t == 0)
        def _():
            m_ref[...] = jnp.full_like(m_ref, FLOOR)
            l_ref[...] = jnp.zeros_like(l_ref)
            acc_ref[...] = jnp.zeros_like(acc_ref)

        live = start < length
        if window is not None:
            live &= start + keys > length - T - window + 1

        @pl.when(live)
        def _():
            join = lambda refs: jnp.concatenate([r[...] for r in refs], 0) if together > 1 else refs[0][...]
            k, v = join(k_refs), join(v_refs)
            s = lax.dot_general(q_ref[...], k, NT, precision, jnp.float32) * scale
            if softcap is not None:
                s = softcap * jnp.tanh(s / softcap)
            position = lax.broadcasted_iota(jnp.int32, s.shape, 1) + start
            token = length - T + lax.div(lax.broadcasted_iota(jnp.int32, s.shape, 0), jnp.int32(G))
            seen = (position <= token) & (token < length)
            if window is not None:
                seen &= token - position < window
            s = jnp.where(seen, s, -jnp.inf) * LOG2E
            m = m_ref[...]
            m_new = jnp.maximum(m, jnp.max(s, 1, keepdims=True))
            alpha, p = jnp.exp2(m - m_new), jnp.exp2(s - wide(m_new, keys))
            m_ref[...] = m_new
            l_ref[...] = l_ref[...] * alpha + jnp.sum(p, 1, keepdims=True)
            used = lax.broadcasted_iota(jnp.int32, v.shape, 0) + start < length
            v = jnp.where(used, v, jnp.zeros_like(v))  # 0 times what an unused slot holds may be NaN
            pv = jnp.dot(p.astype(dtype), v, precision=precision, preferred_element_type=jnp.float32)
            acc_ref[...] = acc_ref[...] * wide(alpha, Hv) + pv

        @pl.when(t == steps - 1)
        def _():
            m, l = m_ref[...], l_ref[...]
            empty, total = l == 0, jnp.maximum(m, sink_ref[...])
            alpha = jnp.exp2(m - total)
            l = jnp.where(empty, 1.0, l * alpha + jnp.exp2(sink_ref[...] - total))
            o_ref[...] = (acc_ref[...] * wide(jnp.where(empty, 0.0, alpha / l), Hv)).astype(dtype)
            lse_ref[...] = jnp.where(empty, -jnp.inf, (total + jnp.log2(l)) * LN2)

    def page(i):
        def index(b, k, t, pages, lengths):
            used = jnp.maximum(lax.div(lengths[b] + (size - 1), jnp.int32(size)), 1)
            return k, pages[b * n + jnp.minimum(t * together + i, jnp.minimum(used, n) - 1)], 0, 0

        return index

    own = lambda b, k, t, *_: (b, k, 0, 0)
    tables = pages.reshape(-1).astype(jnp.int32), lengths.astype(jnp.int32)
    out, lse = pl.pallas_call(
        kernel,
        name='paged_attention',
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, steps),
            in_specs=[
                pl.BlockSpec((None, None, rows, H), own),
                pl.BlockSpec((None, rows, LANES), lambda b, k, t, *_: (k, 0, 0)),
                *(pl.BlockSpec((None, None, size, H), page(i)) for i in range(together)),
                *(pl.BlockSpec((None, None, size, Hv), page(i)) for i in range(together)),
            ],
            out_specs=[pl.BlockSpec((None, None, rows, Hv), own), pl.BlockSpec((None, None, rows, LANES), own)],
            scratch_shapes=[
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, Hv), jnp.float32),
            ],
        ),
        out_shape=[tpu.out_type((B, K, rows, Hv), dtype, query), tpu.out_type((B, K, rows, LANES), jnp.float32, query)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary')),
    )(*tables, q, sink, *[key_pages] * together, *[value_pages] * together)
    out = out[:, :, : T * G].reshape(B, K, T, G, Hv).transpose(0, 2, 1, 3, 4).reshape(B, T, N, Hv)
    lse = lse[:, :, : T * G, 0].reshape(B, K, T, G).swapaxes(2, 3).reshape(B, N, T)
    return out, lse
