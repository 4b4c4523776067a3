"""RetNet's multi-scale retention: a matrix state that decays at a fixed rate per head, with rotary positions.

Equation: S_t = gamma_h S_{t-1} + k_t^T v_t;  o_t = H^-1/2 q_t S_t;  y = W_o (silu(W_g x) * o / rms(o) per head), with
    gamma_h = 1 - 2^(-5 - h) and pairs (2i, 2i + 1) of q, k rotated by t theta_i, theta_i = 10000^(-i / (H / 2 - 1)).
Paper: Retentive network: a successor to transformer for large language models, 2023, arXiv 2307.08621.
Differs: the released row scalings are left out: the norm per head removes them, but for its epsilon; the projections
    are initialised as everywhere here, not by Xavier with gain 2^-2.5.
Cost: train O(T C + T H) time per channel, O(T) memory, through the fused op; decode keeps N H Hv numbers whatever the
    length.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attnx import ops
from attnx.nn import Linear, Recurrent, merge_heads, rms_normalize, split_heads
from attnx.nn.recurrence import document_positions
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_heads: int = 4  # N
    value_expansion: float = 2.0  # total value width / model width
    base: float = 10_000.0  # wave length of the slowest rotation / 2 pi


def log_decay(num_heads: int) -> np.ndarray:
    """log(1 - 2^(-5 - h)) of heads h = 0, 1, …: float32 [N]."""
    return np.log1p(-(2.0 ** (-5 - np.arange(num_heads)))).astype(np.float32)


class RetNet(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config = config
        n, values = config.num_heads, round(dims.width * config.value_expansion)
        if n < 1 or dims.width % (2 * n) or values % n:
            raise ValueError(f'width {dims.width} must divide into {n} heads of even width, and values {values} too')
        self.shape = (n, dims.width // n, values // n)
        self.query = Linear(dims.width, dims.width, ('embed', 'heads'), dims, rngs=rngs)
        self.key = Linear(dims.width, dims.width, ('embed', 'heads'), dims, rngs=rngs)
        self.value = Linear(dims.width, values, ('embed', 'heads'), dims, rngs=rngs)
        self.gate = Linear(dims.width, values, ('embed', 'heads'), dims, rngs=rngs)
        self.out = Linear(values, dims.width, ('heads', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)

    def init_state(self, batch, capacity, dtype=None):
        matrix = jnp.zeros((batch, *self.shape), jnp.float32)
        return Recurrent.init({'matrix': matrix, 'position': jnp.zeros((batch,), jnp.int32)})

    def __call__(self, x, ctx: Context, state=None) -> Output:
        n, head_dim, _ = self.shape
        memory, ids = ({}, ctx.segment_ids) if state is None else state.resume(ctx, *x.shape[:2])
        where = document_positions(ctx, ids, x.shape[1], memory.get('position'))
        angles = where[..., None] * self.config.base ** -jnp.linspace(0, 1, head_dim // 2)
        out, matrix = ops.gated_linear(
            ops.positions.rotate(split_heads(self.query(x), n), angles, interleaved=True),
            ops.positions.rotate(split_heads(self.key(x), n), angles, interleaved=True),
            split_heads(self.value(x), n),
            jnp.asarray(log_decay(n)),
            initial_state=memory.get('matrix'),
            segment_ids=ids,
            scale=head_dim**-0.5,
            impl=ctx.impl,
        )
        y = self.out(merge_heads(rms_normalize(out)) * jax.nn.silu(self.gate(x)))
        new = {'matrix': matrix, 'position': where[:, -1] + 1}
        return Output(y, None if state is None else state.advance(new, ids))


SPEC = Spec(
    module=RetNet,
    config=Config,
    paper='2307.08621',
    ops=('gated_linear',),
    state='matrix',
    causal='causal',
    example=Config(num_heads=4),
    flops=lambda config, dims, length: 4 * dims.width**2 * config.value_expansion / config.num_heads,
)
