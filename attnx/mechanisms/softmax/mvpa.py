"""Multi-variate parallel attention: scores of content, of the time between two tokens, and of the channels between them.

Equation: token i is channel c_i at time t_i;  s_ij = scale ((q_i + u) . k_j [|t_i - t_j| <= window]
    + (q_i + v) . W_t R(t_i - t_j) + (q_i + z) . W_c E(|c_i - c_j|)),  o_i = sum_j softmax_j(s_ij) v_j;
    R the sines and cosines of the time, E a learned vector for each distance of channels; u, v, z, W_t, W_c a key head's own.
    Content beyond the window counts 0; the key is still seen.
Paper: A foundation model with multi-variate parallel attention to generate neuronal activity (MVPA), 2025, arXiv 2506.20354.
Differs: channels and times are side inputs of a sequence of tokens, so that their number may change from row to row. In the
    paper all channels of a time see each other: `whole_steps`, off by default, as their tokens then read later ones, which
    suits targets of the next time alone; decoding then needs a time in one call. It also drops the window for the last time
    of a sequence, by which a prompt would differ from its steps: left out. Channels beyond `num_channels` apart share a vector.
Cost: train O(T²) time, masked pairs too, with products as wide as the head, the sinusoids and the table, O(T) memory and some
    rows of pairs at a time (`weighted_attention`, XLA). Decode keeps 2 K H + 2 numbers a token.
"""

import dataclasses

import jax.numpy as jnp

from attnx import ops
from attnx.nn import Linear, attention, merge_heads, normal, param, relative, softmax, split_heads
from attnx.nn.state import attend_to
from attnx.ops.weighted_attention import products
from attnx.spec import Context, Dims, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    position: str = 'none'  # none: the code is the mechanism
    window: int = 10  # times between tokens up to which contents are compared
    num_channels: int = 64  # distances of channels told apart: 0 to num_channels - 1
    time_width: int = 0  # sines and cosines of a time, even; 0: as many as the width
    base: float = 10_000.0  # their frequencies run from 1 to about 1 / base
    whole_steps: bool = False  # tokens of one time see all of it, later tokens too

    def __post_init__(self):
        super().__post_init__()
        softmax.refuse(self, 'times and channels are the position code', 'position', 'rope')
        softmax.refuse(self, 'there is no such logit in the denominator', 'sinks', 'off_by_one')
        if min(self.window, self.time_width) < 0 or self.num_channels < 1 or self.base <= 1 or self.time_width % 2:
            raise ValueError(
                f'window {self.window} and time_width {self.time_width} (even) must not be negative, '
                f'num_channels {self.num_channels} at least 1, base {self.base} more than 1'
            )


class MultiVariateAttention(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        k, h, self.time_width = self.num_kv_heads, self.head_dim, config.time_width or dims.width + dims.width % 2
        self.time = Linear(self.time_width, k * h, (None, 'kv_heads'), dims, rngs=rngs)
        self.channels = param(normal(rngs, (config.num_channels, dims.width), 1.0, dims.param_dtype), (None, 'embed'))
        self.channel = Linear(dims.width, k * h, ('embed', 'kv_heads'), dims, rngs=rngs)
        bias = lambda: param(normal(rngs, (k, h), 0.02, dims.param_dtype), ('kv_heads', 'head_dim'))
        self.content_bias, self.time_bias, self.channel_bias = bias(), bias(), bias()

    def init_state(self, batch, capacity, dtype=None):
        shape, dtype = (self.num_kv_heads, self.head_dim), dtype or self.dtype
        return self.core.init_state(batch, capacity, (shape, shape, (), ()), (dtype, dtype, jnp.int32, jnp.int32))

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query, key, value = self.project(x)
        if self.core.query_norm is not None:
            query, key = self.core.query_norm(query), self.core.key_norm(key)
        time, channel = ctx.side('time'), ctx.side('channel')
        state, keys = attend_to(state, ctx, (key, value, time, channel))
        key, value, times, channels = keys.arrays
        mask = self.core.mask(keys)
        if self.config.whole_steps and self.core.causal:
            seen = ops.masks.causal(keys.query_slots, keys.key_slots) | ops.masks.segments(time + 1, times + 1)
            rest = self.core.mask(keys, causal=False)
            mask = seen if rest is None else seen & rest
        scale, dtype = self.config.scale or self.head_dim**-0.5, query.dtype
        group = self.config.num_heads // self.num_kv_heads
        wide = lambda p: jnp.repeat(p[...].astype(dtype), group, axis=-2)  # of key heads -> of query heads
        between = split_heads(self.channel(self.channels[...].astype(dtype)), self.num_kv_heads)

        def logits(rows, keys, i):
            (query, turned, time, channel), (key, code, times, channels) = rows, keys
            far = jnp.abs(time[:, None, :, None] - times[:, None, None])
            s = jnp.where(far <= self.config.window, products(query + wide(self.content_bias), key, scale), 0)
            s = s + products(turned, code[:, :, None], scale)
            where = jnp.minimum(jnp.abs(channel[:, None, :, None] - channels[:, None, None]), self.config.num_channels - 1)
            return s + scale * relative.lookup(query + wide(self.channel_bias), wide(between), where)

        rows = query, self.turn(query + wide(self.time_bias), time), time, channel
        out = ops.weighted_attention(
            rows, (key.astype(dtype), self.code(times), times, channels), value.astype(dtype),
            weights=ops.normalizers.softmax, logits=logits, mask=mask, score=self.core.score(keys), pair_width=3,
            dropout=self.core.dropout(ctx), impl=ctx.impl,
        )  # fmt: skip
        return Output(self.out(merge_heads(out)), state)

    def code(self, time):
        """int32 [B, T] -> float32 [B, T, C]: sines in even channels, cosines in odd ones."""
        return ops.positions.sinusoidal(time, self.time_width, base=self.config.base)

    def turn(self, query, time):
        """What the code of a key's time is multiplied by to give query . W_t R(time - the key's): [B, T, N, C].

        By the sums of angles: a sin(t - t') + b cos(t - t') = (b sin t - a cos t) sin t' + (a sin t + b cos t) cos t'.
        """
        batch, length, n, _ = query.shape
        kernel = split_heads(self.time.kernel[...].astype(query.dtype), self.num_kv_heads)
        grouped = query.reshape(batch, length, self.num_kv_heads, -1, self.head_dim)
        read = jnp.einsum('btkgh,ckh->btkgc', grouped, kernel, preferred_element_type=jnp.float32)
        a, b = (read.reshape(batch, length, n, -1)[..., part::2] for part in (0, 1))
        sin, cos = (self.code(time)[:, :, None, part::2] for part in (0, 1))
        return jnp.stack([b * sin - a * cos, a * sin + b * cos], axis=-1).reshape(batch, length, n, -1)


def _flops(config, dims, length):
    wide = (config.head_dim or dims.width // config.num_heads) + (config.time_width or dims.width) + config.num_channels
    pairs = 2 if dims.causal else 1
    return pairs * softmax.flops(config.num_heads, wide, dims, length, value_dim=dims.width // config.num_heads)


SPEC = Spec(
    module=MultiVariateAttention,
    config=Config,
    paper='2506.20354',
    ops=('weighted_attention',),
    state='kv',
    inputs={'time': 'int32 B T', 'channel': 'int32 B T'},
    example=Config(num_heads=4, num_kv_heads=2, window=1, num_channels=3, time_width=8),
    flops=_flops,
)
