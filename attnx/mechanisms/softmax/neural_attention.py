"""Neural attention: a small network scores every pair of query and key, in place of their product.

Equation: o_t = sum_s softmax_s(f([q'_t ; k'_s])) v_s per head, q' = W_a q + b_a, k' = W_b k + b_b of width d;
    f = a linear map 2d -> d, ReLU, d -> d/2, ReLU, d/2 -> 1, the same in all heads.
Paper: Neural attention: a novel mechanism for enhanced expressive power in transformer models, 2025, arXiv 2502.17206.
Differs: the last bias, which the softmax cancels, is left out. The first map is split, W_1 [q' ; k'] = W_q q' + W_k k', so
    that a pair is a sum. No position code by default; rope turns q and k before they are narrowed.
Cost: train O(T² d²) time a head, masked pairs too; memory of d numbers for each pair of some rows at a time, forward and
    backward (`weighted_attention`, XLA; no fused kernel); decode keeps K (d + H) numbers a token.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx import ops
from attnx.nn import Linear, attention, merge_heads, normal, param, positions, softmax
from attnx.nn.state import attend_to
from attnx.spec import Context, Dims, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    position: str = 'none'  # rope, none
    pair_width: int = 0  # d: width of narrowed queries and keys, even; 0: a 32nd of the head width, at least 2

    def __post_init__(self):
        super().__post_init__()
        softmax.refuse(self, 'neural attention has no such logit in its denominator', 'sinks', 'off_by_one')
        softmax.refuse(self, 'a network makes the logits: there is no product to scale', 'scale')
        if self.pair_width < 0 or self.pair_width % 2:
            raise ValueError(f'pair_width {self.pair_width} must be even and not negative')


class NeuralAttention(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        self.pair = d = config.pair_width or max(2, self.head_dim // 32 // 2 * 2)
        into = ('head_dim', None)
        self.narrow_query = Linear(self.head_dim, d, into, dims, rngs=rngs, bias=True)
        self.narrow_key = Linear(self.head_dim, d, into, dims, rngs=rngs, bias=True)
        matrix = lambda rows, columns: param(normal(rngs, (rows, columns), (2 / rows) ** 0.5, dims.param_dtype), (None, None))
        bias = lambda width: param(jnp.zeros((width,), dims.param_dtype), (None,))
        self.first, self.first_bias = matrix(2 * d, d), bias(d)
        self.second, self.second_bias = matrix(d, d // 2), bias(d // 2)
        self.last = matrix(d // 2, 1)

    def init_state(self, batch, capacity, dtype=None):
        shapes = (self.num_kv_heads, self.pair), (self.num_kv_heads, self.head_dim)
        return self.core.init_state(batch, capacity, shapes, dtype or self.dtype)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query, key, value = self.project(x)
        where = positions(ctx, x.shape[1], 0 if state is None else state.index)
        query, keys, _ = self.core.extend(query, key, (value,), dataclasses.replace(ctx, positions=where))
        first = self.first[...].astype(query.dtype)
        query = self.narrow_query(query) @ first[: self.pair]
        key = self.narrow_key(keys.arrays[0]) @ first[self.pair :]
        state, keys = attend_to(state, ctx, (key, value))
        options = {'weights': ops.normalizers.softmax, 'logits': self.score_pairs, 'pair_width': self.pair}
        out = self.core.attend(query, *keys.arrays, ctx, self.core.mask(keys), self.core.score(keys), **options)
        return Output(self.out(merge_heads(out)), state)

    def score_pairs(self, query, key, i):
        """W_q q' [B, t, N, d] and W_k k' [B, S, K, d] -> logits [B, N, t, S]."""
        key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2).astype(query.dtype)
        hidden = jnp.moveaxis(query, 1, 2)[:, :, :, None] + jnp.moveaxis(key, 1, 2)[:, :, None]
        hidden = jax.nn.relu(hidden + self.first_bias[...].astype(hidden.dtype))
        cast = lambda p: p[...].astype(hidden.dtype)
        hidden = jax.nn.relu(hidden @ cast(self.second) + cast(self.second_bias))
        return (hidden @ cast(self.last))[..., 0].astype(jnp.float32)


def _flops(config, dims, length):
    h = config.head_dim or dims.width // config.num_heads
    d = config.pair_width or max(2, h // 32 // 2 * 2)
    return length * config.num_heads * (d * d + 4 * d + 2 * h)


SPEC = Spec(
    module=NeuralAttention,
    config=Config,
    paper='2502.17206',
    ops=('weighted_attention',),
    state='kv',
    example=Config(num_heads=4, num_kv_heads=2, pair_width=4),
    flops=_flops,
)
