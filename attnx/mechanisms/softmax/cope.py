"""Contextual position encoding: positions count what the query finds worth counting.

Equation: g_ij = sigmoid(scale q_i . k_j), p_ij = min(sum_{l=j..i} g_il, P - 1) over the keys that i sees, c_ij = the embeddings
    e_0 … e_{P-1} interpolated at p_ij, times q_i;  s_ij = scale (q_i . k_j + c_ij);  o_i = sum_j softmax_j(s_ij) v_j.
Paper: Contextual position encoding: learning to count what's important, 2024, arXiv 2405.18719.
Differs: `gate_keys` are keys of their own for the gates, an option of the paper. Other position codes are refused.
Cost: train O(T²) time, masked pairs too, O(T) memory and some rows of pairs at a time (`weighted_attention`, XLA; no fused
    kernel: a logit depends on all keys between); decode keeps 2 K H numbers a token, 3 K H with keys for the gates. On
    accelerators the gradient of the embeddings adds in no fixed order.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx import ops
from attnx.nn import Linear, attention, merge_heads, normal, param, softmax, split_heads
from attnx.nn.state import attend_to
from attnx.ops.weighted_attention import evaluate, products
from attnx.spec import Context, Dims, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    position: str = 'none'  # none: the code is the mechanism
    num_positions: int = 64  # P: embeddings; counts beyond P - 1 are cut off
    gate_keys: bool = False  # keys of their own for the gates

    def __post_init__(self):
        super().__post_init__()
        softmax.refuse(self, 'CoPE is the position code', 'position', 'rope')
        softmax.refuse(self, 'CoPE has no such logit in its denominator', 'sinks', 'off_by_one')
        if self.num_positions < 2:
            raise ValueError(f'num_positions {self.num_positions} must be at least 2')


def contextual(query, table, gates):
    """c_ij of gates [B, N, t, S] that are 0 where a key is not seen: float32 [B, N, t, S].

    Args:
      query: [B, t, N, H].
      table: [P, H].
    """
    count = jnp.flip(jnp.cumsum(jnp.flip(gates, axis=-1), axis=-1), axis=-1)
    count = jnp.minimum(count, table.shape[0] - 1)
    at = jnp.einsum('btnh,ph->bntp', query, table.astype(query.dtype), preferred_element_type=jnp.float32)
    low = jnp.floor(jax.lax.stop_gradient(count))
    read = lambda where: jnp.take_along_axis(at, where.astype(jnp.int32), axis=-1)
    below = read(low)
    return below + (count - low) * (read(jnp.minimum(low + 1, table.shape[0] - 1)) - below)


class ContextualPositionAttention(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        self.table = param(normal(rngs, (config.num_positions, self.head_dim), 0.02, dims.param_dtype), (None, 'head_dim'))
        narrow = self.num_kv_heads * self.head_dim
        self.gate = Linear(dims.width, narrow, ('embed', 'kv_heads'), dims, rngs=rngs) if config.gate_keys else None

    def init_state(self, batch, capacity, dtype=None):
        shape = (self.num_kv_heads, self.head_dim)
        return self.core.init_state(batch, capacity, (shape,) * (3 if self.gate else 2), dtype or self.dtype)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query, key, value = self.project(x)
        if self.core.query_norm is not None:
            query, key = self.core.query_norm(query), self.core.key_norm(key)
        gate = () if self.gate is None else (split_heads(self.gate(x), self.num_kv_heads),)
        state, keys = attend_to(state, ctx, (value, key, *gate))
        value, *key = (a.astype(query.dtype) for a in keys.arrays)
        mask, score, scale = self.core.mask(keys), self.core.score(keys), self.config.scale or self.head_dim**-0.5

        def logits(query, key, i):
            s = products(query, key[0], scale)
            gates = jax.nn.sigmoid(s if len(key) == 1 else products(query, key[1], scale))
            gates = gates if mask is None else jnp.where(evaluate(mask, i), gates, 0)
            return s + scale * contextual(query, self.table[...], gates)

        out = ops.weighted_attention(
            query, key, value, weights=ops.normalizers.softmax, logits=logits, mask=mask, score=score,
            dropout=self.core.dropout(ctx), impl=ctx.impl,
        )  # fmt: skip
        return Output(self.out(merge_heads(out)), state)


SPEC = Spec(
    module=ContextualPositionAttention,
    config=Config,
    paper='2405.18719',
    ops=('weighted_attention',),
    state='kv',
    causal='causal',
    example=Config(num_heads=4, num_kv_heads=2, num_positions=6, gate_keys=True),
    flops=attention.flops_of_all_pairs,
)
