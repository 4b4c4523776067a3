"""Relative position representations: a learned vector for every clipped distance, added to keys and to values.

Equation: s_ij = scale q_i . (k_j + a_r), o_i = sum_j softmax_j(s_ij) (v_j + b_r), r = clip(j - i, -R, R) + R, tables a, b of
    2 R + 1 vectors shared by the heads of a layer;  or r the label of the edge from i to j in a graph, of `labels` many.
Paper: Self-attention with relative position representations, 2018, arXiv 1803.02155.
Differs: nothing; labels are a side input, int32 [B, T, T], with which nothing can be decoded. A label that has no vectors of
    its own, below 0 say, adds nothing.
Cost: train O(T²) time, masked pairs too, in plain XLA, some query rows at a time; no [T, T, H] array: products with
    the tables are picked from, weights are summed by distance; labels are numbers for each pair, as they are given. Decode
    keeps 2 K H numbers a token.
"""

import dataclasses

import jax.numpy as jnp

from attnx.nn import attention, normal, param, relative, softmax
from attnx.ops.weighted_attention import by_rows, evaluate, index_of, num_rows, products, read, thinned
from attnx.spec import Context, Dims, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    position: str = 'none'  # rope may be added: rope, none
    max_distance: int = 16  # R: distances beyond it share a vector
    values: bool = True  # a table for values too
    labels: int = 0  # labels of edges, given as the side input 'edges', in place of distances; 0: distances

    def __post_init__(self):
        super().__post_init__()
        if self.max_distance < 1 or self.labels < 0:
            raise ValueError(f'max_distance {self.max_distance} must be at least 1, labels {self.labels} not negative')
        if self.labels:
            softmax.refuse(self, 'labels stand in place of distances', 'max_distance')


class RelativeAttention(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        self.entries = config.labels or 2 * config.max_distance + 1
        shape = (self.entries, self.head_dim)
        table = lambda: param(normal(rngs, shape, self.head_dim**-0.5, dims.param_dtype), (None, 'head_dim'))
        self.key_table, self.value_table = table(), table() if config.values else None

    def init_state(self, batch, capacity, dtype=None):
        return None if self.config.labels else super().init_state(batch, capacity, dtype)

    def attend(self, query, keys, ctx: Context):
        (batch, length, n, width), size, reach = query.shape, keys.length, self.config.max_distance
        key, value = (a.astype(query.dtype) for a in keys.arrays)
        mask, score, weights = self.core.mask(keys), self.core.score(keys), self.core.weights()
        scale, dropout = self.config.scale or width**-0.5, self.core.dropout(ctx)

        def step(carry, first, rows):
            q, *edges = rows
            i = index_of(batch, q.shape[1], length, size, n, first)
            bucket = edges[0] if edges else jnp.clip(relative.distances(keys, i), -reach, reach)[0] + reach
            # A product rather than a gather, whose gradient would add in any order on an accelerator.
            hot = (bucket[..., None] == jnp.arange(self.entries)).astype(q.dtype)  # [B or 1, t, S, L]
            hot = hot if edges else hot[0]
            letters = 'btsl' if edges else 'tsl'
            far = jnp.einsum('btnh,lh->bntl', q, self.key_table[...].astype(q.dtype))
            s = products(q, key, scale)
            s = s + scale * jnp.einsum(f'bntl,{letters}->bnts', far, hot, preferred_element_type=jnp.float32)
            w = thinned(weights(evaluate(score, i, s), evaluate(mask, i), i), i, dropout)
            out = read(w, value)
            if self.value_table is not None:
                summed = jnp.einsum(f'bnts,{letters}->bntl', w.astype(q.dtype), hot)
                out = out + jnp.einsum('bntl,lh->btnh', summed, self.value_table[...].astype(q.dtype))
            return carry, out

        edges = (ctx.side('edges'),) if self.config.labels else ()
        rows = num_rows(size * (batch * n + self.entries * (batch if edges else 1)), length)
        return by_rows(step, (), (query, *edges), rows)[1]


SPEC = Spec(
    module=RelativeAttention,
    config=Config,
    paper='1803.02155',
    state='kv',
    inputs={'edges': 'int32 B T T ?'},
    example=Config(num_heads=4, num_kv_heads=2, max_distance=3),
    variants={'labels': {'max_distance': 16, 'labels': 3}},
    flops=attention.flops_of_all_pairs,
)
