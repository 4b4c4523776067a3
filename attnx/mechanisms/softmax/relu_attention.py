"""ReLU attention: positive logits, divided by the number of keys, are the weights; nothing sums to one.

Equation: o_t = sum_s w_ts v_s, w_ts = n_t^-a relu(score(scale q_t . k_s)), n_t the number of keys that t sees.
Paper: Replacing softmax with ReLU in vision transformers, 2023, arXiv 2309.08586.
Differs: n is the number of visible keys of each row, where the paper has one length for all.
Cost: train O(T²) time, masked pairs too, O(T) memory: some rows at a time (`weighted_attention`, XLA; no fused kernel);
    decode keeps and reads 2 K H numbers a token.
"""

import dataclasses

from attnx import ops
from attnx.nn import attention, softmax
from attnx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    power: float = 1.0  # a: of the number of keys

    def __post_init__(self):
        super().__post_init__()
        softmax.refuse(self, 'ReLU weights have no denominator', 'sinks', 'off_by_one')
        if self.power < 0:
            raise ValueError(f'power {self.power} must not be negative')


class ReluAttention(attention.Attention):
    def attend(self, query, keys, ctx):
        mask, score, weights = self.core.mask(keys), self.core.score(keys), ops.normalizers.relu(self.config.power)
        return self.core.attend(query, *keys.arrays, ctx, mask, score, weights=weights)


SPEC = Spec(
    module=ReluAttention,
    config=Config,
    paper='2309.08586',
    ops=('weighted_attention',),
    state='kv',
    example=Config(num_heads=4, num_kv_heads=2),
    flops=attention.flops_of_all_pairs,
)
