"""Selective multi-head attention: every token goes to some of the heads, and a head attends among the tokens it got.

Equation: p_t = softmax(W_g x_t + b), token t goes to the K heads of largest p;  in head h, over the tokens s that went there,
    o_th = sum_s softmax_s(H^-1/2 q_th . k_sh) v_sh, RoPE counting those tokens;  y_t = sum_{h of t} W_o,h o_th.
Paper: Union of experts (UoE): adapting hierarchical routing to equivalently decomposed transformer, 2025, arXiv 2503.02495.
Differs: the released gate only selects and so is not trained; here a chosen head's output carries p's gradient at factor 1
    (straight-through). Unselected tokens are masked, not attended as padding. The MLP experts of the paper
    are `model.mlp` of kind 'moe' with `gates` = 'select'.
Cost: train in packed rows: a head's share of the T² pairs is (K / N)² where tokens spread evenly, the fullest head and row
    deciding; O(T) memory through the fused op, whose empty tiles are skipped. Decode keeps 2 N H numbers a token, as if
    each went to all heads, and masks.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx import ops
from attnx.nn import Cache, Linear, Recurrent, merge_heads, routing, softmax, split_heads
from attnx.nn.state import running_sum
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_heads: int = 4  # N
    top_k: int = 0  # K: heads of a token; 0: half of them
    head_dim: int = 0  # H; 0: width / num_heads
    rope_base: float = 10_000.0  # of RoPE over a head's own tokens; 0: no position

    def __post_init__(self):
        if not 0 <= self.top_k <= self.num_heads or self.num_heads < 1:
            raise ValueError(f'top_k {self.top_k} is not in 0 … num_heads {self.num_heads}')
        if self.rope_base != 0 and self.rope_base <= 1:
            raise ValueError(f'rope_base {self.rope_base} must exceed 1, or be 0')


def _chosen(i, query, key):
    return query & key


class SelectiveMultiHeadAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype, self.causal = config, dims.dtype, dims.causal
        self.head_dim = softmax.heads_of(config.num_heads, config.head_dim, dims.width)
        wide = config.num_heads * self.head_dim
        into = lambda: Linear(dims.width, wide, ('embed', 'heads'), dims, rngs=rngs)
        self.query, self.key, self.value = into(), into(), into()
        self.out = Linear(wide, dims.width, ('heads', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)
        exact = dataclasses.replace(dims, dtype=jnp.float32)
        self.router = Linear(dims.width, config.num_heads, ('embed', None), exact, rngs=rngs, bias=True)

    def init_state(self, batch, capacity, dtype=None):
        dtype, n = dtype or self.dtype, self.config.num_heads
        cache = Cache.init(batch, capacity, ((n, self.head_dim),) * 2 + ((n,),), (dtype, dtype, jnp.bool_))
        return Recurrent.init(jnp.zeros((batch, n), jnp.int32)), cache

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query, key, value = (split_heads(f(x), self.config.num_heads) for f in (self.query, self.key, self.value))
        probs = jax.nn.softmax(self.router(x))
        chosen = routing.top_k(probs, self.config.top_k or max(self.config.num_heads // 2, 1))[1]
        if state is None:
            ids = jnp.ones(x.shape[:2], jnp.int32) if ctx.segment_ids is None else ctx.segment_ids
            count = running_sum(chosen.astype(jnp.int32), ids)
            out = self.packed(self.rotate(query, count), self.rotate(key, count), value, chosen, ids, ctx.impl)
        else:
            counts, cache = state
            start, ids = counts.resume(ctx, *x.shape[:2])
            count = running_sum(chosen.astype(jnp.int32), ids, start)
            cache, keys = cache.extend(ctx, (self.rotate(key, count), value, chosen))
            out = self.masked(self.rotate(query, count), chosen, keys, ctx.impl)
            state = counts.advance(count[:, -1], ids), cache
        straight = jnp.where(chosen, 1 + probs - jax.lax.stop_gradient(probs), 0)
        return Output(self.out(merge_heads(out * straight[..., None].astype(out.dtype))), state)

    def rotate(self, x, count):
        """RoPE of [B, T, N, H], each head at its own positions count [B, T, N]."""
        if not self.config.rope_base:
            return x
        rows = jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], 1, x.shape[3])
        where = jnp.moveaxis(count, 2, 1).reshape(-1, x.shape[1])
        turned = ops.positions.rope(rows, where, base=self.config.rope_base)
        return jnp.moveaxis(turned.reshape(x.shape[0], x.shape[2], x.shape[1], -1), 1, 2)

    def packed(self, query, key, value, chosen, ids, impl):
        """Each head's tokens moved to the front of a row of its own; the rest is padding, whose tiles are skipped."""
        batch, length, n, _ = query.shape
        chosen = jnp.moveaxis(chosen & (ids > 0)[:, :, None], 2, 1)  # [B, N, T]
        order = jnp.argsort(~chosen, axis=2, stable=True)

        def pack(a):
            return jnp.take_along_axis(jnp.moveaxis(a, 2, 1), order[..., None], axis=2).reshape(batch * n, length, 1, -1)

        rows = jnp.where(chosen, ids[:, None], 0)
        rows = jnp.take_along_axis(rows, order, axis=2).reshape(batch * n, length)
        mask = ops.masks.segments(rows)
        mask = ops.masks.causal() & mask if self.causal else mask
        out = ops.softmax_attention(pack(query), pack(key), pack(value), mask=mask, impl=impl)
        back = jnp.argsort(order, axis=2)
        out = jnp.take_along_axis(out.reshape(batch, n, length, -1), back[..., None], axis=2)
        return jnp.moveaxis(out, 1, 2)

    def masked(self, query, chosen, keys, impl):
        """The same among the tokens of a cache, in place."""
        key, value, theirs = keys.arrays
        heads = lambda a: jnp.moveaxis(a, 2, 1)
        rows = ops.masks.Operand(heads(chosen), 'bhq'), ops.masks.Operand(heads(theirs), 'bhk')
        mask = ops.masks.segments(keys.query_ids, keys.key_ids) & ops.masks.Mask(_chosen, rows)
        mask = ops.masks.causal(keys.query_slots, keys.key_slots) & mask if self.causal else mask
        key, value = (a.astype(query.dtype) for a in (key, value))
        return ops.softmax_attention(query, key, value, mask=mask, impl=impl)


def _flops(config, dims, length):
    n = config.num_heads
    share = (config.top_k or max(n // 2, 1)) / n
    return share**2 * softmax.flops(n, config.head_dim or dims.width // n, dims, length)


SPEC = Spec(
    module=SelectiveMultiHeadAttention,
    config=Config,
    paper='2503.02495',
    ops=('softmax_attention',),
    state='kv',
    example=Config(num_heads=4),
    flops=_flops,
)
