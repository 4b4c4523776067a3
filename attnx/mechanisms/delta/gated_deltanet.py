"""Gated DeltaNet: the delta rule on a state that decays per head, by the data.

Equation: S' = exp(g_t) S_{t-1};  S_t = S' + beta_t k_t^T (v_t - k_t S');  o_t = H^-1/2 q_t S_t;
    y = W_o (RMSNorm(o) * silu(W_g x)), with q, k = l2_normalize(silu(conv(W x))), v = silu(conv(W_v x)),
    beta_t = sigmoid(W_b x_t), g_t = -exp(log_rate) softplus(W_a x_t + dt_bias) per head.
Paper: Gated delta networks: improving Mamba2 with delta rule, 2024, arXiv 2412.06464.
Differs: initial rates are drawn from U(1e-4, 16) where the authors' U(0, 16) has infinite logarithms; negative
    eigenvalues (beta in [0, 2], arXiv 2411.12537) are an option.
Cost: train O(T C + T H) time per channel, O(T) memory, through the fused op; decode keeps N H Hv numbers and 3 convolution
    inputs whatever the length.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx.nn import Linear
from attnx.nn.recurrence import DeltaMixer, dt_bias, log_rate
from attnx.spec import Dims, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_heads: int = 6  # N
    key_expansion: float = 0.75  # total key width / model width
    value_expansion: float = 1.5  # total value width / model width
    conv_taps: int = 4  # width of the short convolutions on q, k, v; 0: none
    negative_eigenvalues: bool = False  # beta in [0, 2] instead of [0, 1]: a state can be reflected, not only erased
    gate: bool = True  # multiply the normed output by silu(W_g x)


class GatedDeltaNet(DeltaMixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        n = config.num_heads
        self.decay = Linear(dims.width, n, ('embed', 'heads'), dims, rngs=rngs)
        self.log_rate = log_rate(rngs, n, 0, 16, dims)
        self.dt_bias = dt_bias(rngs, n, dims)

    def log_decay(self, rate):
        step = jax.nn.softplus(rate.astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        return -jnp.exp(self.log_rate[...].astype(jnp.float32)) * step


SPEC = Spec(
    module=GatedDeltaNet,
    config=Config,
    paper='2412.06464',
    ops=('delta_rule', 'short_conv'),
    state='matrix',
    causal='causal',
    example=Config(num_heads=4),
    flops=lambda config, dims, length: (
        6 * dims.width**2 * config.key_expansion * config.value_expansion / config.num_heads
    ),
)
