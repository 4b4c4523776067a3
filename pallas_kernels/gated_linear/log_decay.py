"""The gradient of log_decay from what the sweeps emit: one kernel, a warp a head and group of chunks."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common, rows
from pallas_kernels.gated_linear import decays
from pallas_kernels.gated_linear.sweep import CHUNK


@common.lowered_once('T', 'scale', 'interpret')
def gradient(reads, writes, first, met, decay, *, T: int, scale=1.0, interpret=False):
    """Gradient of the log-decay of every step, float32 [B, T, N].

    With a_t = scale q_t (exp(g_t) S_{t-1}) do_t and b_t likewise what v_t k_t feels from later tokens, the gradient obeys
    d_t = d_{t+1} + a_t - b_t. Summed from the end that would carry rounding errors over the whole sequence, and into steps
    that decay so much that nothing is felt; so the sum starts anew at every group of chunks, from <S, dS> there, and at every
    such step, from 0. What it then misses <S, dS> by where the group begins is taken from its tokens in equal steps.

    Args: all without the scale; of X numbers and of parts, as many as come, the sum counts.
      reads, writes: a_t and b_t, float32 [B, N, parts, T'].
      first: <S, dS> before the first token, float32 [B, N, X], or None for zero.
      met: the same after each group of chunks, float32 [B, N, groups, X].
      decay: `decays.cumulative`.
    """
    (B, N, *_), groups, GROUP = reads.shape, met.shape[2], decays.GROUP
    heads, size = N + -N % rows.ROWS, GROUP * CHUNK
    tile = rows.ROWS, size

    def whole(x, sizes: dict):
        """With zeros up to the sizes of these axes."""
        return jnp.pad(x, [(0, sizes.get(axis, length) - length) for axis, length in enumerate(x.shape)])

    reads, writes = (whole(x, {1: heads, 3: groups * size}) for x in (reads, writes))
    met = whole(met, {1: heads, 3: met.shape[3] + -met.shape[3] % 32})
    first = None if first is None else whole(first, {1: heads, 2: met.shape[3]})
    decay = jnp.broadcast_to(decay, (*decay.shape[:2], common.cdiv(T, CHUNK), *decay.shape[3:]))
    decay = whole(decay, {1: heads, 2: groups * GROUP})

    def kernel(reads_ref, writes_ref, first_ref, met_ref, decay_ref, out_ref):
        b, h, g = (lax.axis_index(name) for name in 'bhg')
        mine, tokens, chunks = pl.ds(h * rows.ROWS, rows.ROWS), pl.ds(g * size, size), pl.ds(g * GROUP, GROUP)
        load = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False)
        total = lambda ref: sum(load(ref.at[b, mine, part, tokens], rows.TILE) for part in range(ref.shape[2]))
        anchor = lambda ref: load(ref, rows.ANY).sum(axis=1) * scale
        after, before = (anchor(met_ref.at[b, mine, at]) for at in (g, jnp.maximum(g - 1, 0)))
        before = jnp.where(g > 0, before, 0.0 if first_ref is None else anchor(first_ref.at[b, mine]))
        sums = load(decay_ref.at[b if decay.shape[0] > 1 else 0, mine, chunks, 0], rows.CHUNKS)
        heard = jnp.where(rows.differences(sums, tile, interpret) > decays.NEGLIGIBLE, 1.0, 0.0)
        each = rows.suffixes((total(reads_ref) - total(writes_ref)) * scale, heard, after, interpret)
        # The tokens before the first step through which nothing is felt, or of the group.
        place, most = rows.place(tile), jnp.minimum(T - g * size, size).astype(jnp.float32)
        length = -(-jnp.where(heard > 0, most, place)).max(axis=1)
        missed = before - jnp.where(place == 0, each, 0.0).sum(axis=1)
        slope, left = (rows.across(x, tile) for x in (missed / jnp.maximum(length, 1.0), length))
        rows.put_columns(out_ref.at[b, tokens, mine], each + slope * jnp.maximum(left - place, 0.0), interpret)

    kernel.__name__ = 'log_decay'  # what profilers show
    out_type = jax.ShapeDtypeStruct((B, groups * size, heads), jnp.float32)
    run = common.launch(kernel, out_type, {'b': B, 'h': heads // rows.ROWS, 'g': groups}, 1, interpret)
    return run(reads, writes, first, met, decay)[:, :T, :N]
