"""Delta rule on TPU, forward and backward, chunk by chunk.

    S' = exp(g_t) S_{t-1}        S_t = S' + beta_t k_t^T (v_t - k_t S')        o_t = scale q_t S_t

`delta_rule` has the signature of `attnx.ops.delta_rule` without `impl`; `unsupported` says why a call can't run here.
The kernels are `pallas_kernels.chunked_tpu`; README.md in this folder has what was compiled and interpreted.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import chunked_tpu


def unsupported(
    query,
    key,
    value,
    beta,
    log_decay=None,
    *,
    initial_state=None,
    segment_ids=None,
    scale=None,
    chunk=None,
    precision=None,
) -> str | None:
    """Why this call can't run on the kernel, with the nearest choice that can; or None."""
    return chunked_tpu.refuse(query, key, value, log_decay, scale, chunk)


def delta_rule(
    query,
    key,
    value,
    beta,
    log_decay=None,
    *,
    initial_state=None,
    segment_ids=None,
    scale=None,
    chunk=None,
    precision=None,
):
    """The (gated) delta rule.

    Args:
      query, key, value: [B, T, K, H], [B, T, K, H], [B, T, N, V], all bfloat16 or float32, N a multiple of K.
      beta: [B, T, N].
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
    if reason := unsupported(query, key, value, beta, log_decay, scale=scale, chunk=chunk):
        raise ValueError(f'delta_rule on mosaic_tpu: {reason}')
    arrays = query, key, value, beta, log_decay, initial_state, segment_ids
    return chunked_tpu.run(_delta_rule, *arrays, scale, chunk, precision == 'highest')


def _delta_rule(state, query, chunk, value, beta):
    C = value.shape[0]
    strict = lax.broadcasted_iota(jnp.int32, (C, C), 1) < lax.broadcasted_iota(jnp.int32, (C, C), 0)
    beta = chunked_tpu.column(beta)
    coupling = jnp.where(strict, beta * chunk.products(chunk.key), 0.0)
    written = chunked_tpu.unit_lower_solve(coupling, beta * (value - chunk.read(chunk.key, state)))
    out = chunk.dot(chunk.products(query), written) + chunk.read(query, state)
    return chunk.write(written, state), out
