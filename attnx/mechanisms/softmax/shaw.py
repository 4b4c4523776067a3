"""Relative position representations: a learned vector for every clipped distance, added to keys and to values.

Equation: s_ij = scale q_i . (k_j + a_r), o_i = sum_j softmax_j(s_ij) (v_j + b_r), r = clip(j - i, -R, R) + R, tables a, b of
    2 R + 1 vectors shared by the heads of a layer.
Paper: Self-attention with relative position representations, 2018, arXiv 1803.02155.
Differs: distances of sequences only, not the edge labels of a graph.
Cost: train O(T²) time, masked pairs too, in plain XLA, some query rows at a time; no [T, T, H] array: products with
    the tables are picked from, weights are summed by distance. Decode keeps 2 K H numbers a token.
"""

import dataclasses

import jax.numpy as jnp

from attnx.nn import attention, normal, param, relative
from attnx.ops.weighted_attention import by_rows, evaluate, index_of, num_rows, products, read, thinned
from attnx.spec import Context, Dims, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    position: str = 'none'  # rope may be added: rope, none
    max_distance: int = 16  # R: distances beyond it share a vector
    values: bool = True  # a table for values too

    def __post_init__(self):
        super().__post_init__()
        if self.max_distance < 1:
            raise ValueError(f'max_distance {self.max_distance} must be at least 1')


class RelativeAttention(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        shape = (2 * config.max_distance + 1, self.head_dim)
        table = lambda: param(normal(rngs, shape, self.head_dim**-0.5, dims.param_dtype), (None, 'head_dim'))
        self.key_table, self.value_table = table(), table() if config.values else None

    def attend(self, query, keys, ctx: Context):
        (batch, length, n, width), size, reach = query.shape, keys.length, self.config.max_distance
        key, value = (a.astype(query.dtype) for a in keys.arrays)
        mask, score, weights = self.core.mask(keys), self.core.score(keys), self.core.weights()
        scale, dropout = self.config.scale or width**-0.5, self.core.dropout(ctx)

        def step(carry, first, q):
            i = index_of(batch, q.shape[1], length, size, n, first)
            bucket = jnp.clip(relative.distances(keys, i), -reach, reach)[0, 0] + reach
            # A product rather than a gather, whose gradient would add in any order on an accelerator.
            hot = (bucket[..., None] == jnp.arange(2 * reach + 1)).astype(q.dtype)
            far = jnp.einsum('btnh,lh->bntl', q, self.key_table[...].astype(q.dtype))
            s = products(q, key, scale)
            s = s + scale * jnp.einsum('bntl,tsl->bnts', far, hot, preferred_element_type=jnp.float32)
            w = thinned(weights(evaluate(score, i, s), evaluate(mask, i), i), i, dropout)
            out = read(w, value)
            if self.value_table is not None:
                summed = jnp.einsum('bnts,tsl->bntl', w.astype(q.dtype), hot)
                out = out + jnp.einsum('bntl,lh->btnh', summed, self.value_table[...].astype(q.dtype))
            return carry, out

        return by_rows(step, (), query, num_rows(size * (batch * n + 2 * reach + 1), length))[1]


SPEC = Spec(
    module=RelativeAttention,
    config=Config,
    paper='1803.02155',
    state='kv',
    example=Config(num_heads=4, num_kv_heads=2, max_distance=3),
    flops=attention.flops_of_all_pairs,
)
