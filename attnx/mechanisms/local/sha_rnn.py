"""SHA-RNN: an LSTM, and one attention head over a memory of its outputs, whose keys and values are that memory scaled.

Equation: h = LSTM(x), chunks of the model's width summed;  m = LN(h), q = sig(s_q) * LN(W_q LN'(h));
    y_t = h_t + v * sum_s softmax_s(M^-1/2 q_t . (sig(s_k) * m_s)) m_s over the last `memory` tokens,
    v = sig(a) * tanh(c), [c, a] = W_v sig(s_v) + b_v;  all of s_q, s_k, s_v, v are vectors.
Paper: Single headed attention RNN: stop thinking with your head, 2019, arXiv 1911.11423.
Differs: the block adds x to the LSTM's output, which the paper does not by default; its Boom layer is the model's MLP of kind
    'boom'. The paper attends in one layer: set `attention` False in the others. The fan-in initialisation of this library.
Cost: train T sequential LSTM steps of 8 D² products a token, then O(T memory) time and O(T) memory of one head as wide as
    the model, through the fused op; decode keeps M numbers for each of `memory` tokens, and the LSTM's 2 D.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx import ops
from attnx.nn import Cache, LayerNorm, Linear, Recurrent, attend_to, param, softmax
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    expansion: int = 1  # width D of the LSTM, in widths of the model
    attention: bool = True  # whether the layer has the attention head
    memory: int = 5000  # tokens that the head sees, the present one included

    def __post_init__(self):
        if min(self.expansion, self.memory) < 1:
            raise ValueError(f'expansion {self.expansion} and memory {self.memory} must be at least 1')
        if not self.attention:
            softmax.refuse(self, 'a layer without attention has no memory', 'memory')


def lstm(gates, recurrent, ids, carry):
    """An LSTM over x W + b: c = f c + i g, h = o tanh(c), from zero in every document; float32.

    Args:
      gates: [B, T, 4 D], the input's part of i, f, g, o.
      recurrent: [D, 4 D].
      ids: int [B, T], documents.
      carry: (h, c), each [B, D], of the first token's document.

    Returns:
      (h of every token [B, T, D], the last (h, c))
    """
    fresh = jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0

    def step(carry, now):
        gate, begin = now
        h, c = (jnp.where(begin[:, None], 0, a) for a in carry)
        i, f, g, o = jnp.split(gate.astype(jnp.float32) + h @ recurrent, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    carry, out = jax.lax.scan(step, carry, (jnp.moveaxis(gates, 1, 0), fresh.T))
    return jnp.moveaxis(out, 0, 1), carry


class SingleHeadedAttentionRNN(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype, width = config, dims.dtype, dims.width
        self.width, self.hidden = width, config.expansion * width
        self.input = Linear(width, 4 * self.hidden, ('embed', 'heads'), dims, rngs=rngs, bias=True)
        self.recurrent = Linear(self.hidden, 4 * self.hidden, (None, 'heads'), dims, rngs=rngs)
        if config.attention:
            norm = lambda: LayerNorm(width, dims, rngs=rngs)
            self.memory_norm, self.middle_norm, self.query_norm = norm(), norm(), norm()
            self.query = Linear(width, width, ('embed', 'heads'), dims, rngs=rngs, bias=True)
            vector = lambda: param(jnp.zeros((width,), dims.param_dtype), ('embed',))
            self.query_scale, self.key_scale, self.value_scale = vector(), vector(), vector()
            self.over = Linear(width, 2 * width, ('embed', 'heads'), dims, rngs=rngs, bias=True)

    def init_state(self, batch, capacity, dtype=None):
        zero = jnp.zeros((batch, self.hidden), jnp.float32)
        room = min(self.config.memory, capacity)
        cache = Cache.init(batch, room, ((1, self.width),), dtype or self.dtype, ring=True)
        return Recurrent.init((zero, zero)), cache if self.config.attention else ()

    def __call__(self, x, ctx: Context, state=None) -> Output:
        rnn, cache = (None, None) if state is None else state
        zero = jnp.zeros((x.shape[0], self.hidden), jnp.float32)
        carry, ids = (zero, zero), ctx.segment_ids
        if rnn is not None:
            carry, ids = rnn.resume(ctx, *x.shape[:2])
        ids = jnp.ones(x.shape[:2], jnp.int32) if ids is None else ids
        hidden, carry = lstm(self.input(x), self.recurrent.kernel[...].astype(jnp.float32), ids, carry)
        hidden = hidden.reshape(*x.shape[:2], self.config.expansion, self.width).sum(axis=2).astype(self.dtype)
        rnn = None if rnn is None else rnn.advance(carry, ids)
        if self.config.attention:
            read, cache = self.attend(hidden, ctx, cache)
            hidden = hidden + read
        return Output(hidden, None if state is None else (rnn, cache))

    def attend(self, hidden, ctx: Context, cache):
        """h [B, T, M] -> (what it reads of the memory [B, T, M], next cache)."""
        gate = lambda p: jax.nn.sigmoid(p[...].astype(self.dtype))
        query = gate(self.query_scale) * self.query_norm(self.query(self.middle_norm(hidden)))
        cache, keys = attend_to(cache, ctx, (self.memory_norm(hidden)[:, :, None],))
        memory = keys.arrays[0].astype(query.dtype)
        slots = keys.query_slots, keys.key_slots
        mask = ops.masks.causal(*slots) & ops.masks.window(self.config.memory, *slots)
        if keys.query_ids is not None:
            mask = mask & ops.masks.segments(keys.query_ids, keys.key_ids)
        out = ops.softmax_attention(query[:, :, None], gate(self.key_scale) * memory, memory, mask=mask, impl=ctx.impl)
        return self.scale_of_values() * out[:, :, 0], cache

    def scale_of_values(self):
        """v [M]: no function of the input, so after training it can stand for W_v, b_v and s_v."""
        cell, gate = jnp.split(self.over(jax.nn.sigmoid(self.value_scale[...])), 2)
        return jax.nn.sigmoid(gate) * jnp.tanh(cell)


SPEC = Spec(
    module=SingleHeadedAttentionRNN,
    config=Config,
    paper='1911.11423',
    ops=('softmax_attention',),
    state='window',
    causal='causal',
    example=Config(expansion=2, memory=9),
    flops=lambda config, dims, length: 4 * dims.width * min(config.memory, length / 2) * config.attention,
)
