"""Optimised, efficient and super attention: no value projection, no key projection either, and values mixed along time.

Equation: o_h = softmax(H^-1/2 q_h k_h^T) v_h, y = W_o [o_1 … o_N], X_h the h-th slice of the input's channels;
    optimised: k_h = W_k,h x, v_h = X_h;  efficient: k_h = v_h = X_h;  super: k_h = X_h, v_h = (W_a X)_h with W_a [L, L] over
    positions, lower triangular if causal.
Paper: You need to pay better attention: rethinking the mathematics of attention mechanism, 2024, arXiv 2403.01643.
Differs: positions enter as RoPE on queries and keys, where the paper adds them to the embeddings. W_a begins as the
    identity, so that super begins as efficient, and counts positions in a document.
Cost: train O(T²) time, O(T) memory through the fused op; super adds a product with W_a, [T, T] numbers, a row of them for
    packed documents. Decode keeps 2 M numbers a token, M where keys are values (efficient without RoPE and QK-norm),
    3 M for super.
"""

import dataclasses

import jax.numpy as jnp

from attnx.nn import Cache, Linear, attend_to, merge_heads, param, softmax, split_heads
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(softmax.Options):
    num_heads: int = 4  # N; divides the width
    layout: str = 'super'  # optimised: no W_v; efficient: no W_k either; super: efficient, values mixed by W_a
    max_length: int = 0  # L: longest document of super, the size of W_a; 0: the model's max_length

    def __post_init__(self):
        super().__post_init__()
        softmax.check_choice('layout', self.layout, ('optimised', 'efficient', 'super'))
        if self.layout != 'super':
            softmax.refuse(self, f'layout {self.layout!r} has no matrix over positions', 'max_length')


class SuperAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype, self.causal, width = config, dims.dtype, dims.causal, dims.width
        self.head_dim = softmax.heads_of(config.num_heads, 0, width)
        into = lambda: Linear(width, width, ('embed', 'heads'), dims, rngs=rngs)
        self.query, self.key = into(), into() if config.layout == 'optimised' else None
        self.length = config.max_length or dims.max_length
        whole = lambda: param(jnp.eye(self.length, dtype=dims.param_dtype), ('features', None))
        self.align = whole() if config.layout == 'super' else None
        self.out = Linear(width, width, ('heads', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)
        self.core = softmax.Core(config, dims, config.num_heads, self.head_dim, rngs=rngs)
        self.tied = config.layout == 'efficient' and config.position == 'none' and not config.qk_norm

    def init_state(self, batch, capacity, dtype=None):
        dtype, shape = dtype or self.dtype, (self.config.num_heads, self.head_dim)
        keys = self.core.init_state(batch, capacity, (shape,) * (1 if self.tied else 2), dtype)
        return keys if self.align is None else (keys, Cache.init(batch, capacity, (shape,), dtype))

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query, plain = (split_heads(a, self.config.num_heads) for a in (self.query(x), x.astype(self.dtype)))
        key = plain if self.key is None else split_heads(self.key(x), self.config.num_heads)
        cache, mixed = state if self.align is not None and state is not None else (state, None)
        query, keys, cache = self.core.extend(query, key, () if self.tied else (plain,), ctx, cache)
        key, value = keys.arrays[0], keys.arrays[-1]
        if self.align is not None:
            mixed, found = attend_to(mixed, ctx, (self.mix(value, keys, x.shape[1]),))
            (value,) = found.arrays
        out = self.core.attend(query, key, value, ctx, self.core.mask(keys), self.core.score(keys))
        state = None if state is None else cache if self.align is None else (cache, mixed)
        return Output(self.out(merge_heads(out)), state)

    def mix(self, value, keys, length: int):
        """W_a over the values [B, S, N, H] of each query's document -> [B, T, N, H]."""
        table = self.align[...].astype(jnp.float32)
        table = jnp.tril(table) if self.causal else table
        query, key = keys.in_documents()
        if query is None:
            if length > self.length:
                raise ValueError(f'super_attention mixes {self.length} positions, was given {length}; set max_length')
            return jnp.einsum('ts,bsnh->btnh', table[:length, :length].astype(value.dtype), value)
        weights = table.at[query[:, :, None], key[:, None]].get(mode='fill', fill_value=jnp.nan)
        same = (keys.query_ids[:, :, None] == keys.key_ids[:, None]) & (keys.key_ids[:, None] > 0)
        weights = jnp.where(same, weights, 0).astype(value.dtype)  # a document longer than W_a: NaN
        return jnp.einsum('bts,bsnh->btnh', weights, value)


def _flops(config, dims, length):
    mixing = 2 * dims.width * length / (2 if dims.causal else 1) if config.layout == 'super' else 0
    return mixing + softmax.flops(config.num_heads, dims.width // config.num_heads, dims, length)


SPEC = Spec(
    module=SuperAttention,
    config=Config,
    paper='2403.01643',
    ops=('softmax_attention',),
    state='kv',
    example=Config(num_heads=4),
    flops=_flops,
)
