"""Mixture of attentive experts: an expert is all heads but one, a gate mixes experts, and the two are trained in turn.

Equation: f_i = N / (N - 1) sum_{j != i} H_j, H_j = W_o,j o_j;  g = softmax(W_2 tanh(W_1 m)), m the mean of the inputs;
    y = sum_i g_i f_i = N / (N - 1) sum_j (1 - g_j) H_j.
    In training, every `gate_every`-th step trains the gate: y as above, the heads' parameters fixed. The others train one
    expert, drawn from g: y = f_i, the gate fixed.
Paper: A mixture of h - 1 heads is better than h heads, 2020, arXiv 2005.06537.
Differs: m is the running mean in a causal model, so that the gate is a token's; the noise that draws the expert is a row's.
    Phases alternate by steps, not epochs; the gate's steps leave other layers' parameters to train. Width of the gate and
    ratio of phases are not in what could be read of the paper.
Cost: train O(T²) time, O(T) memory through the fused op, heads that are left out included; decode keeps 2 N H numbers a token,
    and one sum of inputs.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx.nn import Linear, Recurrent, attention, merge_heads, softmax, split_heads
from attnx.nn.state import running_sum
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(softmax.Options):
    num_heads: int = 4  # N, which is the number of experts too; at least 2
    head_dim: int = 0  # H; 0: width / num_heads
    gate_dim: int = 0  # hidden width of the gate; 0: width / 4
    gate_every: int = 6  # training steps from one of the gate to the next, experts being trained between; 0: all at once

    def __post_init__(self):
        super().__post_init__()
        if self.num_heads < 2 or self.gate_every < 0 or self.gate_dim < 0 or self.gate_every == 1:
            raise ValueError('num_heads must be at least 2, gate_dim at least 0, gate_every 0 or at least 2')


class MixtureOfAttentiveExperts(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype, self.causal, width = config, dims.dtype, dims.causal, dims.width
        self.head_dim = softmax.heads_of(config.num_heads, config.head_dim, width)
        wide, hidden = config.num_heads * self.head_dim, config.gate_dim or max(width // 4, 1)
        into = lambda: Linear(width, wide, ('embed', 'heads'), dims, rngs=rngs)
        self.query, self.key, self.value = into(), into(), into()
        self.out = Linear(wide, width, ('heads', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)
        exact = dataclasses.replace(dims, dtype=jnp.float32)
        self.gate = Linear(width, hidden, ('embed', 'mlp'), exact, rngs=rngs, bias=True)
        self.gate_out = Linear(hidden, config.num_heads, ('mlp', None), exact, rngs=rngs, bias=True)
        self.core = softmax.Core(config, dims, config.num_heads, self.head_dim, rngs=rngs)

    def init_state(self, batch, capacity, dtype=None):
        width, shape = self.query.kernel.shape[0], (self.config.num_heads, self.head_dim)
        cache = self.core.init_state(batch, capacity, (shape, shape), dtype or self.dtype)
        return Recurrent.init(jnp.zeros((batch, width + 1), jnp.float32)), cache

    def __call__(self, x, ctx: Context, state=None) -> Output:
        mean, cache = (None, None) if state is None else state
        probs, mean = self.probabilities(x, ctx, mean)
        gates, experts_fixed = self.phase(1 - probs, probs, ctx)
        # Stopping a copy of the modules stops their parameters alone: the input's gradient goes on to layers below.
        held = lambda module: jax.tree.map(lambda p: jnp.where(experts_fixed, jax.lax.stop_gradient(p), p), module)
        query, key, value, out, core = map(held, (self.query, self.key, self.value, self.out, self.core))
        heads, cache = core(*(split_heads(f(x), self.config.num_heads) for f in (query, key, value)), ctx, cache)
        scale = self.config.num_heads / (self.config.num_heads - 1)
        y = out(merge_heads(heads * (scale * gates[..., None]).astype(heads.dtype)))
        return Output(y, None if state is None else (mean, cache))

    def phase(self, mixed, probs, ctx: Context):
        """(weights of heads [B, T, N], whether the heads' parameters are fixed) of this step."""
        if ctx.step is None or not self.config.gate_every:
            return mixed, False
        if ctx.key is None:
            raise ValueError('mae draws an expert in training: give Context(key=…) with the step')
        noise = jax.random.gumbel(jax.random.fold_in(ctx.key, 1), (probs.shape[0], 1, probs.shape[2]))
        drawn = jnp.argmax(jax.lax.stop_gradient(jnp.log(probs)) + noise, axis=-1)
        gate_step = ctx.step % self.config.gate_every == 0
        return jnp.where(gate_step, mixed, 1 - jax.nn.one_hot(drawn, probs.shape[2])), gate_step

    def probabilities(self, x, ctx: Context, state):
        """g float32 [B, T, N] from the mean of the document, or of its tokens so far; the next state."""
        batch, length, width = x.shape
        x = jnp.concatenate([x.astype(jnp.float32), jnp.ones((batch, length, 1))], axis=-1)
        if state is not None:
            start, ids = state.resume(ctx, batch, length)
        else:
            start = jnp.zeros((batch, width + 1))
            ids = jnp.ones((batch, length), jnp.int32) if ctx.segment_ids is None else ctx.segment_ids
        total = running_sum(x, ids, start)
        state = None if state is None else state.advance(total[:, -1], ids)
        if not self.causal:
            ends = jnp.diff(ids, axis=1, append=ids[:, -1:]) != 0
            ends = jax.lax.cummin(jnp.where(ends, jnp.arange(length), length - 1), axis=1, reverse=True)
            total = jnp.take_along_axis(total, ends[:, :, None], axis=1)
        mean = total[..., :width] / total[..., width:]
        return jax.nn.softmax(self.gate_out(jnp.tanh(self.gate(mean)))), state


SPEC = Spec(
    module=MixtureOfAttentiveExperts,
    config=Config,
    paper='2005.06537',
    ops=('softmax_attention',),
    state='kv',
    example=Config(num_heads=4),
    flops=attention.flops,
)
