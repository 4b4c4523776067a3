"""Grouped-query softmax attention; one key/value head is multi-query attention.

Equation: o_t = sum_s softmax_s(scale q_t . k_s) v_s with N query heads reading K key/value heads, head h reads h // (N / K).
Paper: GQA: training generalized multi-query transformer models from multi-head checkpoints, 2023, arXiv 2305.13245;
    multi-query: Fast transformer decoding: one write-head is all you need, 2019, arXiv 1911.02150;
    fewer query heads than width / H: Sparse query attention (SQA), 2025, arXiv 2510.01817. With P = width / H, sSQA has
    N = K = P / 2, xSQA N = K = P / 4, xSMQA N = P / 4 and K = 1; SQA any K <= N < P.
Differs: positions, masks, scores, sinks and QK-norm are options that the papers do not have; their defaults are RoPE alone.
Cost: train O(T²) time, N H products a pair, O(T) memory; decode reads and keeps 2 K H numbers a token.
"""

import dataclasses

from attnx.nn import Linear, merge_heads, softmax, split_heads
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(softmax.Options):
    num_heads: int = 4  # N query heads
    num_kv_heads: int = 2  # K key/value heads; divides num_heads; 1 is multi-query attention
    head_dim: int = 0  # H; 0: width / num_heads; with a given one N is free of the width

    def __post_init__(self):
        super().__post_init__()
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f'num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}')


class GroupedQueryAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype = config, dims.dtype
        self.head_dim = softmax.heads_of(config.num_heads, config.head_dim, dims.width)
        wide, narrow = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.query = Linear(dims.width, wide, ('embed', 'heads'), dims, rngs=rngs)
        self.key = Linear(dims.width, narrow, ('embed', 'kv_heads'), dims, rngs=rngs)
        self.value = Linear(dims.width, narrow, ('embed', 'kv_heads'), dims, rngs=rngs)
        self.out = Linear(wide, dims.width, ('heads', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)
        self.core = softmax.Core(config, dims, config.num_heads, self.head_dim, rngs=rngs)

    def init_state(self, batch, capacity, dtype=None):
        shape = (self.config.num_kv_heads, self.head_dim)
        return self.core.init_state(batch, capacity, (shape, shape), dtype or self.dtype)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query = split_heads(self.query(x), self.config.num_heads)
        key = split_heads(self.key(x), self.config.num_kv_heads)
        value = split_heads(self.value(x), self.config.num_kv_heads)
        out, state = self.core(query, key, value, ctx, state)
        return Output(self.out(merge_heads(out)), state)


def _flops(config, dims, length):
    head_dim = config.head_dim or dims.width // config.num_heads
    return softmax.flops(config.num_heads, head_dim, dims, length)


SPEC = Spec(
    module=GroupedQueryAttention,
    config=Config,
    paper='2305.13245',
    ops=('softmax_attention',),
    state='kv',
    example=Config(num_heads=4, num_kv_heads=2),
    flops=_flops,
)
