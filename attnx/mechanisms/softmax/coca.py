"""Collinear constrained attention: a key lies along its query in every rotary plane, so that distance alone turns it away.

Equation: t = W_t x, tau = relu((t_1 + t_2) / 2) of its halves;
    s_ij = scale sum_n tau_jn (q_in² + q_{i,n+H/2}²) cos((i - j) w_n);
    o_i = sum_j softmax_j(s_ij) v_j, with w_n the frequencies of rotary positions.
Paper: Cure the headache of transformers via collinear constrained attention (or: CoCA: fusing position embedding with
    collinear constrained attention for fine-tuning free context window extending), 2023, arXiv 2309.08646.
Differs: the released code mixes rotated and unrotated queries and does not equal this formula, the paper's. It is computed
    as an ordinary product: [r cos i w ; r sin i w] . [tau cos j w ; tau sin j w] with r the squared radii.
Cost: train O(T²) time, O(T) memory, through the fused op; decode keeps 2 K H numbers a token.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx import ops
from attnx.nn import attention, merge_heads, positions, softmax
from attnx.nn.state import attend_to
from attnx.spec import Context, Dims, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    def __post_init__(self):
        super().__post_init__()
        softmax.refuse(self, 'CoCA is a rotary code; its base is rope.base', 'position')
        softmax.refuse(self, 'a squared query has no direction to normalise', 'qk_norm')
        if self.rope.fraction != 1 or self.rope.grid or self.rope.scaling != 'none':
            raise ValueError('rope: CoCA turns the whole width on a line without scaling; base is free')


class CollinearAttention(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        if self.head_dim % 2:
            raise ValueError(f'head_dim {self.head_dim} must be even: CoCA works in planes')

    def turned(self, radii, where):
        """radii [B, T, N, H / 2] at angles of `where`: [B, T, N, H]."""
        flat = jnp.concatenate([radii, jnp.zeros_like(radii)], axis=-1)
        return ops.positions.rope(flat, where, base=self.config.rope.base)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query, key, value = self.project(x)
        half = self.head_dim // 2
        squares = jnp.square(query.astype(jnp.float32))
        radii = (squares[..., :half] + squares[..., half:]).astype(query.dtype)
        lengths = jax.nn.relu((key[..., :half] + key[..., half:]) / 2)
        where = positions(ctx, x.shape[1], 0 if state is None else state.index)
        state, keys = attend_to(state, ctx, (self.turned(lengths, where), value))
        return Output(self.out(merge_heads(self.attend(self.turned(radii, where), keys, ctx))), state)


SPEC = Spec(
    module=CollinearAttention,
    config=Config,
    paper='2309.08646',
    ops=('softmax_attention',),
    state='kv',
    example=Config(num_heads=4, num_kv_heads=2),
    flops=attention.flops,
)
