"""Gated linear recurrence: a matrix state that decays and adds, read by queries. See `gated_linear`."""

import jax.numpy as jnp

from attnx.ops import chunks, parallel
from pallas_kernels.kept import kept_once


def gated_linear(
    query,
    key,
    value,
    log_decay=None,
    *,
    initial_state=None,
    segment_ids=None,
    scale=None,
    chunk=None,
    precision=None,
    impl='auto',
):
    """Linear attention with decay, the core of linear transformers, lightning, RetNet, GLA, Mamba-2, LightNet.

        S_t = exp(g_t) S_{t-1} + k_t^T v_t        o_t = scale q_t S_t

    The decay of step t multiplies the state before step t's write, and step t reads after its write. Nothing
    normalises: `normalized_gated_linear` divides by the summed weights.

    Args:
      query: [B, T, K, H]; K divides N, and query and key head n // (N/K) serves value head n without being copied.
      key: [B, T, K, H].
      value: [B, T, N, Hv], N heads.
      log_decay: g <= 0, natural log: None (no decay), [N] constant per head, [B, T, N] per token, or [B, T, N, H] per
        token and key channel. -inf erases. Exact to rounding for any size of decay.
      initial_state: S before the first token, [B, N, H, Hv]; None is zero.
      segment_ids: integers [B, T]; the state is zero before a token whose id differs from the token before. The first
        token continues `initial_state` whatever its id.
      scale: factor on the query; None is 1 (mechanisms that want H^-0.5 say so).
      chunk: tokens compared all at once in the chunked form, a power of two; None chooses by shape. No effect on the
        result beyond rounding.
      precision: None, or 'highest': the last state and gradients of 32 bits as good as float32 makes them of these inputs. By
        themselves kernels sum log_decay's gradient token by token and take decays from the hardware's exp2, which is faster and
        up to seven times further off. 'reference' and 'xla' are float32 whichever is asked for.
      impl: 'auto', 'reference' (token by token), 'xla' (chunked), or a kernel. Both forms have forward-mode and
        second-order derivatives.

    Returns:
      out [B, T, N, Hv] in value's dtype, and the state after the last token [B, N, H, Hv] in float32 (float64 for
      float64 inputs).

    Raises:
      ValueError: a rank, shape or dtype is not the one above; chunk is not a power of two; log_decay is known to be
        positive; precision is none of these.

    Memory: O(T), forward and backward. Paper: 2006.16236, 2307.08621, 2312.06635, 2405.21060.
    """
    arrays = query, key, value, log_decay, initial_state, segment_ids
    chunks.require_recurrence('gated_linear', *arrays, scale, chunk, precision)
    forms = {'reference': reference, 'xla': xla}
    options = {'initial_state': initial_state, 'segment_ids': segment_ids, 'scale': scale}
    options |= {'chunk': chunk, 'precision': precision}
    out, state = parallel.run('gated_linear', impl, forms, (query, key, value, log_decay), options)
    return kept_once(out), state


def normalized_gated_linear(query, key, value, log_decay=None, *, eps=1e-6, **options):
    """`gated_linear` divided by its weights' sum: o_t = q_t S_t / (q_t z_t + eps), z_t = exp(g_t) z_{t-1} + k_t.

    For feature maps >= 0. z is one more value column of ones, so states are [B, N, H, Hv + 1].
    """
    wide = jnp.asarray(value, chunks.accumulator(query, key, value))
    wide = jnp.concatenate([wide, jnp.ones_like(wide[..., :1])], axis=-1)
    out, state = gated_linear(query, key, wide, log_decay, **options)
    return (out[..., :-1] / (out[..., -1:] + eps)).astype(value.dtype), state


def reference(
    query, key, value, log_decay=None, *, initial_state=None, segment_ids=None, scale=None, chunk=None, precision=None
):
    """The definition, token by token."""
    del chunk, precision

    def update(state, key, value, _):
        return state + key[..., :, None] * value[..., None, :]

    return chunks.step_by_step(update, query, key, value, None, log_decay, initial_state, segment_ids, scale)


def xla(query, key, value, log_decay=None, *, initial_state=None, segment_ids=None, scale=None, chunk=None, precision=None):
    """Chunk by chunk: pairs within a chunk as one masked product, earlier chunks through the state."""
    del precision  # it is float32
    if value.shape[1] == 1:
        return reference(query, key, value, log_decay, initial_state=initial_state, scale=scale)

    def body(state, query, span, value, _):
        query = query if scale is None else scale * query
        out = chunks.matmul(span.products(query), value) + span.read(query, state)
        return span.write(value, state), out

    size = chunks.size(chunk, key, value, log_decay)
    return chunks.scan(body, query, key, value, None, log_decay, initial_state, segment_ids, size)
