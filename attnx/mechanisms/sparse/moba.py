"""Mixture of block attention: every query reads its own block and the few past blocks whose mean key suits it best.

Equation: o_t = sum_{s in R_t} softmax_s(scale q_t . k_s) v_s, R_t = {s <= t: block(s) = block(t) or block(s) in top_t};
    top_t = the top_k - 1 complete past blocks i of largest q_t . mean_{s in i} k_s, chosen per query head in float32.
Paper: MoBA: mixture of block attention for long-context LLMs, 2025, arXiv 2502.13189.
Differs: top_k = 1 is attention inside the own block, where the released code falls back to full attention.
Cost: train N T² / b gates (H products each), then, in the fused op, the tiles that hold a chosen block: others are skipped,
    so all causal tiles at worst; the mask is O(T top_k) numbers, no [T, S] array exists. Decode keeps and reads 2 K H
    numbers a token, as full attention does: there the choice is a mask over the cache.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx import ops
from attnx.nn import attention, softmax
from attnx.nn.state import starts
from attnx.spec import Context, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    block: int = 512  # b: tokens of a block
    top_k: int = 3  # blocks that a query reads, its own included

    def __post_init__(self):
        super().__post_init__()
        if self.block < 1 or self.top_k < 1:
            raise ValueError(f'block {self.block} and top_k {self.top_k} must be at least 1')


def _routed(i, own, block, *chosen):
    seen = i.k >= own
    for c in chosen:
        seen = seen | (block == c)
    return seen


def route(query: jax.Array, keys, block: int, top_k: int) -> ops.masks.Mask:
    """The mask of own and chosen blocks, to be joined with causality and documents.

    Args:
      query: [B, T, N, H].
      keys: `nn.Keys` whose first array is [B, S, K, H].
    """
    key = keys.arrays[0]
    batch, length, num_kv_heads, _ = key.shape
    ids = jnp.ones((batch, length), jnp.int32) if keys.key_ids is None else keys.key_ids
    index = jnp.arange(length)
    first = starts(ids)  # of each token's document
    own = index - (index - first) % block  # first token of each token's block
    last = index - own == block - 1  # a token that completes a block
    # Complete blocks are numbered along the row, and tokens up to the end of block i bear number i. Tokens of an
    # incomplete block bear the number of a later document's block, which the mask of documents keeps apart.
    number = jnp.cumsum(last, axis=1) - last
    blocks = length // block
    own_of_query = keys.of_queries(own)
    chosen = ()
    if min(top_k - 1, blocks):
        end = jax.vmap(lambda row: jnp.nonzero(row, size=blocks, fill_value=length)[0])(last)  # [B, blocks]
        members = jnp.maximum(end[:, :, None] - jnp.arange(block), 0).reshape(batch, -1)
        members = jnp.take_along_axis(jax.lax.stop_gradient(key), members[:, :, None, None], axis=1, mode='clip')
        mean = members.reshape(batch, blocks, block, num_kv_heads, -1).astype(jnp.float32).mean(axis=2)
        grouped = jax.lax.stop_gradient(query).astype(jnp.float32)
        grouped = grouped.reshape(*query.shape[:2], num_kv_heads, -1, query.shape[-1])
        gate = jnp.einsum('btkgh,bikh->bkgti', grouped, mean, precision='highest')
        gate = gate.reshape(batch, -1, *gate.shape[3:])  # [B, N, T, blocks]
        past = (end[:, None] >= keys.of_queries(first)[:, :, None]) & (end[:, None] < own_of_query[:, :, None])
        best, which = jax.lax.top_k(jnp.where(past[:, None], gate, -jnp.inf), min(top_k - 1, blocks))
        which = jnp.where(best > -jnp.inf, which, -1)
        chosen = tuple(ops.masks.Operand(which[..., j], 'bhq') for j in range(which.shape[-1]))
    rows = ops.masks.Operand(own_of_query, 'bq'), ops.masks.Operand(number, 'bk')
    return ops.masks.Mask(_routed, (*rows, *chosen))


class MixtureOfBlockAttention(attention.Attention):
    def attend(self, query, keys, ctx: Context):
        mask = self.core.mask(keys) & route(query, keys, self.config.block, self.config.top_k)
        return self.core.attend(query, *keys.arrays, ctx, mask, self.core.score(keys))


def _flops(config, dims, length):
    head_dim = config.head_dim or dims.width // config.num_heads
    gate = config.num_heads * head_dim * length / config.block
    # softmax.flops halves the keys of a causal model; half of the own block is read, and all of the chosen.
    return gate + softmax.flops(config.num_heads, head_dim, dims, min(length, config.block * (2 * config.top_k - 1)))


SPEC = Spec(
    module=MixtureOfBlockAttention,
    config=Config,
    paper='2502.13189',
    ops=('softmax_attention',),
    state='kv',
    causal='causal',
    example=Config(num_heads=4, num_kv_heads=2, block=4, top_k=3),
    flops=_flops,
)
