"""Transformer-XL's attention: sinusoids of the distance, projected, with global biases for content and for position.

Equation: s_ij = scale ((q_i + u) . k_j + (q_i + v) . W_r R_{i-j}), R_d the sines and cosines of d, u and v a vector a head;
    o_i = sum_j softmax_j(s_ij) v_j.
Paper: Transformer-XL: attentive language models beyond a fixed-length context, 2019, arXiv 1901.02860.
Differs: u and v are a layer's own. The memory of former segments is the state: keys and values of past tokens, without the
    stop of gradients, which training on whole rows does not need. Bidirectional layers use negative distances too.
Cost: train O(T²) time, masked pairs too, O(T) memory and some rows of pairs at a time (`weighted_attention`, XLA): products
    with the T distances of a row are picked from. Decode keeps 2 K H numbers a token.
"""

import dataclasses

import jax.numpy as jnp

from attnx import ops
from attnx.nn import Linear, attention, param, relative, softmax, split_heads
from attnx.ops.weighted_attention import products
from attnx.spec import Context, Dims, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    position: str = 'none'  # none: the code is the mechanism
    base: float = 10_000.0  # the sinusoids' frequencies run from 1 to about 1 / base

    def __post_init__(self):
        super().__post_init__()
        softmax.refuse(self, 'sinusoids of the distance are the position code', 'position', 'rope')
        softmax.refuse(self, 'there is no such logit in the denominator', 'sinks', 'off_by_one')
        if self.base <= 1:
            raise ValueError(f'base {self.base} must exceed 1')


class TransformerXLAttention(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        self.causal, self.width = dims.causal, dims.width + dims.width % 2
        wide = config.num_heads * self.head_dim
        self.far = Linear(self.width, wide, ('embed', 'heads'), dims, rngs=rngs)
        bias = lambda: param(jnp.zeros((config.num_heads, self.head_dim), dims.param_dtype), ('heads', 'head_dim'))
        self.content_bias, self.position_bias = bias(), bias()

    def attend(self, query, keys, ctx: Context):
        longest = max(keys.length, query.shape[1])
        first = 0 if self.causal else -longest
        steps = jnp.arange(first, longest + 1)
        code = ops.positions.sinusoidal(steps, self.width, base=self.config.base)
        table = split_heads(self.far(code), self.config.num_heads)  # [L, N, H], of distances i - j = first, first + 1, …
        scale = self.config.scale or self.head_dim**-0.5
        bias = lambda p: p[...].astype(query.dtype)

        def logits(query, key, i):
            where = -relative.distances(keys, i) - first
            content = products(query + bias(self.content_bias), key, scale)
            return content + scale * relative.lookup(query + bias(self.position_bias), table, where)

        options = {'weights': ops.normalizers.softmax, 'logits': logits}
        return self.core.attend(query, *keys.arrays, ctx, self.core.mask(keys), self.core.score(keys), **options)


SPEC = Spec(
    module=TransformerXLAttention,
    config=Config,
    paper='1901.02860',
    ops=('weighted_attention',),
    state='kv',
    example=Config(num_heads=4, num_kv_heads=2),
    flops=attention.flops_of_all_pairs,
)
