"""Equal distance to visual tokens: rotary positions between tokens of text, none towards tokens of an image or video.

Equation: s_ij = scale q_i . k_j if token j is visual, else scale R_i q_i . R_j k_j;  o_i = sum_j softmax_j(s_ij) v_j.
Paper: Vista-LLaMA: reliable video narrator via equal distance to visual tokens, 2023, arXiv 2312.08870.
Differs: computed as one product of width 2 H, [R q ; q] . [text R k ; visual k], so that every fused kernel serves; the
    released code keeps three tensors. `visual` is a side input, bool [B, T].
Cost: train O(T²) time with products of twice the width, O(T) memory, through the fused op; decode keeps 3 K H numbers a token.
"""

import dataclasses

import jax.numpy as jnp

from attnx.nn import attention, merge_heads, positions, softmax
from attnx.nn.state import attend_to
from attnx.spec import Context, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    def __post_init__(self):
        super().__post_init__()
        softmax.refuse(self, 'without rotary positions all tokens are equally distant: use gqa', 'position')


class EqualDistanceAttention(attention.Attention):
    def init_state(self, batch, capacity, dtype=None):
        shapes = (self.num_kv_heads, 2 * self.head_dim), (self.num_kv_heads, self.head_dim)
        return self.core.init_state(batch, capacity, shapes, dtype or self.dtype)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query, key, value = self.project(x)
        if self.core.query_norm is not None:
            query, key = self.core.query_norm(query), self.core.key_norm(key)
        where = positions(ctx, x.shape[1], 0 if state is None else state.index)
        visual = ctx.side('visual')[:, :, None, None].astype(key.dtype)
        both = jnp.concatenate([self.core.rotate(key, where) * (1 - visual), key * visual], axis=-1)
        state, keys = attend_to(state, ctx, (both, value))
        query = jnp.concatenate([self.core.rotate(query, where), query], axis=-1)
        mask, score = self.core.mask(keys), self.core.score(keys)
        out = self.core.attend(query, *keys.arrays, ctx, mask, score, scale=self.head_dim**-0.5)
        return Output(self.out(merge_heads(out)), state)


def _flops(config, dims, length):
    h = config.head_dim or dims.width // config.num_heads
    return softmax.flops(config.num_heads, 2 * h, dims, length, value_dim=h)


SPEC = Spec(
    module=EqualDistanceAttention,
    config=Config,
    paper='2312.08870',
    ops=('softmax_attention',),
    state='kv',
    inputs={'visual': 'bool B T'},
    example=Config(num_heads=4, num_kv_heads=2),
    flops=_flops,
)
