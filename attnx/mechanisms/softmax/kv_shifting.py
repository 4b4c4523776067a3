"""KV shifting attention: keys and values are learned mixes of those of a token and of the one before it.

Equation: k_t <- a1 k_t + a2 k_{t-1}, v_t <- b1 v_t + b2 v_{t-1}, four numbers a key/value head, 0 before a document;
    then grouped-query attention: o_t = sum_s softmax_s(scale q_t . k_s) v_s.
Paper: KV shifting attention enhances language modeling, 2024, arXiv 2411.19574.
Differs: keys are shifted, then normed and rotated at the position of the later token. At the start a1 and b1 are
    uniform in [0, 1], a2 = 1 - a1, b2 = 1 - b1; the numbers are free afterwards.
Cost: train O(T²) time, O(T) memory, through the fused op; decode keeps 2 K H numbers a token, and the last key and value.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx import ops
from attnx.nn import Recurrent, attention, merge_heads, param
from attnx.spec import Context, Dims, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    """Nothing but the options of every softmax mechanism: the shift goes with any of them."""


class KVShiftingAttention(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)

        def mix():  # weights of the token before and of the token itself, [2, K]
            own = jax.random.uniform(rngs.params(), (self.num_kv_heads,), dims.param_dtype)
            return param(jnp.stack([1 - own, own]), ('conv', 'kv_heads'))

        self.key_mix, self.value_mix = mix(), mix()

    def init_state(self, batch, capacity, dtype=None):
        before = jnp.zeros((batch, 1, self.num_kv_heads * self.head_dim), dtype or self.dtype)
        return super().init_state(batch, capacity, dtype), Recurrent.init((before, before))

    def __call__(self, x, ctx: Context, state=None) -> Output:
        cache, before = (None, None) if state is None else state
        past, ids = ((None, None), ctx.segment_ids) if state is None else before.resume(ctx, *x.shape[:2])
        query, *pair = self.project(x)
        pair = [self.shift(a, mix, p, ids, ctx) for a, mix, p in zip(pair, (self.key_mix, self.value_mix), past)]
        (key, value), past = zip(*pair)
        query, keys, cache = self.core.extend(query, key, (value,), ctx, cache)
        y = self.out(merge_heads(self.attend(query, keys, ctx)))
        return Output(y, None if state is None else (cache, before.advance(past, ids)))

    def shift(self, x, mix, past, ids, ctx):
        """x [B, T, K, H] -> (mixed with the token before, last token of x)."""
        taps = jnp.repeat(mix[...].astype(x.dtype), self.head_dim, axis=1)
        y, last = ops.short_conv(merge_heads(x), taps, initial_state=past, segment_ids=ids, impl=ctx.impl)
        return y.reshape(x.shape), last


SPEC = Spec(
    module=KVShiftingAttention,
    config=Config,
    paper='2411.19574',
    ops=('softmax_attention', 'short_conv'),
    state='kv',
    example=Config(num_heads=4, num_kv_heads=2),
    flops=attention.flops,
)
