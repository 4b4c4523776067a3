"""Pooling: each token moves to the mean of its neighbourhood. No parameters, no queries, no keys.

Equation: y_t = mean_{s in P_t} x_s - x_t;  P_t: the last p tokens, itself included (causal), or those at most p // 2
    away, along the line, or in both dimensions of a grid. Nothing outside the document counts, in the divisor neither.
Paper: MetaFormer is actually what you need for vision (PoolFormer), 2021, arXiv 2111.11418.
Differs: the paper pools 3 x 3 on a grid (`grid` > 0) around each token; along a sequence, and causally, are extensions.
Cost: train O(T p) sums a channel (p² on a grid), O(T) memory, in plain XLA; decode keeps the last p - 1 inputs.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx.nn.grid import neighbours
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    window: int = 3  # p: tokens of the neighbourhood, in each dimension of a grid; odd where it looks both ways
    grid: int = 0  # tokens in a row of a 2-D grid, laid out row by row; 0: a sequence

    def __post_init__(self):
        if self.window < 1 or self.grid < 0:
            raise ValueError(f'window {self.window} must be at least 1 and grid {self.grid} at least 0')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """The last p - 1 inputs and their documents; 0 before the first."""

    inputs: jax.Array  # [B, p - 1, M]
    segment_ids: jax.Array  # int32 [B, p - 1]


class Pooling(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        if not dims.causal and config.window % 2 == 0:
            raise ValueError(f'window {config.window} of a bidirectional model must be odd')
        if dims.causal and config.grid:
            raise ValueError(f'grid {config.grid} pools rows below and above: a causal model pools a sequence, grid=0')
        self.config, self.causal, self.width, self.dtype = config, dims.causal, dims.width, dims.dtype

    def init_state(self, batch, capacity, dtype=None):
        if not self.causal:
            return None
        past = (batch, self.config.window - 1)
        return State(inputs=jnp.zeros((*past, self.width), dtype or self.dtype), segment_ids=jnp.zeros(past, jnp.int32))

    def __call__(self, x, ctx: Context, state=None) -> Output:
        x = x.astype(self.dtype)
        ids, reach = ctx.segment_ids, self.config.window - 1
        if ids is None:  # the document of the last token goes on
            last = 1 if state is None or not reach else jnp.maximum(state.segment_ids[:, -1:], 1)
            ids = jnp.broadcast_to(last, x.shape[:2]).astype(jnp.int32)
        inputs, documents = x.astype(jnp.float32), ids
        if state is not None:
            inputs = jnp.concatenate([state.inputs.astype(jnp.float32), inputs], axis=1)
            documents = jnp.concatenate([state.segment_ids, ids], axis=1)
        back, ahead = (reach, 0) if self.causal else (reach // 2, reach // 2)
        total, count = 0.0, 0.0
        for value, inside in neighbours(inputs, documents, back, ahead, self.config.grid):
            total, count = total + value, count + inside
        length = x.shape[1]
        mean = (total / jnp.maximum(count, 1))[:, -length:]
        y = jnp.where((ids > 0)[:, :, None], mean - x.astype(jnp.float32), 0).astype(self.dtype)
        if state is not None:
            keep = inputs.shape[1] - reach
            state = State(inputs=inputs[:, keep:].astype(state.inputs.dtype), segment_ids=documents[:, keep:])
        return Output(y, state)


SPEC = Spec(
    module=Pooling,
    config=Config,
    paper='2111.11418',
    state='window',
    example=Config(window=3),
    flops=lambda config, dims, length: dims.width * config.window ** (2 if config.grid else 1),
)
