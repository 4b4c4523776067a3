"""Decays of tokens and heads as the sweeps take them, and the gradient of their logarithms."""

import jax.numpy as jnp
import numpy as np
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


def decay_gradient(each, anchors, step):
    """Gradient of the log-decay of every step.

    With a_t = scale q_t (exp(g_t) S_{t-1}) do_t and b_t likewise what v_t k_t feels from later tokens, the gradient obeys
    d_t = d_{t+1} + a_t - b_t. Summed from the end that would carry rounding errors over the whole sequence, and into steps
    that decay so much that nothing is felt; so the sum starts anew at every group of chunks, from <S, dS> there, and at every
    such step, from 0. What it then misses <S, dS> by where the group begins is taken from its tokens in equal steps.

    Args:
      each: a_t - b_t, float32 [B, N, T].
      anchors: d of each group's first token and of the one after the last, [B, N, groups + 1].
      step: `steps`.
    """
    (B, N, T), groups = each.shape, anchors.shape[-1] - 1
    silent = jnp.broadcast_to(step.swapaxes(1, 2), (step.shape[0], step.shape[2], T)) <= NEGLIGIBLE
    idle = [(0, 0), (0, 0), (0, groups * GROUP * CHUNK - T)]
    cut = lambda x: jnp.pad(x, idle).reshape(*x.shape[:2], groups, GROUP, CHUNK)
    each, silent = cut(each), cut(silent).astype(jnp.int32)
    t = np.arange(CHUNK)
    upto = jnp.asarray(t[:, None] <= t, jnp.bfloat16)
    count = jnp.dot(silent.astype(jnp.bfloat16), upto).astype(jnp.int32)  # silent steps of the chunk up to each, inclusive
    heard = (t[:, None] <= t) & ((count - silent)[..., :, None] == count[..., None, :])
    within = jnp.where(heard, each[..., None, :], 0.0).sum(-1)
    silence, following, chunks = count[..., -1:] - count + silent, anchors[..., 1:], []
    for c in reversed(range(GROUP)):
        chunks.append(within[..., c, :] + jnp.where(silence[..., c, :] == 0, following[..., None], 0.0))
        following = chunks[-1][..., 0]
    each = jnp.stack(chunks[::-1], axis=3).reshape(B, N, groups, GROUP * CHUNK)
    silences = count[..., -1:]
    heard = (count + jnp.cumsum(silences, axis=3) - silences == 0).reshape(*silent.shape[:2], *each.shape[2:])
    each += (anchors[..., :-1] - each[..., 0])[..., None] * bridge(heard, T)
    return each.reshape(B, N, -1)[..., :T]


def bridge(heard, T: int):
    """1 at each group's first token, less and less until the last of the T that is heard of there: [.., groups, tokens].

    heard: [.., groups, tokens], whether no step from the first up to this one is silent.
    """
    groups, size = heard.shape[-2:]
    place = np.arange(groups * size).reshape(groups, size)
    length = (heard & (place < T)).sum(-1, keepdims=True)
    return jnp.where(heard, jnp.maximum(length - place[0], 0) / jnp.maximum(length, 1), 0.0)
