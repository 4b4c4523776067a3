"""Mamba-2: a matrix state that decays per head, by step sizes from the data; groups of heads share keys and queries.

Equation: h_t = exp(-dt_t exp(log_rate)) h_{t-1} + B_t^T (dt_t x_t);  y_t = C_t h_t + D x_t;
    out = W_o RMSNorm(y * silu(z)), with z = W_z u; x, B, C = silu(conv(W u) + b); dt = softplus(W_dt u + dt_bias).
Paper: Transformers are SSMs: generalized models and efficient algorithms through structured state space duality, 2024,
    arXiv 2405.21060.
Differs: x, B and C have a projection and a convolution each in place of one for all: the same maps, sharded by heads.
Cost: train O(T C + T S) time per channel, O(T) memory, through the fused op; decode keeps N S H numbers and 3 convolution
    inputs whatever the length.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx import ops
from attnx.nn import Linear, Recurrent, merge_heads, param, rms_normalize, split_heads
from attnx.nn.recurrence import ConvLinear, dt_bias, log_rate
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    expansion: float = 2.0  # inner width / model width
    head_dim: int = 64  # H: inner width of a head; the inner width holds N = expansion * width / H heads
    state_dim: int = 128  # S: width of B and C, rows of a head's state
    num_groups: int = 1  # heads of a group share B and C; divides the number of heads
    conv_taps: int = 4  # width of the short convolutions on x, B, C; 0: none


class Mamba2(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype = config, dims.dtype
        inner, groups = round(dims.width * config.expansion), config.num_groups
        if not 1 <= config.head_dim <= inner or inner % config.head_dim:
            raise ValueError(f'inner width {inner} must divide into heads of head_dim {config.head_dim}')
        n = inner // config.head_dim
        if groups < 1 or n % groups:
            raise ValueError(f'num_groups {groups} does not divide the {n} heads of inner width {inner}')
        self.num_heads, shared = n, groups * config.state_dim
        conv = {'taps': config.conv_taps, 'rngs': rngs, 'bias': True}
        self.value = ConvLinear(dims.width, inner, ('embed', 'heads'), dims, **conv)  # x
        self.key = ConvLinear(dims.width, shared, ('embed', 'kv_heads'), dims, **conv)  # B
        self.query = ConvLinear(dims.width, shared, ('embed', 'kv_heads'), dims, **conv)  # C
        self.gate = Linear(dims.width, inner, ('embed', 'heads'), dims, rngs=rngs)  # z
        self.step = Linear(dims.width, n, ('embed', 'heads'), dims, rngs=rngs)  # dt
        self.dt_bias = dt_bias(rngs, n, dims)
        self.log_rate = log_rate(rngs, n, 1, 16, dims)
        self.skip_scale = param(jnp.ones((n,), dims.param_dtype), ('heads',))  # D
        self.norm_scale = param(jnp.ones((inner,), dims.param_dtype), ('heads',))
        self.out = Linear(inner, dims.width, ('heads', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)

    def init_state(self, batch, capacity, dtype=None):
        windows = {k: getattr(self, k).init_state(batch, dtype or self.dtype) for k in ('query', 'key', 'value')}
        shape = (batch, self.num_heads, self.config.state_dim, self.config.head_dim)
        return Recurrent.init({'matrix': jnp.zeros(shape, jnp.float32), **windows})

    def __call__(self, x, ctx: Context, state=None) -> Output:
        groups = self.config.num_groups
        memory, ids = ({}, ctx.segment_ids) if state is None else state.resume(ctx, *x.shape[:2])
        new = {}
        query, new['query'] = self.query(x, memory.get('query'), ids, ctx.impl)
        key, new['key'] = self.key(x, memory.get('key'), ids, ctx.impl)
        value, new['value'] = self.value(x, memory.get('value'), ids, ctx.impl)
        value = split_heads(value, self.num_heads)
        step = jax.nn.softplus(self.step(x).astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        out, new['matrix'] = ops.gated_linear(
            split_heads(query, groups),
            split_heads(key, groups),
            (step[..., None] * value).astype(value.dtype),
            -jnp.exp(self.log_rate[...].astype(jnp.float32)) * step,
            initial_state=memory.get('matrix'),
            segment_ids=ids,
            impl=ctx.impl,
        )
        y = merge_heads(out + self.skip_scale[...][:, None] * value)
        y = merge_heads(rms_normalize(split_heads(y * jax.nn.silu(self.gate(x)), groups)))
        y = self.out(y * self.norm_scale[...])
        return Output(y, None if state is None else state.advance(new, ids))


SPEC = Spec(
    module=Mamba2,
    config=Config,
    paper='2405.21060',
    ops=('gated_linear', 'short_conv'),
    state='matrix',
    causal='causal',
    example=Config(head_dim=16, state_dim=8, num_groups=2),
    flops=lambda config, dims, length: 4 * dims.width * config.expansion * config.state_dim,
)
