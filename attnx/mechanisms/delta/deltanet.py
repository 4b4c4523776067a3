"""DeltaNet: a matrix state in which writing a key first erases what it held.

Equation: S_t = S_{t-1} + beta_t k_t^T (v_t - k_t S_{t-1});  o_t = H^-1/2 q_t S_t;  y = W_o RMSNorm(o), with
    q, k = l2_normalize(silu(conv(W x))), v = silu(conv(W_v x)), beta_t = sigmoid(W_b x_t) per head.
Paper: Parallelizing linear transformers with the delta rule over sequence length, 2024, arXiv 2406.06484.
Differs: the output gate (silu) is an option of the authors' library, off by default; negative eigenvalues (beta in
    [0, 2], arXiv 2411.12537) likewise.
Cost: train O(T C + T H) time per channel, O(T) memory; decode keeps N H Hv numbers and 3 convolution inputs whatever
    the length.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx import ops
from attnx.nn import Linear, Recurrent, RMSNorm, l2_normalize, merge_heads, split_heads
from attnx.nn.recurrence import ConvLinear
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_heads: int = 4  # N
    key_expansion: float = 1.0  # total key width / model width
    value_expansion: float = 1.0  # total value width / model width
    conv_taps: int = 4  # width of the short convolutions on q, k, v; 0: none
    negative_eigenvalues: bool = False  # beta in [0, 2] instead of [0, 1]: a state can be reflected, not only erased
    gate: bool = False  # multiply the normed output by silu(W_g x)


class DeltaNet(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype = config, dims.dtype
        n = config.num_heads
        keys, values = round(dims.width * config.key_expansion), round(dims.width * config.value_expansion)
        if n < 1 or keys % n or values % n:
            raise ValueError(f'key width {keys} and value width {values} must divide into num_heads {n}')
        self.shape = (n, keys // n, values // n)
        into, taps = ('embed', 'heads'), config.conv_taps
        self.query = ConvLinear(dims.width, keys, into, dims, taps=taps, rngs=rngs)
        self.key = ConvLinear(dims.width, keys, into, dims, taps=taps, rngs=rngs)
        self.value = ConvLinear(dims.width, values, into, dims, taps=taps, rngs=rngs)
        self.beta = Linear(dims.width, n, into, dims, rngs=rngs)
        self.gate = Linear(dims.width, values, into, dims, rngs=rngs) if config.gate else None
        self.norm = RMSNorm(values // n, dims, rngs=rngs, axis='head_dim')
        self.out = Linear(values, dims.width, ('heads', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)

    def init_state(self, batch, capacity, dtype=None):
        windows = {k: getattr(self, k).init_state(batch, dtype or self.dtype) for k in ('query', 'key', 'value')}
        return Recurrent.init({'matrix': jnp.zeros((batch, *self.shape), jnp.float32), **windows})

    def __call__(self, x, ctx: Context, state=None) -> Output:
        n, head_dim, _ = self.shape
        memory, ids = ({}, ctx.segment_ids) if state is None else state.resume(ctx, *x.shape[:2])
        new = {}
        query, new['query'] = self.query(x, memory.get('query'), ids, ctx.impl)
        key, new['key'] = self.key(x, memory.get('key'), ids, ctx.impl)
        value, new['value'] = self.value(x, memory.get('value'), ids, ctx.impl)
        beta = jax.nn.sigmoid(self.beta(x).astype(jnp.float32))
        out, new['matrix'] = ops.delta_rule(
            l2_normalize(split_heads(query, n)),
            l2_normalize(split_heads(key, n)),
            split_heads(value, n),
            2 * beta if self.config.negative_eigenvalues else beta,
            initial_state=memory.get('matrix'),
            segment_ids=ids,
            scale=head_dim**-0.5,
            impl=ctx.impl,
        )
        y = merge_heads(self.norm(out))
        y = y if self.gate is None else y * jax.nn.silu(self.gate(x))
        return Output(self.out(y), None if state is None else state.advance(new, ids))


SPEC = Spec(
    module=DeltaNet,
    config=Config,
    paper='2406.06484',
    ops=('delta_rule', 'short_conv'),
    state='matrix',
    causal='causal',
    example=Config(num_heads=4),
    flops=lambda config, dims, length: (
        6 * dims.width**2 * config.key_expansion * config.value_expansion / config.num_heads
    ),
)
