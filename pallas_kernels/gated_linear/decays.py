"""Decays of tokens and heads as the sweeps take them."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import common
from pallas_kernels.gated_linear.sweep import CHUNK

ERASE = -128.0  # base-2 decay of a step that erases: exp2 of it is 0 in float32 without denormals
NEGLIGIBLE = -64.0  # base-2 decay through which no gradient is felt
GROUP = 8  # chunks between the states that anchor the gradient of log_decay


def steps(log_decay, segment_ids):
    """Base-2 log-decay of each step, resets included: [B or 1, T or 1, N or 1], or None."""
    step = None
    if log_decay is not None:
        step = jnp.maximum(log_decay.astype(jnp.float32) * common.LOG2E, ERASE)
        step = step[None, None] if step.ndim == 1 else step
    if segment_ids is not None:
        reset = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)])[..., None]
        step = jnp.where(reset, ERASE, 0.0 if step is None else step).astype(jnp.float32)
    return step


def coarse(step):
    """Steps in multiples of 2 ** -11, of which float32 sums 64 exactly, erasing ones too."""
    return jnp.round(step * 2.0**11) * 2.0**-11


def rounded_off(log_decay, step):
    """What `steps` left off the product with log2 e: factors of 12 bits multiply exactly."""
    x = log_decay.astype(jnp.float32)
    x = x[None, None] if x.ndim == 1 else x
    high, factor = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & -0x1000, jnp.float32), 2954 / 2048
    rest = ((high * factor - step) + (x - high) * factor) + x * (common.LOG2E - factor)
    return jnp.where(step > ERASE, rest, 0.0)


def cumulative(step, T: int, log_decay=None):
    """Sums within each chunk, inclusive: [B or 1, N or 1, chunks or 1, 2, 64]. Tokens past the end are idle.

    In two parts: sums of the steps' coarse parts and of what these leave, of log_decay's too where it is given.
    """
    if step is None:
        return None
    fine = step - coarse(step)
    fine = fine if log_decay is None else fine + rounded_off(log_decay, step)
    step = jnp.stack([coarse(step), fine], axis=1)
    if step.shape[2] == 1 and T % CHUNK == 0:
        return jnp.moveaxis(step, 3, 1)[:, :, None] * jnp.arange(1, CHUNK + 1, dtype=jnp.float32)
    step = jnp.broadcast_to(step, (step.shape[0], 2, T, step.shape[3]))
    step = jnp.moveaxis(jnp.pad(step, [(0, 0), (0, 0), (0, -T % CHUNK), (0, 0)]), 3, 1)
    return jnp.cumsum(jnp.moveaxis(step.reshape(*step.shape[:3], -1, CHUNK), 2, 3), axis=-1)
