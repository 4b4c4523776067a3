"""Differential attention: the difference of two softmax maps, which cancels what both give to irrelevant tokens.

Equation: o_t = RMSNorm(sum_s (A1_ts - lambda A2_ts) v_s) (1 - lambda_init), Ai = softmax(H^-1/2 qi . ki), v 2H wide;
    lambda = exp(a1 . b1) - exp(a2 . b2) + lambda_init, lambda_init = 0.8 - 0.6 exp(-0.3 l) in layer l = 0, 1, …
Paper: Differential transformer, 2024, arXiv 2410.05258.
Differs: query heads of both maps that share a value head share each map's own key head, where the released code (with
    fewer key/value heads than query heads) lets the two maps of a head read one key head.
Cost: train O(T²) time, O(T) memory, through the fused op, the scores of 2 N heads of width H; decode reads and keeps 4 K H
    numbers a token.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx.nn import Linear, RMSNorm, merge_heads, normal, param, softmax, split_heads
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(softmax.Options):
    num_heads: int = 2  # N heads, each with two maps: half as many as multi-head attention has at equal parameters
    num_kv_heads: int = 0  # K key/value heads; divides num_heads; 0: as many as num_heads
    head_dim: int = 0  # H of one map, values have 2 H; 0: width / (2 num_heads)

    def __post_init__(self):
        super().__post_init__()
        softmax.check_groups(self.num_heads, self.num_kv_heads)


def lambda_init(layer):
    """0.8 - 0.6 exp(-0.3 layer): from 0.2 in the first layer towards 0.8; `layer` may be traced."""
    return 0.8 - 0.6 * jnp.exp(-0.3 * jnp.asarray(layer, jnp.float32))


class DifferentialAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.num_heads, self.dtype = config.num_heads, dims.dtype
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = h = softmax.heads_of(2 * config.num_heads, config.head_dim, dims.width)
        wide, narrow = 2 * config.num_heads * h, 2 * self.num_kv_heads * h
        self.query = Linear(dims.width, wide, ('embed', 'heads'), dims, rngs=rngs)
        self.key = Linear(dims.width, narrow, ('embed', 'kv_heads'), dims, rngs=rngs)
        self.value = Linear(dims.width, narrow, ('embed', 'kv_heads'), dims, rngs=rngs)
        self.first, self.second = (param(normal(rngs, (2, h), 0.1), (None, 'head_dim')) for _ in range(2))
        self.norm = RMSNorm(2 * h, dims, rngs=rngs, eps=1e-5, axis='head_dim')
        self.out = Linear(wide, dims.width, ('heads', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)
        self.core = softmax.Core(config, dims, config.num_heads, h, rngs=rngs)

    def init_state(self, batch, capacity, dtype=None):
        key, value = (2 * self.num_kv_heads, self.head_dim), (self.num_kv_heads, 2 * self.head_dim)
        return self.core.init_state(batch, capacity, (key, value), dtype or self.dtype)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query = split_heads(self.query(x), 2 * self.num_heads)  # the heads of the first map, then of the second
        key = split_heads(self.key(x), 2 * self.num_kv_heads)
        value = split_heads(self.value(x), self.num_kv_heads)
        query, keys, state = self.core.extend(query, key, (value,), ctx, state)
        key, value = keys.arrays
        mask, score = self.core.mask(keys), self.core.score(keys)
        maps = []
        for number, (q, k) in enumerate(zip(jnp.split(query, 2, axis=2), jnp.split(key, 2, axis=2))):
            drop = None if ctx.key is None else jax.random.fold_in(ctx.key, number)
            maps.append(self.core.attend(q, k, value, dataclasses.replace(ctx, key=drop), mask, score))
        start = lambda_init(ctx.layer)
        one, two = (jnp.exp(jnp.sum(p[...][0] * p[...][1])) for p in (self.first, self.second))
        out = maps[0].astype(jnp.float32) - (one - two + start) * maps[1].astype(jnp.float32)
        out = self.norm(out) * (1 - start)
        return Output(self.out(merge_heads(out)), state)


def _flops(config, dims, length):
    head_dim = config.head_dim or dims.width // (2 * config.num_heads)
    return softmax.flops(2 * config.num_heads, head_dim, dims, length, value_dim=2 * head_dim)


SPEC = Spec(
    module=DifferentialAttention,
    config=Config,
    paper='2410.05258',
    ops=('softmax_attention',),
    state='kv',
    example=Config(num_heads=2, num_kv_heads=1),
    flops=_flops,
)
