"""Relative position representations: a learned vector for every clipped distance, added to keys and to values.

Equation: s_ij = scale q_i . (k_j + a_r), o_i = sum_j softmax_j(s_ij) (v_j + b_r), r = clip(j - i, -R, R) + R, tables a, b of
    2 R + 1 vectors shared by the heads of a layer.
Paper: Self-attention with relative position representations, 2018, arXiv 1803.02155.
Differs: distances of sequences only, not the edge labels of a graph.
Cost: train O(T²) time, masked pairs too, in plain XLA, a block of 128 query rows at a time; no [T, T, H] array: products
    with the tables are picked from, weights are summed by distance. Decode keeps 2 K H numbers a token.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx.nn import attention, dropout, normal, param, relative
from attnx.ops import rows
from attnx.ops.weighted_attention import index_of
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
        config, length = self.config, query.shape[1]
        key, value = (jnp.repeat(a.astype(query.dtype), query.shape[2] // self.num_kv_heads, axis=2) for a in keys.arrays)
        mask, score, scale = self.core.mask(keys), self.core.score(keys), config.scale or self.head_dim**-0.5
        sinks = self.core.sinks()
        reach = config.max_distance

        def run(q, first):
            i = index_of(1, q.shape[1], length, key.shape[1], 1, first)
            bucket = jnp.clip(relative.distances(keys, i), -reach, reach)[0, 0] + reach
            # A product rather than a gather, whose gradient would add in any order on an accelerator.
            hot = (bucket[..., None] == jnp.arange(2 * reach + 1)).astype(q.dtype)
            s = rows.logits(q, key, scale)
            far = jnp.einsum('btnh,lh->bntl', q, self.key_table[...].astype(q.dtype))
            s = s + scale * jnp.einsum('bntl,tsl->bnts', far, hot, preferred_element_type=jnp.float32)
            w = rows.softmax(rows.finish(s, mask, score, first, length), sinks)
            w = dropout(w, config.dropout, None if ctx.key is None else jax.random.fold_in(ctx.key, first)).astype(q.dtype)
            out = jnp.einsum('bnts,bsnh->btnh', w, value)
            if self.value_table is not None:
                summed = jnp.einsum('bnts,tsl->bntl', w, hot)
                out = out + jnp.einsum('bntl,lh->btnh', summed, self.value_table[...].astype(q.dtype))
            return out

        return rows.by_rows(run, query)


SPEC = Spec(
    module=RelativeAttention,
    config=Config,
    paper='1803.02155',
    state='kv',
    example=Config(num_heads=4, num_kv_heads=2, max_distance=3),
    flops=attention.flops_of_all_pairs,
)
