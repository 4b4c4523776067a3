"""No mixing: a gated MLP in attention's place, of as many parameters; the control of ablations.

Equation: y_t = W_d (silu(W_g x_t) * W_u x_t).
Paper: Deconstructing attention: investigating design principles for effective language modeling, 2025, arXiv 2510.11602
    (the variant 'MLP').
Differs: nothing.
Cost: that of its matrices, O(T), in plain XLA; decode keeps nothing.
"""

import dataclasses

import jax.numpy as jnp

from attnx.nn import MLP, mlp
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    hidden: int = 0  # hidden width; 0: 4/3 of the width, which makes as many parameters as multi-head attention has

    def __post_init__(self):
        if self.hidden < 0:
            raise ValueError(f'hidden {self.hidden} is negative')


class NoMixing(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.mlp = MLP(mlp.Config(hidden=config.hidden or 4 * dims.width // 3), dims, rngs=rngs)

    def init_state(self, batch, capacity, dtype=None):
        return jnp.zeros((batch, 0), jnp.float32)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        return Output(self.mlp(x)[0], state)


SPEC = Spec(
    module=NoMixing,
    config=Config,
    paper='2510.11602',
    state='window',
    causal='causal',
    example=Config(),
)
