"""Sliding-window softmax attention: each token reads the last `window` tokens, itself included.

Equation: o_t = sum_{t - w < s <= t} softmax_s(scale q_t . k_s) v_s; a bidirectional model reads |t - s| < w.
Paper: Longformer: the long-document transformer, 2020, arXiv 2004.05150; as in Mistral 7B, 2023, arXiv 2310.06825.
Differs: no global tokens, one set of projections, one window for all heads; key/value heads may be shared.
Cost: train O(T w) time through the fused op, empty tiles being skipped, O(T) memory; decode keeps and reads 2 K H numbers
    for each of the last w tokens, in a ring.
"""

import dataclasses

from attnx import ops
from attnx.nn import attention, softmax
from attnx.spec import Context, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    window: int = 1024  # w: tokens looking back, self included; as many ahead in a bidirectional model

    def __post_init__(self):
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f'window {self.window} must be at least 1, the token itself')
        for name, *_ in self.masks:
            if name in softmax.ABSOLUTE:
                raise ValueError(f'masks: {name!r} needs positions in the document, which a window forgets')


class SlidingWindowAttention(attention.Attention):
    def init_state(self, batch, capacity, dtype=None):
        shape = (self.num_kv_heads, self.head_dim)
        return self.core.init_state(batch, capacity, (shape, shape), dtype or self.dtype, window=self.config.window)

    def attend(self, query, keys, ctx: Context):
        near = ops.masks.window(self.config.window, keys.query_slots, keys.key_slots)
        mask = self.core.mask(keys)
        return self.core.attend(query, *keys.arrays, ctx, near if mask is None else mask & near, self.core.score(keys))


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
