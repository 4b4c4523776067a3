"""Softplus attention whose logits grow with the number of keys, re-weighted by a power (LSSA, LSSAR): for long contexts.

Equation: a_ts = softplus(log(H) log(n_t) cos(q_t, k_s)) / sum_r, n_t the number of keys that t sees;
    LSSAR: w_ts = relu(n_t a_ts - 1)^p / sum_r;  o_t = sum_s w_ts v_s.
Paper: Softplus attention with re-weighting boosts length extrapolation in large language models, 2025, arXiv 2501.13428.
Differs: built from descriptions and re-implementations, as no code is released. Rows that see at most three keys subtract
    no 1, as there; a row of equal weights, of which nothing exceeds the mean, keeps them. Score options see the logits
    before they grow with n.
Cost: train O(T²) time, masked pairs too, O(T) memory: some rows at a time (`weighted_attention`, XLA; no fused kernel);
    decode keeps and reads 2 K H numbers a token.
"""

import dataclasses
import math

from attnx import ops
from attnx.nn import attention, l2_normalize, softmax
from attnx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    power: float = 3.0  # p: 3 is best at the length of training, 15 beyond it; 0: none, which is LSSA

    def __post_init__(self):
        super().__post_init__()
        softmax.refuse(self, 'softplus weights have no such logit in their denominator', 'sinks', 'off_by_one')
        softmax.refuse(self, 'queries and keys are normalised to length 1 already', 'qk_norm')
        if self.power and self.power < 1:
            raise ValueError(f'power {self.power} must be 0 or at least 1')


class SoftplusAttention(attention.Attention):
    def project(self, x):
        query, key, value = super().project(x)
        return l2_normalize(query), l2_normalize(key), value

    def attend(self, query, keys, ctx):
        mask, score, weights = self.core.mask(keys), self.core.score(keys), ops.normalizers.softplus(self.config.power)
        scale = math.log(self.head_dim)
        return self.core.attend(query, *keys.arrays, ctx, mask, score, scale=scale, weights=weights)


SPEC = Spec(
    module=SoftplusAttention,
    config=Config,
    paper='2501.13428',
    ops=('weighted_attention',),
    state='kv',
    example=Config(num_heads=4, num_kv_heads=2),
    flops=attention.flops_of_all_pairs,
)
