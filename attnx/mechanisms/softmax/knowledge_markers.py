"""Disentangled attention with knowledge markers: scores of content, relative position, and tokens that a graph knows.

Equation: s_ij = (q_i . k_j + q_i . P_d(i,j) + k_j . R_d(j,i) + m_j q_i . A + m_i k_j . B) / sqrt(H n),
    o_i = sum_j softmax_j(s_ij) v_j;  d(i,j) = clip(i - j + span, 0, 2 span - 1), tables P and R [2 span, H] per head;
    m marks known tokens; n terms.
Paper: Cross-domain aspect extraction using transformers augmented with knowledge graphs, 2022, arXiv 2210.10144;
    DeBERTa: decoding-enhanced BERT with disentangled attention, 2020, arXiv 2006.03654.
Differs: the marker terms A and B (0 at the start) are ours, as the paper does not give its equation; so is learning P, R, A
    and B themselves, not projections of shared tables. Finding known phrases, and its other
    way, pivot tokens after them, are work on the data: `attnx.tasks.knowledge`. Causal models too.
Cost: train O(T²) time, masked pairs too, O(T span) memory a head, and some rows of pairs at a time (`weighted_attention`,
    XLA; no fused kernel, which can not gather by distance); decode keeps 2 K H + 1 numbers a token.
"""

import dataclasses

import jax.numpy as jnp

from attnx import ops
from attnx.nn import attention, merge_heads, normal, param, softmax
from attnx.ops.weighted_attention import products
from attnx.spec import Context, Dims, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    position: str = 'none'  # rope, none: the tables know distances
    span: int = 512  # distances told apart on each side; 0: none, content and markers alone
    markers: bool = True  # the marker terms, which read the side input 'markers': above 0 is known
    keep_scale: bool = False  # count no marker terms in n, so that unmarked text is scored as without them

    def __post_init__(self):
        super().__post_init__()
        softmax.refuse(self, 'disentangled attention has no learned logit in its denominator', 'sinks')
        if self.span < 0:
            raise ValueError(f'span {self.span} is negative')
        if self.keep_scale and not self.markers:
            raise ValueError('keep_scale leaves marker terms out of n: there are none without markers')


class DisentangledAttention(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        n, k, h = config.num_heads, self.num_kv_heads, self.head_dim
        table = lambda m, axis: param(normal(rngs, (2 * config.span, m, h), 0.02, dims.param_dtype), (None, axis, 'head_dim'))
        self.far_keys, self.far_queries = (table(k, 'kv_heads'), table(n, 'heads')) if config.span else (None, None)
        mark = lambda m, axis: param(jnp.zeros((m, h), dims.param_dtype), (axis, 'head_dim'))
        self.known_key, self.known_query = (mark(n, 'heads'), mark(n, 'heads')) if config.markers else (None, None)
        terms = 1 + 2 * (config.span > 0) + 2 * (config.markers and not config.keep_scale)
        self.scale = (h * terms) ** -0.5

    def init_state(self, batch, capacity, dtype=None):
        shape = (self.num_kv_heads, self.head_dim)
        return self.core.init_state(batch, capacity, (shape, shape, ()), dtype or self.dtype)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query, key, value = self.project(x)
        known = (ctx.side('markers') > 0).astype(x.dtype) if self.config.markers else jnp.zeros(x.shape[:2], x.dtype)
        query, keys, state = self.core.extend(query, key, (value, known), ctx, state)
        key, value, known_keys = keys.arrays
        first = 0 if keys.query_slots is None else keys.query_slots[0, 0]
        scale = self.config.scale or self.scale
        logits = lambda q, k, i: scale * self.compare(*q, *k, first + i.q[0, 0, :, 0], i.k[0, 0, 0])
        normalizer = ops.normalizers.off_by_one if self.config.off_by_one else ops.normalizers.softmax
        out = ops.weighted_attention(
            (query, known),
            (key.astype(query.dtype), known_keys.astype(query.dtype)),
            value.astype(query.dtype),
            weights=normalizer,
            logits=logits,
            mask=self.core.mask(keys),
            score=self.core.score(keys),
            dropout=self.core.dropout(ctx),
            impl=ctx.impl,
        )
        return Output(self.out(merge_heads(out)), state)

    def compare(self, query, known, key, known_keys, at, where):
        """Summed terms [B, N, t, S] of queries at [t] and keys at [S]."""
        n, cast = self.config.num_heads, lambda p: p[...].astype(query.dtype)
        found, wide = products(query, key, 1.0), jnp.repeat(key, n // key.shape[2], axis=2)
        if self.config.span:
            span = self.config.span
            ahead = jnp.clip(at[:, None] - where + span, 0, 2 * span - 1)  # d(i, j), [t, S]
            behind = jnp.clip(where[:, None] - at + span, 0, 2 * span - 1)  # d(j, i), [S, t]
            far = jnp.repeat(cast(self.far_keys), n // key.shape[2], axis=1)
            reads = jnp.einsum('btnh,dnh->bntd', query, far, preferred_element_type=jnp.float32)
            tells = jnp.einsum('bsnh,dnh->bnsd', wide, cast(self.far_queries), preferred_element_type=jnp.float32)
            take = lambda table, d: jnp.take_along_axis(table, jnp.broadcast_to(d, (*table.shape[:2], *d.shape)), axis=-1)
            found = found + take(reads, ahead) + jnp.swapaxes(take(tells, behind), 2, 3)
        if self.config.markers:
            reads = jnp.einsum('btnh,nh->bnt', query, cast(self.known_key), preferred_element_type=jnp.float32)
            tells = jnp.einsum('bsnh,nh->bns', wide, cast(self.known_query), preferred_element_type=jnp.float32)
            found = found + reads[..., None] * known_keys[:, None, None] + tells[:, :, None] * known[:, None, :, None]
        return found


SPEC = Spec(
    module=DisentangledAttention,
    config=Config,
    paper='2210.10144',
    ops=('weighted_attention',),
    state='kv',
    inputs={'markers': 'int32 B T'},
    example=Config(num_heads=4, num_kv_heads=2, span=6),
    flops=lambda config, dims, length: 2 * attention.flops_of_all_pairs(config, dims, length),
)
