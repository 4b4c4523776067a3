"""Gated linear attention: a matrix state that decays per key channel, by the data.

Equation: S_t = diag(exp g_t) S_{t-1} + k_t^T v_t;  o_t = H^-1/2 q_t S_t;  y = W_o (RMSNorm(o) * silu(W_g x)), with
    g_t = logsigmoid(W_2 W_1 x + b) / temperature per key channel.
Paper: Gated linear attention transformers with hardware-efficient training, 2023, arXiv 2312.06635.
Differs: nothing but the initial values of the projections; head counts, widths and the rank of the decay are free.
Cost: train O(T C + T H) time per channel, O(T) memory, through the fused op; decode keeps N H Hv numbers whatever the
    length.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx import ops
from attnx.nn import Linear, Recurrent, RMSNorm, merge_heads, split_heads
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_heads: int = 4  # N
    key_expansion: float = 0.5  # total key width / model width
    value_expansion: float = 1.0  # total value width / model width
    gate_rank: int = 16  # rank of the decay's projection
    gate_temperature: float = 16.0  # divides the log decay: larger remembers longer


class GatedLinearAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config = config
        n = config.num_heads
        keys, values = round(dims.width * config.key_expansion), round(dims.width * config.value_expansion)
        if n < 1 or keys % n or values % n:
            raise ValueError(f'key width {keys} and value width {values} must divide into num_heads {n}')
        self.shape = (n, keys // n, values // n)
        self.query = Linear(dims.width, keys, ('embed', 'heads'), dims, rngs=rngs)
        self.key = Linear(dims.width, keys, ('embed', 'heads'), dims, rngs=rngs)
        self.value = Linear(dims.width, values, ('embed', 'heads'), dims, rngs=rngs)
        self.decay_down = Linear(dims.width, config.gate_rank, ('embed', 'rank'), dims, rngs=rngs)
        self.decay_up = Linear(config.gate_rank, keys, ('rank', 'heads'), dims, rngs=rngs, bias=True)
        self.gate = Linear(dims.width, values, ('embed', 'heads'), dims, rngs=rngs)
        self.norm = RMSNorm(values // n, dims, rngs=rngs, axis='head_dim')
        self.out = Linear(values, dims.width, ('heads', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)

    def init_state(self, batch, capacity, dtype=None):
        return Recurrent.init(jnp.zeros((batch, *self.shape), jnp.float32))

    def __call__(self, x, ctx: Context, state=None) -> Output:
        n, head_dim, _ = self.shape
        memory, ids = (None, ctx.segment_ids) if state is None else state.resume(ctx, *x.shape[:2])
        decay = jax.nn.log_sigmoid(self.decay_up(self.decay_down(x)).astype(jnp.float32)) / self.config.gate_temperature
        out, memory = ops.gated_linear(
            split_heads(self.query(x), n),
            split_heads(self.key(x), n),
            split_heads(self.value(x), n),
            split_heads(decay, n),
            initial_state=memory,
            segment_ids=ids,
            scale=head_dim**-0.5,
            impl=ctx.impl,
        )
        y = self.out(merge_heads(self.norm(out)) * jax.nn.silu(self.gate(x)))
        return Output(y, None if state is None else state.advance(memory, ids))


SPEC = Spec(
    module=GatedLinearAttention,
    config=Config,
    paper='2312.06635',
    ops=('gated_linear',),
    state='matrix',
    causal='causal',
    example=Config(num_heads=2),
    flops=lambda config, dims, length: (
        4 * dims.width**2 * config.key_expansion * config.value_expansion / config.num_heads
    ),
)
