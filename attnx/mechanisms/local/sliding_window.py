"""Sliding-window softmax attention: each token reads the last `window` tokens, itself included.

Equation: o_t = sum_{t - w < s <= t} softmax_s(scale q_t . k_s) v_s; a bidirectional model reads |t - s| < w.
Paper: Longformer: the long-document transformer, 2020, arXiv 2004.05150; as in Mistral 7B, 2023, arXiv 2310.06825.
Differs: no global tokens, one set of projections, one window for all heads; key/value heads may be shared.
Cost: train O(T w) time, empty tiles being skipped, O(T) memory; decode keeps and reads 2 K H numbers for each of the
    last w tokens, in a ring.
"""

import dataclasses

from attnx import ops
from attnx.nn import Linear, merge_heads, softmax, split_heads
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(softmax.Options):
    num_heads: int = 4  # N query heads
    num_kv_heads: int = 0  # K key/value heads; divides num_heads; 0: as many as num_heads
    head_dim: int = 0  # H; 0: width / num_heads
    window: int = 1024  # w: tokens looking back, self included; as many ahead in a bidirectional model

    def __post_init__(self):
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f'window {self.window} must be at least 1, the token itself')
        if self.num_kv_heads < 0 or self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(f'num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}')
        for name, *_ in self.masks:
            if name in softmax.ABSOLUTE:
                raise ValueError(f'masks: {name!r} needs positions in the document, which a window forgets')


class SlidingWindowAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype = config, dims.dtype
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
        return self.core.init_state(batch, capacity, (shape, shape), dtype or self.dtype, window=self.config.window)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query = split_heads(self.query(x), self.config.num_heads)
        key, value = (split_heads(f(x), self.num_kv_heads) for f in (self.key, self.value))
        query, keys, state = self.core.extend(query, key, (value,), ctx, state)
        near = ops.masks.window(self.config.window, keys.query_slots, keys.key_slots)
        mask, score = self.core.mask(keys), self.core.score(keys)
        key, value = keys.arrays
        out = self.core.attend(query, key, value, ctx, near if mask is None else mask & near, score)
        return Output(self.out(merge_heads(out)), state)


SPEC = Spec(
    module=SlidingWindowAttention,
    config=Config,
    paper='2004.05150',
    ops=('softmax_attention',),
    state='window',
    example=Config(num_heads=4, num_kv_heads=2, window=6),
    flops=lambda config, dims, length: softmax.flops(
        config.num_heads,
        config.head_dim or dims.width // config.num_heads,
        dims,
        # softmax.flops halves the keys of a causal model; every token here has its whole window.
        min(length, 2 * config.window),
    ),
)
