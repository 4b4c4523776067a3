"""Decays of tokens and heads as the sweeps take them, and the gradient of their logarithms."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common
from pallas_kernels.common import COL, ROW, TILE
from pallas_kernels.gated_linear.sweep import CHUNK, SQUARE

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


def decay_gradient(each, anchors, step, *, interpret=False):
    """Gradient of the log-decay of every step.

    With a_t = scale q_t (exp(g_t) S_{t-1}) do_t and b_t likewise what v_t k_t feels from later tokens, the gradient obeys
    d_t = d_{t+1} + a_t - b_t. Summed from the end that would carry rounding errors over the whole sequence, and into steps
    that decay so much that nothing is felt; so the sum starts anew at every group of chunks, from <S, dS> there, and at every
    such step, from 0. What it then misses <S, dS> by where the group begins is taken from its tokens in equal steps.

    A warpgroup does a group of chunks: a sum over tokens is that of a row of a masked tile of 64 x 64.

    Args:
      each: a_t - b_t, float32 [B, N, T].
      anchors: d of each group's first token and of the one after the last, [B, N, groups + 1].
      step: `steps`.
    """
    (B, N, T), groups, size = each.shape, anchors.shape[2] - 1, GROUP * CHUNK
    step = jnp.broadcast_to(step.swapaxes(1, 2), (step.shape[0], step.shape[2], T))
    each, step = (jnp.pad(x, [(0, 0), (0, 0), (0, groups * size - T)]) for x in (each, step))

    def kernel(each_ref, anchors_ref, step_ref, out_ref):
        b, h, g = (lax.axis_index(name) for name in 'bhg')
        i, j = (plgpu.broadcasted_iota(jnp.int32, SQUARE, axis, layout=TILE).astype(jnp.float32) for axis in (0, 1))
        of = lambda ref: ref.at[b if ref.shape[0] > 1 else 0, h if ref.shape[1] > 1 else 0]
        rows = lambda c: pl.ds(g * size + c * CHUNK, CHUNK)
        spread = lambda ref, c: common.col(plgpu.load(of(ref).at[rows(c)], layout=COL, optimized=False), SQUARE)
        least = lambda x: -(-x).max(axis=1)
        # Vectors have a number for each token, some of them the same.
        following, chunks = common.filled(CHUNK, 0.0) + anchors_ref[b, h, g + 1], []
        heard = common.filled(CHUNK, 0.0) + jnp.minimum(T - g * size, size).astype(jnp.float32)  # tokens before a silent one
        for c in reversed(range(GROUP)):
            silent = jnp.where(spread(step_ref, c) <= NEGLIGIBLE, j, 1.0 * CHUNK)
            values, first = spread(each_ref, c), least(silent)
            end = least(jnp.where(j >= i, silent, 1.0 * CHUNK))  # the next that is silent, from each token on
            within = jnp.where(j >= i, jnp.where(j < common.row(end, SQUARE), values, 0.0), 0.0).sum(axis=1)
            whole = jnp.where(j < common.row(first, SQUARE), values, 0.0).sum(axis=1)
            chunks.append(within + jnp.where(end < CHUNK, 0.0, following))
            following = whole + jnp.where(first < CHUNK, 0.0, following)
            heard = jnp.where(first < CHUNK, first + 1.0 * c * CHUNK, heard)
        slope = (anchors_ref[b, h, g] - following) / jnp.maximum(heard, 1.0)
        place = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=ROW).astype(jnp.float32)
        for c, x in enumerate(reversed(chunks)):
            of(out_ref).at[rows(c)][...] = x + jnp.maximum(heard - place - 1.0 * c * CHUNK, 0.0) * slope

    kernel.__name__ = 'decay_gradient'  # what profilers show
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(each.shape, jnp.float32),
        grid=(B, N, groups),
        grid_names=('b', 'h', 'g'),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # no memory is shared
        ),
        **({'interpret': plgpu.InterpretGPUParams(detect_races=True)} if interpret else {}),
    )(each, anchors, step)
    return out[..., :T]


def bridge(heard, T: int):
    """1 at each group's first token, less and less until the last of the T that is heard of there: [.., groups, tokens].

    heard: [.., groups, tokens], whether no step from the first up to this one is silent.
    """
    groups, size = heard.shape[-2:]
    place = np.arange(groups * size).reshape(groups, size)
    length = (heard & (place < T)).sum(-1, keepdims=True)
    return jnp.where(heard, jnp.maximum(length - place[0], 0) / jnp.maximum(length, 1), 0.0)
