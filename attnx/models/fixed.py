"""A fixed sequence that passes all layers beside each row, so that a layer may take its attention maps from there.

Rows are [row 0, the sequence, row 1, the sequence, …], the sequence at each row's positions and cut into its documents; layers
see twice as many rows and need not know. One that does reads 'fixed', int32 [2 B]: the row that each row's maps come from. So
maps depend on parameters and positions alone; in the sequence's own rows they are its own. The whole model costs twice the
time, memory and state. Paper: Deconstructing attention, 2025, arXiv 2510.11602 ('random-fixed', 'text-fixed').
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attnx.nn.state import positions
from attnx.spec import Context

NOISE = 'noise'


def noise(where, width: int):
    """N(0, 1) of each position: int [B, T] -> float32 [B, T, width]."""
    draw = lambda at: jax.random.normal(jax.random.fold_in(jax.random.key(0), at), (width,))
    return jax.vmap(jax.vmap(draw))(where)


def beside(model, fixed: str, x, ctx: Context):
    """Embedded rows x [B, T, M] with the sequence beside each: (x [2 B, T, M], their context)."""
    where = jnp.broadcast_to(positions(ctx, x.shape[1]), x.shape[:2])
    tokens = jnp.zeros_like(where)
    if fixed != NOISE:
        text = jnp.asarray(np.frombuffer(fixed.encode(), np.uint8).astype(np.int32))
        tokens = text[where % text.size]
    there = noise(where, x.shape[-1]).astype(x.dtype) if fixed == NOISE else model.embed(tokens, where, ctx.key)
    both = lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
    ctx = dataclasses.replace(
        ctx,
        positions=None if ctx.positions is None else both(*[jnp.broadcast_to(ctx.positions, where.shape)] * 2),
        segment_ids=None if ctx.segment_ids is None else both(ctx.segment_ids, ctx.segment_ids),
        inputs={name: both(value, tokens if name == 'tokens' else value) for name, value in ctx.inputs.items()},
        shared={**ctx.shared, 'fixed': jnp.repeat(2 * jnp.arange(x.shape[0]) + 1, 2)},
    )
    return both(x, there), ctx
