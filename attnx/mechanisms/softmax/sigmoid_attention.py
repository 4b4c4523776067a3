"""Sigmoid attention: every pair is weighed by itself; a bias keeps a row's sum near one at the start.

Equation: o_t = sum_s sigmoid(score(scale q_t . k_s) - log n) v_s.
Paper: Theory, analysis, and best practices for sigmoid self-attention, 2024, arXiv 2409.04431.
Differs: n is the length of training, as in the paper's language models, or the number of keys that a row sees. What the
    paper recommends with it are options: `qk_norm`, `scores = (('alibi',),)`, position 'none'.
Cost: train O(T²) time, masked pairs too, O(T) memory: some rows at a time (`weighted_attention`, XLA; no fused kernel);
    decode keeps and reads 2 K H numbers a token.
"""

import dataclasses

from attnx import ops
from attnx.nn import attention, softmax
from attnx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    length: str = 'training'  # n: training (the model's max_length), or visible (keys that the row sees)

    def __post_init__(self):
        super().__post_init__()
        softmax.refuse(self, 'sigmoid weights have no denominator', 'sinks', 'off_by_one')
        softmax.check_choice('length', self.length, ('training', 'visible'))


class SigmoidAttention(attention.Attention):
    def __init__(self, config: Config, dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        self.length = dims.max_length if config.length == 'training' else 0

    def attend(self, query, keys, ctx):
        mask, score, weights = self.core.mask(keys), self.core.score(keys), ops.normalizers.sigmoid(self.length)
        return self.core.attend(query, *keys.arrays, ctx, mask, score, weights=weights)


SPEC = Spec(
    module=SigmoidAttention,
    config=Config,
    paper='2409.04431',
    ops=('weighted_attention',),
    state='kv',
    example=Config(num_heads=4, num_kv_heads=2),
    flops=attention.flops_of_all_pairs,
)
