"""Softmax attention of a few new tokens over keys and values that lie in pages of a pool: one step of decoding.

Sequences of different lengths share the pool; a table says which pages are whose (vLLM, arXiv:2309.06180).
"""

import jax
import jax.numpy as jnp

from attnx import dispatch
from attnx.ops import masks, scores
from attnx.ops.softmax_attention import reference as dense_reference
from attnx.ops.softmax_attention import xla as dense_xla


def paged_attention(
    query, key_pages, value_pages, pages, lengths, *, scale=None, window=None, softcap=None, sinks=None, impl='auto'
):
    """Causal softmax attention of the last T tokens of each sequence over its cached keys and values.

    Args:
      query: [B, T, N, H]: of tokens lengths - T ... lengths - 1, whose keys and values are in the cache already.
      key_pages, value_pages: [K, P, size, H] and [K, P, size, Hv]; K divides N. What stands in slots and pages that are not
        in use, NaN too, is not seen.
      pages: int32 [B, n]: the pages of a sequence in order, `size` tokens each; entries beyond its length are not looked at.
      lengths: int32 [B], at most n size. Queries before the first token, and of an empty sequence, get 0 and lse -inf.
      scale: a positive number; H ** -0.5 by default.
      window: keys that a token sees, itself included; None: all.
      softcap: a number c: logits become c tanh(logit / c); None: none.
      sinks: float [N], a logit a head in the denominator, without a value.
      impl: 'reference' and 'xla' gather each sequence's pages; 'mosaic_tpu' reads them where they are. No derivative is
        promised: training does not page.

    Returns:
      out [B, T, N, Hv] in value_pages' dtype and lse float32 [B, N, T].

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    """
    _check(query, key_pages, value_pages, pages, lengths, scale, window, sinks)
    options = {'scale': scale, 'window': window, 'softcap': softcap, 'sinks': sinks}
    forms = {'reference': reference, 'xla': xla}
    return dispatch.run('paged_attention', impl, forms, (query, key_pages, value_pages, pages, lengths), options)


def reference(query, key_pages, value_pages, pages, lengths, *, scale=None, window=None, softcap=None, sinks=None):
    """The quadratic form on gathered pages."""
    return _gathered(dense_reference, query, key_pages, value_pages, pages, lengths, scale, window, softcap, sinks)


def xla(query, key_pages, value_pages, pages, lengths, *, scale=None, window=None, softcap=None, sinks=None):
    """The blockwise form on gathered pages."""
    return _gathered(dense_xla, query, key_pages, value_pages, pages, lengths, scale, window, softcap, sinks)


def _gathered(attend, query, key_pages, value_pages, pages, lengths, scale, window, softcap, sinks):
    (B, T), (_, count, size, _), n = query.shape[:2], key_pages.shape, pages.shape[1]
    slots = jnp.arange(n * size)
    used = slots < lengths[:, None]

    def gather(pool):
        """[K, P, size, H] -> [B, n size, K, H], zeros where nothing is."""
        found = pool[:, jnp.clip(pages, 0, count - 1)]
        found = jnp.moveaxis(found.reshape(pool.shape[0], B, n * size, pool.shape[3]), 0, 2)
        return jnp.where(used[..., None, None], found, 0)

    tokens = lengths[:, None] - T + jnp.arange(T)
    held = jnp.where(used, slots, -1)
    mask = masks.causal(tokens, held)
    mask = mask if window is None else mask & masks.window(window, tokens, held)
    score = None if softcap is None else scores.softcap(softcap)
    options = {'mask': mask, 'score': score, 'scale': scale, 'sinks': sinks}
    return attend(query, gather(key_pages), gather(value_pages), **options, return_lse=True)


def _check(query, key_pages, value_pages, pages, lengths, scale, window, sinks):
    q, k, v, p, l = (jnp.shape(x) for x in (query, key_pages, value_pages, pages, lengths))
    given = f'given query {q}, key_pages {k}, value_pages {v}, pages {p}, lengths {l}'
    if not len(q) == len(k) == len(v) == 4 or k[:3] != v[:3] or k[3] != q[3] or len(p) != 2 or l != q[:1] or p[0] != q[0]:
        raise ValueError(
            'paged_attention: expected query [B, T, N, H], key_pages [K, P, size, H], value_pages [K, P, size, Hv], pages '
            f'[B, n], lengths [B]; {given}'
        )
    if 0 in (*q, *k, *v, *p) or q[2] % k[0]:
        raise ValueError(f'paged_attention: a dimension is 0, or {k[0]} key heads do not divide {q[2]} query heads; {given}')
    if not all(jnp.issubdtype(jnp.result_type(x), jnp.integer) for x in (pages, lengths)):
        raise ValueError('paged_attention: pages and lengths must be integers')
    if isinstance(scale, jax.Array) or (scale is not None and scale <= 0):
        raise ValueError(f'paged_attention: scale must be a positive number, given {scale}')
    if window is not None and window < 1:
        raise ValueError(f'paged_attention: window must be at least 1, given {window}')
    if sinks is not None and jnp.shape(sinks) != (q[2],):
        raise ValueError(f'paged_attention: sinks must be float [N] with N={q[2]}, given {jnp.shape(sinks)}')
