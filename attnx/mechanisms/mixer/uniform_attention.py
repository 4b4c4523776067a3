"""Uniform attention and context broadcasting: every token reads the plain mean of its document, or of its past.

Equation: m_t = mean of x_s over s <= t, or over the document;  y = W_o mean(W_v x) (uniform);  y = (x + m) / 2 (broadcast);
    y = x + c * m, c a learned number a channel, 0 at the start (scaled).
Paper: Scratching visual transformer's back with uniform attention, 2022, arXiv 2210.08457.
Differs: the paper puts the broadcast at the end of an MLP; here it is a layer's mixer. The causal form, and the exact form
    of the scaled one, are ours.
Cost: train O(T) time and memory through the fused op (`gated_linear`); decode keeps M + 2 numbers whatever the length.
"""

import dataclasses

import jax.numpy as jnp

from attnx import ops
from attnx.nn import Linear, Recurrent, param, softmax
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    form: str = 'uniform'  # uniform, broadcast, scaled

    def __post_init__(self):
        softmax.check_choice('form', self.form, ('uniform', 'broadcast', 'scaled'))


class UniformAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.form, self.causal, self.width, self.dtype = config.form, dims.causal, dims.width, dims.dtype
        if config.form == 'uniform':
            self.value = Linear(dims.width, dims.width, ('embed', 'heads'), dims, rngs=rngs)
            scale = (2 * dims.num_layers) ** -0.5
            self.out = Linear(dims.width, dims.width, ('heads', 'embed'), dims, rngs=rngs, scale=scale)
        elif config.form == 'scaled':
            self.scale = param(jnp.zeros((dims.width,), dims.param_dtype), ('embed',))

    def init_state(self, batch, capacity, dtype=None):
        if not self.causal:
            return None
        sums = jnp.zeros((batch, 1, 1, self.width + 1), jnp.float32)
        return Recurrent.init({'sums': sums, 'top': jnp.zeros((batch, 1), jnp.float32)})

    def __call__(self, x, ctx: Context, state=None) -> Output:
        x = x.astype(self.dtype)
        memory, ids = (None, ctx.segment_ids) if state is None else state.resume(ctx, *x.shape[:2])
        value = self.value(x) if self.form == 'uniform' else x
        options = {'causal': self.causal, 'initial_state': memory, 'segment_ids': ids, 'impl': ctx.impl}
        mean, memory = ops.weighted_mean(jnp.zeros((*x.shape[:2], 1), jnp.float32), value[:, :, None], **options)
        mean = mean[:, :, 0]
        if self.form == 'uniform':
            y = self.out(mean)
        elif self.form == 'broadcast':
            y = (x + mean) / 2
        else:
            y = x + self.scale[...].astype(x.dtype) * mean
        return Output(y, None if state is None else state.advance(memory, ids))


SPEC = Spec(
    module=UniformAttention,
    config=Config,
    paper='2210.08457',
    ops=('gated_linear',),
    state='vector',
    example=(Config(), Config(form='scaled')),
    flops=lambda config, dims, length: 4 * dims.width,
)
