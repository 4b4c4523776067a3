"""Key-only attention: a token's weight depends on itself alone, so that every query reads one running mean.

Equation: e_s = H^-1/2 silu(W_q x_s) . W_k x_s;  o_t = sum_{s <= t} exp(e_s) W_v x_s / sum_{s <= t} exp(e_s) per head.
Paper: Deconstructing attention: investigating design principles for effective language modeling, 2025, arXiv 2510.11602
    (the variant 'non-approximate').
Differs: a bidirectional model takes the mean over the whole document, where the paper is causal.
Cost: train O(T) time and memory through the fused op (`gated_linear`); decode keeps N (H + 2) numbers whatever the length.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx import ops
from attnx.nn import Linear, Recurrent, merge_heads, softmax, split_heads
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_heads: int = 4  # N


class KeyOnlyAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.num_heads, self.causal = config.num_heads, dims.causal
        self.head_dim = softmax.heads_of(config.num_heads, 0, dims.width)
        into = lambda: Linear(dims.width, dims.width, ('embed', 'heads'), dims, rngs=rngs)
        self.query, self.key, self.value = into(), into(), into()
        scale = (2 * dims.num_layers) ** -0.5
        self.out = Linear(dims.width, dims.width, ('heads', 'embed'), dims, rngs=rngs, scale=scale)

    def init_state(self, batch, capacity, dtype=None):
        if not self.causal:
            return None
        sums = jnp.zeros((batch, self.num_heads, 1, self.head_dim + 1), jnp.float32)
        return Recurrent.init({'sums': sums, 'top': jnp.zeros((batch, self.num_heads), jnp.float32)})

    def __call__(self, x, ctx: Context, state=None) -> Output:
        memory, ids = (None, ctx.segment_ids) if state is None else state.resume(ctx, *x.shape[:2])
        query, key, value = (split_heads(f(x), self.num_heads) for f in (self.query, self.key, self.value))
        logits = jnp.sum(jax.nn.silu(query.astype(jnp.float32)) * key, axis=-1) * self.head_dim**-0.5
        mean = {'causal': self.causal, 'initial_state': memory, 'segment_ids': ids, 'impl': ctx.impl}
        out, memory = ops.weighted_mean(logits, value, **mean)
        return Output(self.out(merge_heads(out)), None if state is None else state.advance(memory, ids))


SPEC = Spec(
    module=KeyOnlyAttention,
    config=Config,
    paper='2510.11602',
    ops=('gated_linear',),
    state='vector',
    example=Config(num_heads=4),
    flops=lambda config, dims, length: 6 * dims.width,
)
