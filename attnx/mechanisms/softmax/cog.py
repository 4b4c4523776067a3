"""Cog attention: signed weights, so that a token may subtract what another holds.

Equation: o_t = sum_s w_ts v_s, w_ts = sign(p_ts) exp|p_ts| / sum_r exp|p_tr|, p_ts = score(scale q_t . k_s) per head.
Paper: More expressive attention with negative weights, 2024, arXiv 2411.07176.
Differs: query heads may share key/value heads. The paper keeps softmax in the first and last layer: say so in the model,
    `overrides = {0: 'gqa', 5: 'gqa'}`.
Cost: train O(T²) time, masked pairs too, O(T) memory: some rows at a time (`weighted_attention`, XLA; no fused kernel);
    decode keeps and reads 2 K H numbers a token.
"""

import dataclasses

from attnx import ops
from attnx.nn import attention, softmax
from attnx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    def __post_init__(self):
        super().__post_init__()
        softmax.refuse(self, 'the signed weights have no such logit in their denominator', 'sinks', 'off_by_one')


class CogAttention(attention.Attention):
    def attend(self, query, keys, ctx):
        mask, score = self.core.mask(keys), self.core.score(keys)
        return self.core.attend(query, *keys.arrays, ctx, mask, score, weights=ops.normalizers.signed)


SPEC = Spec(
    module=CogAttention,
    config=Config,
    paper='2411.07176',
    ops=('weighted_attention',),
    state='kv',
    example=Config(num_heads=4, num_kv_heads=2),
    flops=attention.flops_of_all_pairs,
)
