"""Means over a document whose weights depend on the key alone. See `weighted_mean`."""

import jax
import jax.numpy as jnp

from attnx.ops import chunks
from attnx.ops.gated_linear import gated_linear

_LEAST = -1e4  # exp of it is 0


def weighted_mean(logits, value, *, causal=True, initial_state=None, segment_ids=None, impl='auto'):
    """out_t = sum exp(e_s) v_s / sum exp(e_s), over s <= t, or over all tokens of t's document: softmax attention without
    a query, in linear time, by `gated_linear` with the running maximum as its decay.

    Args:
      logits: e, [B, T, N].
      value: [B, T, N, Hv].
      initial_state: {'sums': float32 [B, N, 1, Hv + 1], 'top': float32 [B, N]}, both 0 before the first token.
      segment_ids: int [B, T], documents; 0 is padding, whose output is 0.

    Returns:
      (out [B, T, N, Hv] in value's dtype, the state after the last token).

    Raises:
      ValueError: a state is given, but not causal; shapes that do not fit.
    """
    if initial_state is not None and not causal:
        raise ValueError('weighted_mean: a mean over all tokens needs all of them at once: it takes no state')
    sizes = {}
    chunks.require_shape('weighted_mean', 'logits', logits, 'B T N', sizes)
    chunks.require_shape('weighted_mean', 'value', value, 'B T N H', sizes)
    dtype = chunks.accumulator(logits, value)
    logits = logits.astype(dtype)
    sums = top = None
    if initial_state is not None:
        sums = initial_state['sums']
        top = jnp.where(sums[..., 0, -1] > 0, initial_state['top'], -jnp.inf)
    most = jax.lax.stop_gradient(logits)
    if top is not None:
        most = most.at[:, 0].max(top.astype(dtype))
    most = chunks.running(jnp.maximum, most, segment_ids)
    first = jnp.full_like(most[:, :1], -jnp.inf) if top is None else top[:, None].astype(dtype)
    before = jnp.concatenate([first, most[:, :-1]], axis=1)
    wide = jnp.concatenate([value.astype(dtype), jnp.ones((*value.shape[:3], 1), dtype)], axis=-1)
    read, sums = gated_linear(
        jnp.ones((*logits.shape, 1), dtype),
        jnp.exp(logits - most)[..., None],
        wide,
        jnp.clip(before - most, _LEAST, 0.0),
        initial_state=sums,
        segment_ids=segment_ids,
        impl=impl,
    )
    if not causal:
        read = chunks.at_the_end(read, segment_ids)
    out = (read[..., :-1] / jnp.maximum(read[..., -1:], 1e-30)).astype(value.dtype)
    if segment_ids is not None:
        out = jnp.where((segment_ids > 0)[:, :, None, None], out, 0)
    return out, {'sums': sums, 'top': most[:, -1].astype(jnp.float32)}

