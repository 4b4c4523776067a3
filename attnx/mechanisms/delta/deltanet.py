"""DeltaNet: a matrix state in which writing a key first erases what it held.

Equation: S_t = S_{t-1} + beta_t k_t^T (v_t - k_t S_{t-1});  o_t = H^-1/2 q_t S_t;  y = W_o RMSNorm(o), with
    q, k = l2_normalize(silu(conv(W x))), v = silu(conv(W_v x)), beta_t = sigmoid(W_b x_t) per head.
Paper: Parallelizing linear transformers with the delta rule over sequence length, 2024, arXiv 2406.06484.
Differs: the output gate (silu) is an option of the authors' library, off by default; negative eigenvalues (beta in
    [0, 2], arXiv 2411.12537) likewise.
Cost: train O(T C + T H) time per channel, O(T) memory, through the fused op; decode keeps N H Hv numbers and 3 convolution
    inputs whatever the length.
"""

import dataclasses

from attnx.nn.recurrence import DeltaMixer
from attnx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_heads: int = 4  # N
    key_expansion: float = 1.0  # total key width / model width
    value_expansion: float = 1.0  # total value width / model width
    conv_taps: int = 4  # width of the short convolutions on q, k, v; 0: none
    negative_eigenvalues: bool = False  # beta in [0, 2] instead of [0, 1]: a state can be reflected, not only erased
    gate: bool = False  # multiply the normed output by silu(W_g x)


class DeltaNet(DeltaMixer):
    """Writes and erases, and never decays."""


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
