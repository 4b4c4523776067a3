"""Grouped-query attention as a base: projections, cache and output; a mechanism says what happens between them."""

import dataclasses
from typing import Any

from attnx.nn import softmax
from attnx.nn.layers import Linear, merge_heads, split_heads
from attnx.nn.state import Keys
from attnx.spec import Context, Dims, Mixer, Output


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(softmax.Options):
    """Options of mechanisms on `Attention`; their Config inherits them."""

    num_heads: int = 4  # N query heads
    num_kv_heads: int = 0  # K key/value heads; divides num_heads; 0: as many as num_heads
    head_dim: int = 0  # H; 0: width / num_heads

    def __post_init__(self):
        super().__post_init__()
        softmax.check_groups(self.num_heads, self.num_kv_heads)


class Attention(Mixer):
    """y = W_o attend(W_q x, keys and values of x and the past); a mechanism overrides `attend`, or more."""

    config: Any  # Options, with what the mechanism adds to them

    def __init__(self, config: Options, dims: Dims, *, rngs):
        self.config, self.dtype, self.width = config, dims.dtype, dims.width
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = softmax.heads_of(config.num_heads, config.head_dim, dims.width)
        wide, narrow = config.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.query = Linear(dims.width, wide, ('embed', 'heads'), dims, rngs=rngs)
        self.key = Linear(dims.width, narrow, ('embed', 'kv_heads'), dims, rngs=rngs)
        self.value = Linear(dims.width, narrow, ('embed', 'kv_heads'), dims, rngs=rngs)
        self.out = Linear(wide, dims.width, ('heads', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)
        self.core = softmax.Core(config, dims, config.num_heads, self.head_dim, rngs=rngs)

    def init_state(self, batch, capacity, dtype=None):
        shape = (self.num_kv_heads, self.head_dim)
        return self.core.init_state(batch, capacity, (shape, shape), dtype or self.dtype)

    def project(self, x):
        """x [B, T, M] -> query [B, T, N, H], key and value [B, T, K, H]."""
        heads = (self.query, self.config.num_heads), (self.key, self.num_kv_heads), (self.value, self.num_kv_heads)
        return tuple(split_heads(f(x), n) for f, n in heads)

    def attend(self, query, keys: Keys, ctx: Context):
        """query [B, T, N, H], keys and values in `keys` -> [B, T, N, H]."""
        return self.core.attend(query, *keys.arrays, ctx, self.core.mask(keys), self.core.score(keys))

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query, key, value = self.project(x)
        query, keys, state = self.core.extend(query, key, (value,), ctx, state)
        return Output(self.out(merge_heads(self.attend(query, keys, ctx))), state)


def flops(config: Options, dims: Dims, length: int) -> float:
    """Of all pairs that a query sees."""
    return softmax.flops(config.num_heads, config.head_dim or dims.width // config.num_heads, dims, length)


def flops_of_all_pairs(config: Options, dims: Dims, length: int) -> float:
    """Of `ops.weighted_attention`, which computes masked pairs too."""
    return softmax.flops(config.num_heads, config.head_dim or dims.width // config.num_heads, dims, length) * (
        2 if dims.causal else 1
    )
