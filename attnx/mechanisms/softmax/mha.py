"""Multi-head softmax attention: every query head has its own key and value head.

Equation: o_t = sum_s softmax_s(H^-1/2 q_t . k_s) v_s per head;  y = W_o [o_1 … o_N].
Paper: Attention is all you need, 2017, arXiv 1706.03762.
Differs: positions enter as RoPE in every layer, where the paper adds sinusoids to the embeddings (`model.positions`);
    masks, scores, sinks and QK-norm are options, off by default.
Cost: train O(T²) time, O(T) memory, through the fused op; decode reads and keeps 2 N H numbers a token.
"""

import dataclasses

from attnx.nn import Linear, attention, merge_heads, softmax, split_heads
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(softmax.Options):
    num_heads: int = 4  # N
    head_dim: int = 0  # H; 0: width / num_heads
    bias: bool = False  # biases in the projections


class MultiHeadAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.num_heads, self.dtype = config.num_heads, dims.dtype
        self.head_dim = softmax.heads_of(config.num_heads, config.head_dim, dims.width)
        wide = config.num_heads * self.head_dim
        into = lambda: Linear(dims.width, wide, ('embed', 'heads'), dims, rngs=rngs, bias=config.bias)
        self.query, self.key, self.value = into(), into(), into()
        scale = (2 * dims.num_layers) ** -0.5
        self.out = Linear(wide, dims.width, ('heads', 'embed'), dims, rngs=rngs, bias=config.bias, scale=scale)
        self.core = softmax.Core(config, dims, config.num_heads, self.head_dim, rngs=rngs)

    def init_state(self, batch, capacity, dtype=None):
        shape = (self.num_heads, self.head_dim)
        return self.core.init_state(batch, capacity, (shape, shape), dtype or self.dtype)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query, key, value = (split_heads(f(x), self.num_heads) for f in (self.query, self.key, self.value))
        out, state = self.core(query, key, value, ctx, state)
        return Output(self.out(merge_heads(out)), state)


SPEC = Spec(
    module=MultiHeadAttention,
    config=Config,
    paper='1706.03762',
    ops=('softmax_attention',),
    state='kv',
    example=Config(num_heads=4),
    flops=attention.flops,
)
