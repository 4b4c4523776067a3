"""Music Transformer's attention: a learned vector a head for every distance back, up to a longest one.

Equation: s_ij = scale (q_i . k_j + q_i . e_{i-j}), e of L vectors a head, 0 from distance L on;
    o_i = sum_j softmax_j(s_ij) v_j.
Paper: Music Transformer: generating music with long-term structure, 2018, arXiv 1809.04281.
Differs: products of a row with its L vectors are picked from, which is what skewing does. Local blocks are masks:
    masks=(('window', 512),).
Cost: train O(T²) time, masked pairs too, O(T) memory and some rows of pairs at a time, no [T, T, H] array
    (`weighted_attention`, XLA). Decode keeps 2 K H numbers a token.
"""

import dataclasses

from attnx import ops
from attnx.nn import attention, normal, param, relative, softmax
from attnx.ops.weighted_attention import products
from attnx.spec import Context, Dims, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    position: str = 'none'  # rope may be added: rope, none
    max_distance: int = 0  # L: farther keys have no position term; 0: the longest sequence of training
    shared: bool = False  # one table for all heads

    def __post_init__(self):
        super().__post_init__()
        softmax.refuse(self, 'there is no such logit in the denominator', 'sinks', 'off_by_one')
        if self.max_distance < 0:
            raise ValueError(f'max_distance {self.max_distance} is negative')


class MusicAttention(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        length = config.max_distance or dims.max_length
        heads, axes = ((), ()) if config.shared else ((config.num_heads,), ('heads',))
        value = normal(rngs, (length, *heads, self.head_dim), self.head_dim**-0.5, dims.param_dtype)
        self.table = param(value, (None, *axes, 'head_dim'))

    def attend(self, query, keys, ctx: Context):
        scale = self.config.scale or self.head_dim**-0.5

        def logits(query, key, i):
            far = relative.lookup(query, self.table[...], -relative.distances(keys, i))
            return products(query, key, scale) + scale * far

        options = {'weights': ops.normalizers.softmax, 'logits': logits}
        return self.core.attend(query, *keys.arrays, ctx, self.core.mask(keys), self.core.score(keys), **options)


SPEC = Spec(
    module=MusicAttention,
    config=Config,
    paper='1809.04281',
    ops=('weighted_attention',),
    state='kv',
    causal='causal',
    example=Config(num_heads=4, num_kv_heads=2, max_distance=9),
    flops=attention.flops_of_all_pairs,
)
