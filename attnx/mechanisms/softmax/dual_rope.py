"""Temporal dual RoPE: tokens of a video carry two rotary positions, their own and their frame's, and text goes on after both.

Equation: m the position of a token, tau the number of units before it, a unit being a token of text or a whole frame;
    sum: s_ij = scale R(m_i + g tau_i) q_i . R(m_j + g tau_j) k_j;  mean: the mean of the scores at m and at tau;
    heads: some key/value heads, and the queries that read them, turn by tau, the others by m.
    Mask: j <= i, or i and j in one frame (`whole_frames`).
Paper: TC-LLaVA: rethinking the transfer from image to video understanding with temporal considerations, 2024,
    arXiv 2409.03206.
Differs: what could be read of the paper does not say how the two positions are joined: all three ways are ours, and a result
    must say which. Whole frames are off by default: their tokens then read later ones, as the paper wants it, which suits
    targets of text, and decoding needs a frame in one call. `frame` is a side input: its number from 1 on, 0 for text.
Cost: train O(T²) time, of twice the width in mode mean, O(T) memory, through the fused op; decode keeps 2 K H numbers a token
    (mean: 3 K H).
"""

import dataclasses

import jax.numpy as jnp

from attnx import ops
from attnx.nn import Recurrent, attention, merge_heads, positions, softmax
from attnx.nn.state import attend_to, running_sum
from attnx.spec import Context, Dims, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    mode: str = 'sum'  # how both positions act: sum, mean, heads
    gamma: float = 1.0  # of sum: weight of the unit's number; 0 is plain rotary positions
    temporal_heads: int = 0  # of heads: key/value heads that turn by the unit; 0: half of them
    whole_frames: bool = False  # tokens of a frame see all of it, later tokens too

    def __post_init__(self):
        super().__post_init__()
        softmax.check_choice('mode', self.mode, ('sum', 'mean', 'heads'))
        softmax.refuse(self, 'without rotary positions there are none to double: use gqa', 'position')
        if self.rope.grid:
            raise ValueError(f'rope.grid={self.rope.grid}: positions and frames are numbers on a line')
        if self.mode != 'sum':
            softmax.refuse(self, "gamma is of mode 'sum'", 'gamma')
        if self.mode != 'heads':
            softmax.refuse(self, "temporal_heads is of mode 'heads'", 'temporal_heads')
        kv_heads = self.num_kv_heads or self.num_heads
        if not 0 <= self.temporal_heads <= kv_heads or (self.mode == 'heads' and kv_heads < 2):
            raise ValueError(f'temporal_heads {self.temporal_heads}: at most the {kv_heads} key/value heads, of which mode '
                             "'heads' needs two")  # fmt: skip


class DualRopeAttention(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        self.turned = 2 if config.mode == 'mean' else 1  # copies of a key, each with its own position
        self.temporal = config.temporal_heads or self.num_kv_heads // 2

    def init_state(self, batch, capacity, dtype=None):
        dtype, k, h = dtype or self.dtype, self.num_kv_heads, self.head_dim
        shapes, dtypes = [(k, self.turned * h), (k, h)], [dtype, dtype]
        if self.config.whole_frames:
            shapes, dtypes = [*shapes, ()], [*dtypes, jnp.int32]
        units = Recurrent.init({'count': jnp.zeros((batch, 1), jnp.int32), 'frame': jnp.zeros((batch,), jnp.int32)})
        return self.core.init_state(batch, capacity, tuple(shapes), tuple(dtypes)), units

    def units(self, frame, ctx: Context, state):
        """The number of each token's unit in its document: frame int32 [B, T] -> (int32 [B, T], next state)."""
        before, ids = {'count': 0, 'frame': jnp.zeros_like(frame[:, 0])}, ctx.segment_ids
        if state is not None:
            before, ids = state.resume(ctx, *frame.shape)
        ids = jnp.ones_like(frame) if ids is None else ids
        last = jnp.concatenate([before['frame'][:, None], frame[:, :-1]], axis=1)
        fresh = jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0
        begins = (frame == 0) | (frame != last) | fresh
        count = running_sum(begins.astype(jnp.int32)[:, :, None], ids, before['count'])
        new = {'count': count[:, -1], 'frame': frame[:, -1]}
        return count[:, :, 0] - 1, None if state is None else state.advance(new, ids)

    def rotate(self, x, where, unit, kv_heads: int):
        """Heads [B, T, N, H] at both positions -> [B, T, N, H, or 2 H in mode mean]."""
        turn, mode = self.core.rotate, self.config.mode
        if mode == 'sum':
            return turn(x, where + self.config.gamma * unit)
        if mode == 'mean':
            return jnp.concatenate([turn(x, where), turn(x, unit)], axis=-1)
        first = self.temporal * (x.shape[2] // kv_heads)
        return jnp.concatenate([turn(x[:, :, :first], unit), turn(x[:, :, first:], where)], axis=2)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        cache, units = (None, None) if state is None else state
        query, key, value = self.project(x)
        if self.core.query_norm is not None:
            query, key = self.core.query_norm(query), self.core.key_norm(key)
        where, frame = positions(ctx, x.shape[1], 0 if cache is None else cache.index), ctx.side('frame')
        unit, units = self.units(frame, ctx, units)
        query, key = (self.rotate(a, where, unit, self.num_kv_heads) for a in (query, key))
        cache, keys = attend_to(cache, ctx, (key, value, *([frame] if self.config.whole_frames else [])))
        key, value, *frames = keys.arrays
        mask = self.core.mask(keys)
        if frames and self.core.causal:
            seen = ops.masks.causal(keys.query_slots, keys.key_slots) | ops.masks.segments(frame, frames[0])
            rest = self.core.mask(keys, causal=False)
            mask = seen if rest is None else seen & rest
        query, scale = query / self.turned, self.head_dim**-0.5
        out = self.core.attend(query, key, value, ctx, mask, self.core.score(keys), scale=scale)
        return Output(self.out(merge_heads(out)), None if state is None else (cache, units))


def _flops(config, dims, length):
    h = config.head_dim or dims.width // config.num_heads
    return softmax.flops(config.num_heads, (2 if config.mode == 'mean' else 1) * h, dims, length, value_dim=h)


SPEC = Spec(
    module=DualRopeAttention,
    config=Config,
    paper='2409.03206',
    ops=('softmax_attention',),
    state='kv',
    inputs={'frame': 'int32 B T'},
    example=Config(num_heads=4, num_kv_heads=2),
    variants={'temporal_heads': {'mode': 'heads', 'temporal_heads': 2}},
    flops=_flops,
)
