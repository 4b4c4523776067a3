"""Short causal depthwise convolution with carried state and segments. See `short_conv`."""

import jax
import jax.numpy as jnp

from attnx.names import nearest
from attnx.ops import chunks, parallel

ACTIVATIONS = {'silu': jax.nn.silu}
EPS = 1e-6


def short_conv(x, kernel, *, initial_state=None, segment_ids=None, activation=None, unit_heads=None, impl='auto'):
    """Each channel's weighted sum of its last W values, never across the start of a segment.

        y_t = sum_{w < W} kernel_w x_{t-W+1+w}

    so that kernel[W-1] weighs the present token (the order of torch's Conv1d weights). Any bias is the caller's.

    Args:
      x: [B, T, D].
      kernel: [W, D].
      initial_state: the W-1 values before the first token, oldest first, [B, W-1, D]; None is zero.
      segment_ids: integers [B, T]; values before a token whose id differs from the token before are zero to it and to
        those after it. The first token continues `initial_state` whatever its id.
      activation: None, or 'silu': applied to the sum before it is rounded.
      unit_heads: None, or N, which divides D: each of N heads is then divided by its length, y / sqrt(|y|^2 + 1e-6), before
        it is rounded.
      impl: 'auto', 'reference' (token by token), 'xla', or a kernel. Both forms have forward-mode and second-order
        derivatives.

    Returns:
      y [B, T, D] in x's dtype (summed in float32 or wider), and the last W-1 values [B, W-1, D], zero before the last
      segment's start, in the dtype of `initial_state`, else of x.

    Raises:
      ValueError: a rank, shape or dtype is not the one above; the activation is unknown; the heads do not divide D.
    """
    sizes = {}
    chunks.require_shape('short_conv', 'x', x, 'B T D', sizes)
    chunks.require_shape('short_conv', 'kernel', kernel, 'W D', sizes)
    if 0 in sizes.values():
        raise ValueError(f'short_conv: a dimension is 0: x has shape {jnp.shape(x)}, kernel {jnp.shape(kernel)}')
    if initial_state is not None:
        sizes['W-1'] = sizes['W'] - 1
        chunks.require_shape('short_conv', 'initial_state', initial_state, 'B W-1 D', sizes)
    if segment_ids is not None:
        chunks.require_shape('short_conv', 'segment_ids', segment_ids, 'B T', sizes, floating=False)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f'short_conv: unknown activation {activation!r}; {nearest(activation, [*ACTIVATIONS])}, or None')
    if unit_heads is not None and (unit_heads < 1 or sizes['D'] % unit_heads):
        raise ValueError(f'short_conv: unit_heads {unit_heads} must divide the {sizes["D"]} channels')
    forms = {'reference': reference, 'xla': xla}
    options = {'initial_state': initial_state, 'segment_ids': segment_ids, 'activation': activation, 'unit_heads': unit_heads}
    return parallel.run('short_conv', impl, forms, (x, kernel), options)


def _first_state(x, kernel, initial_state):
    if initial_state is not None:
        return initial_state
    return jnp.zeros((x.shape[0], kernel.shape[0] - 1, x.shape[2]), x.dtype)


def _finish(y, activation, unit_heads):
    """What follows the sum [..., D], in its dtype."""
    y = y if activation is None else ACTIVATIONS[activation](y)
    if unit_heads is None:
        return y
    heads = y.reshape(*y.shape[:-1], unit_heads, -1)
    return (heads * jax.lax.rsqrt(jnp.sum(jnp.square(heads), axis=-1, keepdims=True) + EPS)).reshape(y.shape)


def reference(x, kernel, *, initial_state=None, segment_ids=None, activation=None, unit_heads=None):
    """The definition, token by token: a window that slides and that a new segment empties."""
    state = _first_state(x, kernel, initial_state)
    dtype = chunks.accumulator(x, kernel)
    fresh = jnp.zeros(x.shape[:2], bool) if segment_ids is None else chunks.resets(segment_ids)

    def step(past, xs):
        x, fresh = xs
        window = jnp.concatenate([jnp.where(fresh[:, None, None], 0, past), x[:, None]], axis=1)
        return window[:, 1:], jnp.sum(window * kernel, axis=1)

    xs = (jnp.moveaxis(x.astype(dtype), 1, 0), fresh.T)
    past, y = jax.lax.scan(step, state.astype(dtype), xs)
    return jnp.moveaxis(_finish(y, activation, unit_heads), 0, 1).astype(x.dtype), past.astype(state.dtype)


def xla(x, kernel, *, initial_state=None, segment_ids=None, activation=None, unit_heads=None):
    """W shifted copies, weighted, masked and summed in one pass."""
    state = _first_state(x, kernel, initial_state)
    dtype, taps, length = chunks.accumulator(x, kernel), kernel.shape[0], x.shape[1]
    past = jnp.concatenate([state, x], axis=1)
    count = None  # resets up to each value, those of the initial state included
    if segment_ids is not None:
        count = jnp.pad(jnp.cumsum(chunks.resets(segment_ids), axis=1), [(0, 0), (taps - 1, 0)])[..., None]
    y = jnp.zeros((), dtype)
    for tap in range(taps):
        shifted = past[:, tap : tap + length].astype(dtype)
        if count is not None:
            shifted = jnp.where(count[:, tap : tap + length] == count[:, taps - 1 :], shifted, 0)
        y += kernel[tap].astype(dtype) * shifted
    last = past[:, length:]
    if count is not None:
        last = jnp.where(count[:, length:] == count[:, -1:], last, 0)
    return _finish(y, activation, unit_heads).astype(x.dtype), last.astype(state.dtype)
