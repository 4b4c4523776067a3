"""Gated linear recurrence on TPU, forward and backward, chunk by chunk.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t        o_t = scale q_t S_t

`gated_linear` has the signature of `attnx.ops.gated_linear` without `impl`; `unsupported` says why a call can't run here.
The kernels are `pallas_kernels.chunked_tpu`; README.md in this folder has what was compiled and interpreted.
"""

from pallas_kernels import chunked_tpu


def unsupported(
    query, key, value, log_decay=None, *, initial_state=None, segment_ids=None, scale=None, chunk=None, precision=None
) -> str | None:
    """Why this call can't run on the kernel, with the nearest choice that can; or None."""
    return chunked_tpu.refuse(query, key, value, log_decay, scale, chunk)


def gated_linear(
    query, key, value, log_decay=None, *, initial_state=None, segment_ids=None, scale=None, chunk=None, precision=None
):
    """Linear attention with decay.

    Args:
      query, key, value: [B, T, K, H], [B, T, K, H], [B, T, N, V], all bfloat16 or float32, N a multiple of K.
      log_decay: None, [N], [B, T, N] or [B, T, N, H], natural log.
      initial_state: [B, N, H, V] or None.
      segment_ids: integers [B, T] or None; the state is zero before a token whose id differs from the one before.
      scale: a Python number.
      chunk: None, 16, 32, 64 or 128.
      precision: None, or 'highest': products with float32 arrays take six passes, not three, for 16-bit inputs too.

    Returns:
      out [B, T, N, V] in value's dtype and the last state [B, N, H, V] float32. First derivatives only.

    Raises:
      ValueError: `unsupported` has a reason.
    """
    if reason := unsupported(query, key, value, log_decay, scale=scale, chunk=chunk):
        raise ValueError(f'gated_linear on mosaic_tpu: {reason}')
    arrays = query, key, value, None, log_decay, initial_state, segment_ids
    return chunked_tpu.run(_gated_linear, *arrays, scale, chunk, precision == 'highest')


def _gated_linear(state, query, chunk, value, beta):
    out = chunk.dot(chunk.products(query), value) + chunk.read(query, state)
    return chunk.write(value, state), out
