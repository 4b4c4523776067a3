"""Mixture of attention heads: experts of queries and outputs, chosen per token, over keys and values that all share.

Equation: of E experts a token takes the K best of z = W_r x, with gates g = softmax of the K chosen z;
    y = b + sum_e g_e W_o,e [o_e1 … o_eG], o_eh = softmax(H^-1/2 (W_q,e x)_h k_h^T) v_h, h = 1 … G key/value heads.
    Loss: w (E sum_e P_e F_e + z_share mean(logsumexp(z)²)), P_e and F_e the shares of mean softmax(z) and of choices.
Paper: JetMoE: reaching Llama2 performance with 0.1M dollars, 2024, arXiv 2404.07413;
    Mixture of attention heads, 2022, arXiv 2210.05144.
Differs: what options set per head (sinks, slopes) belongs to a key/value head and the rank of the choice, not to the expert.
Cost: train O(T²) time with K G heads, O(T) memory, through the fused op; projections of chosen experts alone where the
    platform has a ragged product (XLA on CPU computes all and drops). Decode keeps 2 G H numbers a token, whatever E.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx.nn import Linear, merge_heads, normal, param, routing, softmax, split_heads
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(softmax.Options):
    num_experts: int = 8  # E
    top_k: int = 2  # K: experts of a token
    num_kv_heads: int = 4  # G: key/value heads, and query heads of an expert
    head_dim: int = 0  # H; 0: width / num_kv_heads
    balance_weight: float = 0.01  # w: of the loss that evens out the use of experts, in the training loss
    z_share: float = 0.1  # of the mean squared logsumexp of router logits in that loss

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f'top_k {self.top_k} is not in 1 … num_experts {self.num_experts}')


class MixtureOfAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype, width = config, dims.dtype, dims.width
        self.head_dim = softmax.heads_of(config.num_kv_heads, config.head_dim, width)
        narrow, e = config.num_kv_heads * self.head_dim, config.num_experts
        exact = dataclasses.replace(dims, dtype=jnp.float32)
        self.router = Linear(width, e, ('embed', None), exact, rngs=rngs)
        make = lambda shape, axes, scale: param(normal(rngs, shape, scale * shape[1] ** -0.5, dims.param_dtype), axes)
        self.query = make((e, width, narrow), ('expert', 'embed', 'heads'), 1.0)
        self.key = Linear(width, narrow, ('embed', 'kv_heads'), dims, rngs=rngs)
        self.value = Linear(width, narrow, ('embed', 'kv_heads'), dims, rngs=rngs)
        self.out = make((e, narrow, width), ('expert', 'heads', 'embed'), (2 * dims.num_layers) ** -0.5)
        self.bias = param(jnp.zeros((width,), dims.param_dtype), ('embed',))
        self.core = softmax.Core(config, dims, config.top_k * config.num_kv_heads, self.head_dim, rngs=rngs)

    def init_state(self, batch, capacity, dtype=None):
        shape = (self.config.num_kv_heads, self.head_dim)
        return self.core.init_state(batch, capacity, (shape, shape), dtype or self.dtype)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        k, g = self.config.top_k, self.config.num_kv_heads
        x = x.astype(self.dtype)
        logits = self.router(x)
        chosen, used = routing.top_k(logits, k)
        gates = jax.nn.softmax(jnp.take_along_axis(logits, chosen, axis=-1))
        query = split_heads(routing.expert_product(x, self.query[...], chosen), g)  # [B, T, K, G, H]
        query = jnp.swapaxes(query, 2, 3).reshape(*x.shape[:2], g * k, -1)  # the op's order: by key/value head
        key, value = (split_heads(f(x), g) for f in (self.key, self.value))
        out, state = self.core(query, key, value, ctx, state)
        out = jnp.swapaxes(out.reshape(*x.shape[:2], g, k, -1), 2, 3)
        out = routing.expert_product(merge_heads(out), self.out[...], chosen)
        y = jnp.einsum('btk,btkm->btm', gates.astype(out.dtype), out) + self.bias[...].astype(out.dtype)
        return Output(y, state, {'balance_loss': self.loss(logits, used, ctx)})

    def loss(self, logits, used, ctx):
        probs, counts = (routing.mean_over_tokens(a, ctx) for a in (jax.nn.softmax(logits), used))
        even = self.config.num_experts * jnp.sum(probs * counts) / self.config.top_k
        z = routing.mean_over_tokens(jnp.square(jax.nn.logsumexp(logits, axis=-1)), ctx)
        return self.config.balance_weight * (even + self.config.z_share * z)


def _flops(config, dims, length):
    head_dim = config.head_dim or dims.width // config.num_kv_heads
    return softmax.flops(config.top_k * config.num_kv_heads, head_dim, dims, length)


SPEC = Spec(
    module=MixtureOfAttention,
    config=Config,
    paper='2404.07413',
    ops=('softmax_attention',),
    state='kv',
    example=Config(num_experts=4, top_k=2, num_kv_heads=2, head_dim=8),
    flops=_flops,
)
