"""Forgetting attention (FoX): softmax attention whose logits fall by what forget gates took since the key.

Equation: o_t = sum_s softmax_s(scale q_t . k_s + c_t - c_s) v_s, c_t the sum of log f_r over r <= t in the document,
    f_t = sigmoid(W_f x_t + b) per head; optional: y = W_o (RMSNorm(o_t) sigmoid(W_g x_t)).
Paper: Forgetting transformer: softmax attention with a forget gate, 2025, arXiv 2503.02130.
Differs: the `fixed` gates, a bias per head, start with decay times spaced by powers between `shortest` and `longest`, as the
    paper's data-independent gates; its pruning of far keys is left out. The shift of keys and values of its Pro block is
    the mechanism `kv_shifting`.
Cost: train O(T²) time, O(T) memory, through the fused op: c enters as a number a row and a column; decode keeps 2 K H + N
    numbers a token, N of them float32.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from attnx import ops
from attnx.nn import Cache, Linear, Recurrent, RMSNorm, attention, merge_heads, param, softmax
from attnx.ops.chunks import running
from attnx.spec import Context, Dims, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    position: str = 'none'  # rope, none: the gates tell near from far
    gates: str = 'data'  # data: from the token; fixed: a bias per head
    shortest: float = 1.0  # fixed gates: decay time of the first head at the start, in tokens
    longest: float = 1024.0  # fixed gates: that of the last
    output_gate: bool = False  # multiply the output by sigmoid(W_g x)
    output_norm: bool = False  # RMSNorm of each head's output

    def __post_init__(self):
        super().__post_init__()
        softmax.check_choice('gates', self.gates, ('data', 'fixed'))
        if self.gates == 'data':
            softmax.refuse(self, "gates are from the data; for fixed ones: gates='fixed'", 'shortest', 'longest')
        if not 0 < self.shortest <= self.longest:
            raise ValueError(f'shortest {self.shortest} and longest {self.longest} must be positive and in order')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Keys and values, and the sums of log gates that belong to them."""

    cache: Cache
    sums: jax.Array  # c, float32 [B, capacity, N]
    last: Recurrent  # c of the last token, float32 [B, N]


class ForgettingAttention(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        n, wide = config.num_heads, config.num_heads * self.head_dim
        if config.gates == 'data':
            self.forget = Linear(dims.width, n, ('embed', 'heads'), dims, rngs=rngs, bias=True)
        else:
            times = jnp.exp(jnp.linspace(math.log(config.shortest), math.log(config.longest), n))
            self.forget_bias = param(-jnp.log(jnp.expm1(1 / times)).astype(dims.param_dtype), ('heads',))
        self.gate = Linear(dims.width, wide, ('embed', 'heads'), dims, rngs=rngs) if config.output_gate else None
        self.norm = RMSNorm(self.head_dim, dims, rngs=rngs, axis='head_dim') if config.output_norm else None

    def init_state(self, batch, capacity, dtype=None):
        n = self.config.num_heads
        cache, zeros = super().init_state(batch, capacity, dtype), lambda *shape: jnp.zeros(shape, jnp.float32)
        return State(cache=cache, sums=zeros(batch, capacity, n), last=Recurrent.init(zeros(batch, n)))

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query, key, value = self.project(x)
        if self.config.gates == 'data':
            forget = self.forget(x).astype(jnp.float32)
        else:
            forget = jnp.broadcast_to(self.forget_bias[...], (*x.shape[:2], self.config.num_heads))
        forget = jax.nn.log_sigmoid(forget)
        cache, ids = None, ctx.segment_ids
        if state is not None:
            cache, (before, ids) = state.cache, state.last.resume(ctx, *x.shape[:2])
            forget = forget.at[:, 0].add(before)
        own = sums = running(jnp.add, forget, ids)
        if state is not None:
            sums = jax.lax.dynamic_update_slice_in_dim(state.sums, own, cache.index, axis=1)
        query, keys, cache = self.core.extend(query, key, (value,), ctx, cache)
        operands = (ops.scores.Operand(jnp.swapaxes(c, 1, 2), f'bh{letter}') for c, letter in ((own, 'q'), (sums, 'k')))
        decay, score = ops.scores.Score((ops.scores.Term(_decay, tuple(operands)),)), self.core.score(keys)
        score = decay if score is None else decay >> score
        out = self.core.attend(query, *keys.arrays, ctx, self.core.mask(keys), score)
        out = merge_heads(out if self.norm is None else self.norm(out))
        out = out if self.gate is None else out * jax.nn.sigmoid(self.gate(x))
        if state is not None:
            state = State(cache=cache, sums=sums, last=state.last.advance(own[:, -1], ids))
        return Output(self.out(out), state)


def _decay(s, i, query, key):
    return s + (query - key).astype(s.dtype)


SPEC = Spec(
    module=ForgettingAttention,
    config=Config,
    paper='2503.02130',
    ops=('softmax_attention',),
    state='kv',
    causal='causal',
    example=Config(num_heads=4, num_kv_heads=2, output_gate=True, output_norm=True),
    variants={'shortest': {'gates': 'fixed', 'shortest': 4.0}, 'longest': {'gates': 'fixed'}},
    flops=attention.flops,
)
