"""Relative convolutional attention: queries, keys and values convolved over time, distances as learned vectors and biases.

Equation: q, k, v <- conv_3(W x) + bias, depthwise and causal, the same H kernels in all heads;  s_ij = scale ((q_i + u) . k_j +
    q_i . e_{j-i} + b_{j-i}), e, b, u a head's own;  o_i = sum_j softmax_j(s_ij) v_j.
Paper: RCMHA: relative convolutional multi-head attention for natural language modelling, 2023, arXiv 2308.03429.
Differs: convolutions begin as the identity and the tables at small random values; one bias of v instead of two, none of k,
    which the softmax cancels. Tables reach `max_distance` tokens back; farther pairs have no term.
Cost: train O(T²) time, masked pairs too, O(T) memory and some rows of pairs at a time (`weighted_attention`, XLA). Decode keeps
    2 K H numbers a token, and two inputs of each convolution.
"""

import dataclasses

import jax.numpy as jnp

from attnx import ops
from attnx.nn import Recurrent, attention, merge_heads, normal, param, relative, softmax
from attnx.ops.weighted_attention import products
from attnx.spec import Context, Dims, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    position: str = 'none'  # rope may be added: rope, none
    conv_taps: int = 3  # tokens of the convolutions
    max_distance: int = 0  # L: farther keys have no position term; 0: the longest sequence of training

    def __post_init__(self):
        super().__post_init__()
        softmax.refuse(self, 'there is no such logit in the denominator', 'sinks', 'off_by_one')
        if self.conv_taps < 2 or self.max_distance < 0:
            raise ValueError(f'conv_taps {self.conv_taps} must be at least 2, max_distance {self.max_distance} not negative')


class RelativeConvolutionalAttention(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        n, h, taps = config.num_heads, self.head_dim, config.conv_taps
        self.reach = config.max_distance or dims.max_length
        size = self.reach  # of distances j - i from -(L - 1) to 0
        self.far = param(normal(rngs, (size, n, h), 0.02, dims.param_dtype), (None, 'heads', 'head_dim'))
        self.far_bias = param(normal(rngs, (size, n, 1), 0.02, dims.param_dtype), (None, 'heads', None))
        self.content_bias = param(normal(rngs, (n, h), 0.02, dims.param_dtype), ('heads', 'head_dim'))
        identity = jnp.zeros((taps, h), dims.param_dtype).at[-1].set(1)
        for name in ('query', 'key', 'value'):
            setattr(self, f'{name}_conv', param(identity, ('conv', 'head_dim')))
        bias = lambda: param(jnp.zeros((h,), dims.param_dtype), ('head_dim',))
        self.query_bias, self.key_bias, self.value_bias = bias(), None, bias()

    def init_state(self, batch, capacity, dtype=None):
        counts = self.config.num_heads, self.num_kv_heads, self.num_kv_heads
        window = lambda n: jnp.zeros((batch, self.config.conv_taps - 1, n * self.head_dim), dtype or self.dtype)
        return super().init_state(batch, capacity, dtype), Recurrent.init(tuple(map(window, counts)))

    def __call__(self, x, ctx: Context, state=None) -> Output:
        cache, before = (None, None) if state is None else state
        past, ids = ((None,) * 3, ctx.segment_ids) if state is None else before.resume(ctx, *x.shape[:2])
        parts, windows = [], []
        for name, heads, window in zip(('query', 'key', 'value'), self.project(x), past):
            kernel = jnp.tile(getattr(self, f'{name}_conv')[...].astype(x.dtype), (1, heads.shape[2]))
            y, last = ops.short_conv(merge_heads(heads), kernel, initial_state=window, segment_ids=ids, impl=ctx.impl)
            bias = getattr(self, f'{name}_bias')
            parts.append(y.reshape(heads.shape) + (0 if bias is None else bias[...].astype(y.dtype)))
            windows.append(last)
        query, key, value = parts
        query, keys, cache = self.core.extend(query, key, (value,), ctx, cache)
        y = self.out(merge_heads(self.attend(query, keys, ctx)))
        return Output(y, None if state is None else (cache, before.advance(tuple(windows), ids)))

    def attend(self, query, keys, ctx: Context):
        scale = self.config.scale or self.head_dim**-0.5

        def logits(query, key, i):
            where = relative.distances(keys, i) + self.reach - 1
            content = products(query + self.content_bias[...].astype(query.dtype), key, scale)
            far = relative.lookup(query, self.far[...], where)
            return content + scale * (far + relative.lookup(jnp.ones_like(query[..., :1]), self.far_bias[...], where))

        options = {'weights': ops.normalizers.softmax, 'logits': logits}
        return self.core.attend(query, *keys.arrays, ctx, self.core.mask(keys), self.core.score(keys), **options)


SPEC = Spec(
    module=RelativeConvolutionalAttention,
    config=Config,
    paper='2308.03429',
    ops=('weighted_attention', 'short_conv'),
    state='kv',
    causal='causal',
    example=Config(num_heads=4, num_kv_heads=2, max_distance=9),
    flops=attention.flops_of_all_pairs,
)
