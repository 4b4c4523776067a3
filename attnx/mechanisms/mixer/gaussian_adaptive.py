"""Gaussian adaptive attention: learned bells over normalised features gate the features themselves; no pairs are compared.

Equation: over one axis a of a head's features, z_k = (x - mean_a x - d_k) / sqrt(var_a x + eps), k = 1 … K;
    g = softmax_a(-sum_k z_k² / (2 c_k²)), y = g x; of several steps, h <- h + g h, y = h - x.
    Importance factor: (g - min g) / (max g - min g).
Paper: Gaussian adaptive attention (GAAM) is all you need: robust contextual representations across multiple modalities,
    2024, arXiv 2401.11143.
Differs: the axis is the features of a head in causal models, each token by itself, and time inside a document in
    bidirectional ones (the paper: any axis); heads are groups of features in both. Gates are normalised by the softmax of
    their logarithm, the same without underflow.
Cost: train O(T) time and memory, in plain XLA; decode keeps nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx.nn import merge_heads, normal, param, softmax, split_heads
from attnx.ops.chunks import at_the_end, running
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_heads: int = 4  # groups of features with bells of their own
    num_gaussians: int = 5  # bells of a head, multiplied
    steps: int = 1  # gates one after another, each with a residual and bells of its own
    axis: str = ''  # features, time; '': features in a causal model, time in a bidirectional one
    eps: float = 1e-8  # added to variances

    def __post_init__(self):
        softmax.check_choice('axis', self.axis, ('', 'features', 'time'))
        if min(self.num_heads, self.num_gaussians, self.steps) < 1:
            raise ValueError('num_heads, num_gaussians and steps must be at least 1')


class GaussianAdaptiveAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.axis = config.axis or ('features' if dims.causal else 'time')
        if dims.causal and self.axis == 'time':
            raise ValueError("axis 'time': its means look ahead; a causal model gates 'features'")
        softmax.heads_of(config.num_heads, 0, dims.width)
        self.config, self.causal = config, dims.causal
        shape, axes = (config.steps, config.num_heads, config.num_gaussians), (None, 'heads', None)
        self.offset = param(jnp.zeros(shape, dims.param_dtype), axes)
        self.width = param(jnp.exp(normal(rngs, shape, 1.0, dims.param_dtype)), axes)

    def init_state(self, batch, capacity, dtype=None):
        return jnp.zeros((batch, 0), jnp.float32) if self.causal else None

    def gate(self, x, ids, step: int):
        """g of float32 [B, T, N, H]: it sums to 1 along the axis."""
        if self.axis == 'features':
            total = lambda a: jnp.sum(a, axis=-1, keepdims=True)
            most = lambda a: jnp.max(a, axis=-1, keepdims=True)
        else:
            total = lambda a: at_the_end(running(jnp.add, a, ids), ids)
            most = lambda a: at_the_end(running(jnp.maximum, a, ids), ids)
        count = total(jnp.ones_like(x))
        far = x - total(x) / count
        deviation = jnp.sqrt(total(jnp.square(far)) / jnp.maximum(count - 1, 1) + self.config.eps)
        offset, width = (p[...][step].astype(jnp.float32)[:, None] for p in (self.offset, self.width))
        z = (far[..., None] - offset) / deviation[..., None]
        logit = -jnp.sum(jnp.square(z / width), axis=-1) / 2
        e = jnp.exp(logit - jax.lax.stop_gradient(most(logit)))
        return e / total(e)

    def importance(self, x, ctx: Context):
        """The importance factors of the first gate, float32 [B, T, M] in [0, 1], over each row."""
        gate = merge_heads(self.gate(split_heads(x.astype(jnp.float32), self.config.num_heads), ctx.segment_ids, 0))
        low, high = (f(gate, axis=(1, 2), keepdims=True) for f in (jnp.min, jnp.max))
        return (gate - low) / jnp.maximum(high - low, 1e-30)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        start = now = split_heads(x.astype(jnp.float32), self.config.num_heads)
        for step in range(self.config.steps):
            now = now + self.gate(now, ctx.segment_ids, step) * now
        return Output(merge_heads(now - start).astype(x.dtype), state)


SPEC = Spec(
    module=GaussianAdaptiveAttention,
    config=Config,
    paper='2401.11143',
    state='window',
    example=Config(num_heads=4, num_gaussians=2, steps=2),
    flops=lambda config, dims, length: 5 * config.num_gaussians * config.steps * dims.width,
)
