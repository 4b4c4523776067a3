"""Luong attention: tokens read a memory by a product, a bilinear form or a small network, all of it or a window.

Equation: y_t = tanh(W_c [c_t ; h_t]), c_t = sum_s a_ts m_s, a = softmax_s(score): dot h . m, general h . W_a m, concat
    v . tanh(W_a [h ; m]). Windows of half-width D: around position t (local_m), or around p_t = (S - 1) sigmoid(v_p .
    tanh(W_p h_t)) (local_p), whose weights are multiplied by exp(-2 (s - p_t)² / D²).
Paper: Effective approaches to attention-based neural machine translation, 2015, arXiv 1508.04025.
Differs: positions count from 0, hence S - 1. Feeding y_t into the next step, which would make training sequential, is left
    out. A row's real memory is a prefix. All documents of a packed row read that row's memory.
Cost: train O(T S) time; the fused op for dot and general without a window, else some rows at a time (`weighted_attention`,
    XLA), with M numbers a pair for concat; decode keeps M numbers for each memory token, none for its own.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx import ops
from attnx.nn import Linear, normal, param, positions, softmax
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    score: str = 'general'  # dot, general, concat
    reach: str = 'global'  # global, local_m, local_p
    window: int = 10  # D: half-width of a window
    memory_width: int = 0  # width of the memory; 0: that of the model
    memory_length: int = 0  # most memory tokens that decoding has room for; 0: the model's max_length

    def __post_init__(self):
        softmax.check_choice('score', self.score, ('dot', 'general', 'concat'))
        softmax.check_choice('reach', self.reach, ('global', 'local_m', 'local_p'))
        if self.reach == 'global':
            softmax.refuse(self, "reach 'global' has no window", 'window')
        if self.window < 1 or min(self.memory_width, self.memory_length) < 0:
            raise ValueError('window must be at least 1; memory_width and memory_length not negative')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """The memory, written by the calls that bring one, and the tokens seen."""

    memory: jax.Array  # [B, S, M']
    real: jax.Array  # bool [B, S]
    index: jax.Array  # int32 []


class LuongAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype, width = config, dims.dtype, dims.width
        self.memory_width, self.room = config.memory_width or width, config.memory_length or dims.max_length
        if config.score == 'dot' and self.memory_width != width:
            raise ValueError(f"score 'dot' compares equal widths, not {width} and memory_width {self.memory_width}")
        if config.score != 'dot':
            scale = width**-0.5 if config.score == 'general' else 1.0  # products of about 1, which nothing divides
            self.match = Linear(width, self.memory_width, ('embed', 'heads'), dims, rngs=rngs, scale=scale)
        if config.score == 'concat':
            self.match_memory = Linear(self.memory_width, self.memory_width, ('embed', 'heads'), dims, rngs=rngs)
            scale = self.memory_width**-0.5
            self.vector = param(normal(rngs, (self.memory_width,), scale, dims.param_dtype), ('heads',))
        if config.reach == 'local_p':
            exact = dataclasses.replace(dims, dtype=jnp.float32)
            self.where = Linear(width, width, ('embed', 'heads'), exact, rngs=rngs)
            self.where_vector = param(normal(rngs, (width,), width**-0.5, dims.param_dtype), ('heads',))
        self.out = Linear(self.memory_width + width, width, (None, 'embed'), dims, rngs=rngs)

    def init_state(self, batch, capacity, dtype=None):
        memory = jnp.zeros((batch, self.room, self.memory_width), dtype or self.dtype)
        return State(memory=memory, real=jnp.zeros(memory.shape[:2], bool), index=jnp.zeros((), jnp.int32))

    def read(self, ctx, state, length):
        """(memory [B, S, M'], bool [B, S], next state)."""
        memory, real = ctx.memory, ctx.memory_mask
        if memory is None and state is None:
            raise ValueError('luong reads a memory: give Context(memory=[B, S, M]), or a state holding one')
        if memory is not None:
            if memory.ndim != 3 or memory.shape[-1] != self.memory_width:
                raise ValueError(f'memory must be [B, S, {self.memory_width}], was given {list(memory.shape)}')
            real = jnp.ones(memory.shape[:2], bool) if real is None else real
        if state is None:
            return memory, real, None
        if memory is not None:
            if memory.shape[1] > self.room:
                raise ValueError(
                    f'a memory of {memory.shape[1]} tokens exceeds the room for {self.room}; set memory_length of luong'
                )
            write = lambda old, new: jnp.zeros_like(old).at[:, : new.shape[1]].set(new.astype(old.dtype))
            state = dataclasses.replace(state, memory=write(state.memory, memory), real=write(state.real, real))
        return state.memory, state.real, dataclasses.replace(state, index=state.index + length)

    def weights(self, x, real, ctx, start):
        """The softmax in a window: a normalizer."""
        local, half = self.config.reach == 'local_p', self.config.window
        last = jnp.maximum(real.sum(axis=1, keepdims=True) - 1, 0)  # [B, 1]
        if local:
            asked = jnp.tanh(self.where(x)) @ self.where_vector[...].astype(jnp.float32)
            at = last * jax.nn.sigmoid(asked)
            center = jnp.floor(jax.lax.stop_gradient(at))
        else:
            at = center = jnp.minimum(positions(ctx, x.shape[1], start), last).astype(jnp.float32)
        at, center = (jnp.broadcast_to(a, x.shape[:2]) for a in (at, center))

        def normalizer(s, seen, i):
            here = jnp.minimum(i.q[0, 0, :, 0], i.q_len - 1)
            seen = seen & (jnp.abs(i.k - center[:, here][:, None, :, None]) <= half)
            w = ops.normalizers.softmax(s, seen, i)
            return w * jnp.exp(-2 * jnp.square((i.k - at[:, here][:, None, :, None]) / half)) if local else w

        return normalizer

    def __call__(self, x, ctx: Context, state=None) -> Output:
        x, start = x.astype(self.dtype), 0 if state is None else state.index
        memory, real, state = self.read(ctx, state, x.shape[1])
        memory, how = memory.astype(x.dtype), self.config.score
        query = (x if how == 'dot' else self.match(x))[:, :, None]
        tokens = jnp.ones(x.shape[:2], bool) if ctx.segment_ids is None else ctx.segment_ids > 0
        mask = ops.masks.segments(tokens.astype(jnp.int32), real.astype(jnp.int32))
        values = memory[:, :, None]
        if how != 'concat' and self.config.reach == 'global':
            read = ops.softmax_attention(query, values, values, mask=mask, scale=1.0, impl=ctx.impl)
        else:
            options = {'mask': mask, 'impl': ctx.impl, 'scale': 1.0, 'weights': ops.normalizers.softmax}
            if self.config.reach != 'global':
                options['weights'] = self.weights(x, real, ctx, start)
            if how == 'concat':
                options |= {'logits': self.compare, 'pair_width': self.memory_width}
            key = self.match_memory(memory)[:, :, None] if how == 'concat' else values
            read = ops.weighted_attention(query, key, values, **options)
        return Output(jnp.tanh(self.out(jnp.concatenate([read[:, :, 0], x], axis=-1))), state)

    def compare(self, query, key, i):
        """v . tanh(query + key): [B, t, 1, M'] and [B, S, 1, M'] -> [B, 1, t, S]."""
        pairs = jnp.tanh((query + jnp.swapaxes(key, 1, 2)).astype(jnp.float32))
        return (pairs @ self.vector[...].astype(jnp.float32))[:, None]


SPEC = Spec(
    module=LuongAttention,
    config=Config,
    paper='1508.04025',
    ops=('softmax_attention', 'weighted_attention'),
    state='memory',
    needs=('memory',),
    example=(Config(score='concat', reach='local_p', window=4), Config()),
    flops=lambda config, dims, length: 4 * dims.width * length,
)
