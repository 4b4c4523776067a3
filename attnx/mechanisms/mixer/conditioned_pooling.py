"""Conditioned pooling: one score a token, made from it and from features that the data brings, weighs a running mean.

Equation: a_s = softmax_s(w . f_s), y_t = sum_s a_s x_s over s <= t, or over the document;  with features c:
    f = [x ; c] (concat), sigmoid(W c + b) * x (gate), (W c + b) * x + V c + d (affine), or tanh of that (tanh_affine).
Paper: Attention-based conditioning methods for external knowledge integration, 2019, arXiv 1906.03674.
Differs: the paper pools a sentence into one vector; here a token gets the mean up to it, or in a bidirectional model its
    document's. The scorer's bias, which the softmax cancels, is left out; affine starts near x itself (b = 1, d = 0).
Cost: train O(T) time and memory through the fused op (`gated_linear`); decode keeps M + 2 numbers whatever the length.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx import ops
from attnx.nn import Linear, Recurrent, normal, param, softmax
from attnx.spec import Context, Dims, Mixer, Output, Spec

HOW = ('concat', 'gate', 'affine', 'tanh_affine')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    condition: str = 'gate'  # concat, gate, affine, tanh_affine
    num_features: int = 73  # width of the side input 'features'

    def __post_init__(self):
        softmax.check_choice('condition', self.condition, HOW)
        if self.num_features < 1:
            raise ValueError(f'num_features {self.num_features} must be at least 1')


class ConditionedPooling(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.causal, self.width, self.dtype = config, dims.causal, dims.width, dims.dtype
        into = lambda: Linear(config.num_features, dims.width, ('features', 'embed'), dims, rngs=rngs, bias=True)
        affine = config.condition in ('affine', 'tanh_affine')
        self.scale = None if config.condition == 'concat' else into()
        self.shift = into() if affine else None
        if affine:
            self.scale.bias[...] = jnp.ones_like(self.scale.bias[...])
        scored = dims.width + (config.num_features if config.condition == 'concat' else 0)
        self.score = param(normal(rngs, (scored,), scored**-0.5, dims.param_dtype), ('features',))

    def init_state(self, batch, capacity, dtype=None):
        if not self.causal:
            return None
        sums = jnp.zeros((batch, 1, 1, self.width + 1), jnp.float32)
        return Recurrent.init({'sums': sums, 'top': jnp.zeros((batch, 1), jnp.float32)})

    def condition(self, x, features):
        """The states that are scored: [B, T, M], or [B, T, M + F]."""
        how = self.config.condition
        if how == 'concat':
            return jnp.concatenate([x, features.astype(x.dtype)], axis=-1)
        scale = self.scale(features)
        if how == 'gate':
            return jax.nn.sigmoid(scale) * x
        f = scale * x + self.shift(features)
        return jnp.tanh(f) if how == 'tanh_affine' else f

    def __call__(self, x, ctx: Context, state=None) -> Output:
        features, x = ctx.side('features'), x.astype(self.dtype)
        if features.shape != (*x.shape[:2], self.config.num_features):
            wanted = [*x.shape[:2], self.config.num_features]
            raise ValueError(f"the side input 'features' must be {wanted} (num_features), was given {list(features.shape)}")
        memory, ids = (None, ctx.segment_ids) if state is None else state.resume(ctx, *x.shape[:2])
        logits = self.condition(x, features).astype(jnp.float32) @ self.score[...][:, None]
        options = {'causal': self.causal, 'initial_state': memory, 'segment_ids': ids, 'impl': ctx.impl}
        mean, memory = ops.weighted_mean(logits, x[:, :, None], **options)
        return Output(mean[:, :, 0], None if state is None else state.advance(memory, ids))


SPEC = Spec(
    module=ConditionedPooling,
    config=Config,
    paper='1906.03674',
    ops=('gated_linear',),
    state='vector',
    inputs={'features': 'float32 B T 73'},
    example=(Config(), Config(condition='tanh_affine')),
    flops=lambda config, dims, length: 4 * dims.width,
)
