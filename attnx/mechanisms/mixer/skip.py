"""No token mixing: the layer is its MLP alone, as where attention was dropped.

Equation: y = 0, which the residual makes x.
Paper: What matters in transformers? Not all attention is needed, 2024, arXiv 2406.15786.
Differs: the block's norm before the mixer stays where it is, unused.
Cost: none, in training and in decoding; neither a fused op nor XLA has anything to do.
"""

import dataclasses

import jax.numpy as jnp

from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    pass


class Skip(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.dtype = dims.dtype

    def init_state(self, batch, capacity, dtype=None):
        return ()

    def __call__(self, x, ctx: Context, state=None) -> Output:
        return Output(jnp.zeros(x.shape, self.dtype), state)


SPEC = Spec(
    module=Skip,
    config=Config,
    paper='2406.15786',
    state='empty',
    limits={'causal': 'reads no token at all', 'batch': 'reads no token at all'},
    example=Config(),
)
