"""Mixture of heads: a router weighs heads per token; some are always on, of the others the best few.

Equation: y = W_o [g_1 o_1 … g_N o_N], o_h as in grouped-query attention;  for the S shared heads g = a1 S softmax(W_s x),
    for the R = N - S routed ones g = a2 K p m / sum(p m), p = softmax(W_r x), m = 1 at the K largest of p, else 0;
    [a1, a2] = 2 softmax(W_h x).  Balance loss: R sum_h mean(p_h) mean(m_h) over tokens.
    Without a router (`router` = 'norm'): p = softmax(|q_h| / std_h |q_h|), g = m for routed heads, 1 for shared ones, the
    gradient of m being that of p.
Paper: MoH: multi-head attention as mixture-of-head attention, 2024, arXiv 2410.11842.
Differs: gates carry the released code's factors S and K and are renormalised over the chosen heads, which the paper's
    equations omit: routers of zeros with K = R then are multi-head attention. The balance loss covers the router-free form.
Cost: train O(T²) time, O(T) memory through the fused op: heads that a token skips are computed and multiplied by 0; decode
    reads and keeps 2 K H numbers a token, K here the key/value heads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx.nn import Linear, attention, merge_heads, routing, softmax
from attnx.spec import Context, Dims, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    num_heads: int = 8  # N query heads, the first of them shared
    shared_heads: int = 2  # S: heads that every token uses
    top_k: int = 4  # K: routed heads that a token uses beside the shared ones
    router: str = 'linear'  # linear: learned routers; norm: the norms of queries choose, to start from a checkpoint
    balance_weight: float = 0.01  # of the balance loss in the training loss

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.shared_heads < self.num_heads or not 1 <= self.top_k <= self.num_heads - self.shared_heads:
            raise ValueError(
                f'of num_heads {self.num_heads}, shared_heads {self.shared_heads} must leave at least one, '
                f'and top_k {self.top_k} be 1 … the rest'
            )
        softmax.check_choice('router', self.router, ('linear', 'norm'))


class MixtureOfHeads(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        exact = dataclasses.replace(dims, dtype=jnp.float32)
        route = lambda count: Linear(dims.width, count, ('embed', None), exact, rngs=rngs)
        shared, learned = config.shared_heads, config.router == 'linear'
        self.router = route(config.num_heads - shared) if learned else None
        self.shared_router, self.share = (route(shared), route(2)) if learned and shared else (None, None)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query, key, value = self.project(x)
        gates, probs, chosen = self.gates(x, query)
        out, state = self.core(query, key, value, ctx, state)
        out = out * gates[..., None].astype(out.dtype)
        usage = [routing.mean_over_tokens(p, ctx) for p in (probs, chosen)]
        loss = self.config.balance_weight * probs.shape[-1] * jnp.sum(usage[0] * usage[1])
        return Output(self.out(merge_heads(out)), state, {'balance_loss': loss})

    def gates(self, x, query):
        """(gates of all heads [B, T, N], p of the routed ones [B, T, R], whether chosen): float32."""
        shared, top_k = self.config.shared_heads, self.config.top_k
        if self.router is None:
            norm = jnp.sqrt(jnp.sum(jnp.square(query[:, :, shared:].astype(jnp.float32)), axis=-1) + 1e-6)
            probs = jax.nn.softmax(norm / jnp.sqrt(jnp.var(norm, axis=-1, keepdims=True) + 1e-6))
        else:
            probs = jax.nn.softmax(self.router(x))
        chosen = routing.top_k(probs, top_k)[1].astype(jnp.float32)
        if self.router is None:
            gates = [jnp.ones((*x.shape[:2], shared)), chosen + probs - jax.lax.stop_gradient(probs)]
        else:
            routed = probs * chosen
            routed = top_k * routed / routed.sum(axis=-1, keepdims=True)
            gates = [routed]
            if shared:
                share = 2 * jax.nn.softmax(self.share(x))
                gates = [share[..., :1] * shared * jax.nn.softmax(self.shared_router(x)), share[..., 1:] * routed]
        return jnp.concatenate(gates, axis=-1), probs, chosen


SPEC = Spec(
    module=MixtureOfHeads,
    config=Config,
    paper='2410.11842',
    ops=('softmax_attention',),
    state='kv',
    example=Config(num_heads=8, num_kv_heads=4, shared_heads=2, top_k=3),
    flops=attention.flops,
)
