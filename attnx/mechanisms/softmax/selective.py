"""Selective attention: tokens decide which earlier tokens later ones no longer need; a decoding cache may drop those.

Equation: o_t = sum_s softmax_s(X_ts - F_ts) v_s, X = scale q . k, F_ts = sum_{r < t} relu(X_rs of head 0), in all heads;
    nothing hides the first token of a document or, for itself, the token that hides.
Paper: Selective attention improves transformer, 2024, arXiv 2410.02703.
Differs: query heads may share key/value heads. With a `budget`, a layer's cache keeps that many keys while decoding: those
    of least F, the newest of equals, and always the first; training and the prompt's own outputs use all. The memory
    loss is weight max_t sum_s (1 - min(F_ts, 1)) / (tokens x layers), a mean over rows.
Cost: train O(T²) time, masked pairs too, O(T²/256) memory for F between blocks of rows (`selective_attention`, XLA); decode
    keeps and reads 2 K H + 1 numbers a token, of `budget` tokens at most.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx import ops
from attnx.nn import Cache, Keys, attention, merge_heads, positions, softmax
from attnx.nn.state import starts
from attnx.spec import Context, Dims, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    budget: int = 0  # keys that decoding keeps; 0: all
    memory_weight: float = 0.0  # of the memory loss, which makes tokens hide more; 0.1 in the paper

    def __post_init__(self):
        super().__post_init__()
        softmax.refuse(self, 'selective attention has no learned logit in its denominator', 'sinks')
        if self.budget < 0 or self.memory_weight < 0:
            raise ValueError(f'budget {self.budget} and memory_weight {self.memory_weight} must not be negative')
        if self.budget and (self.masks or any(name in ('alibi', 't5') for name, *_ in self.scores)):
            raise ValueError('budget: a cache with gaps has no masks and scores of distances; rope is in its keys')


def _state(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


@_state
class Whole:
    """All keys, and how much each is hidden."""

    cache: Cache
    hidden: jax.Array  # F, float32 [B, capacity]


@_state
class Pruned:
    """The keys that were kept."""

    arrays: tuple[jax.Array, ...]  # key and value, [B, budget, K, H]
    hidden: jax.Array  # F, float32 [B, budget]
    ids: jax.Array  # int32 [B, budget]: documents; 0 = empty
    slots: jax.Array  # int32 [B, budget]: which token of the row it is; below 0 = empty
    first: jax.Array  # bool [B, budget]: the first of its document
    index: jax.Array  # int32 []: tokens seen
    segment: jax.Array  # int32 [B]: document of the last token


class SelectiveAttention(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        self.num_layers = dims.num_layers

    def init_state(self, batch, capacity, dtype=None):
        room = min(self.config.budget or capacity, capacity)
        hidden = jnp.zeros((batch, room), jnp.float32)
        if not self.config.budget:
            return Whole(cache=super().init_state(batch, capacity, dtype), hidden=hidden)
        shape, integers = (batch, room, self.num_kv_heads, self.head_dim), jnp.zeros((batch, room), jnp.int32)
        return Pruned(
            arrays=(jnp.zeros(shape, dtype or self.dtype),) * 2,
            hidden=hidden,
            ids=integers,
            slots=integers - 1,
            first=integers > 0,
            index=jnp.zeros((), jnp.int32),
            segment=jnp.zeros((batch,), jnp.int32),
        )

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query, key, value = self.project(x)
        hidden = None if state is None else state.hidden
        if isinstance(state, Pruned):
            query, keys, first, hidden = self.join(query, key, value, ctx, state)
        else:
            query, keys, cache = self.core.extend(query, key, (value,), ctx, state and state.cache)
            ids = jnp.ones((1, keys.length), jnp.int32) if keys.key_ids is None else keys.key_ids
            first = jnp.arange(keys.length) == starts(ids)
        slots = None if keys.query_slots is None else (keys.query_slots, keys.key_slots)
        normalizers = ops.normalizers
        found = ops.selective_attention(
            query,
            *(a.astype(query.dtype) for a in keys.arrays),
            slots=slots,
            protected=first,
            hidden=hidden,
            mask=self.core.mask(keys),
            score=self.core.score(keys),
            scale=self.config.scale or None,
            weights=normalizers.off_by_one if self.config.off_by_one else normalizers.softmax,
            dropout=self.core.dropout(ctx),
            impl=ctx.impl,
        )
        aux = {}
        if self.config.memory_weight:
            real = x.shape[1] if ctx.segment_ids is None else jnp.maximum((ctx.segment_ids > 0).sum(1), 1)
            aux['memory_loss'] = self.config.memory_weight / self.num_layers * jnp.mean(found.kept / real)
        if isinstance(state, Pruned):
            state = prune(state, keys, first, found.hidden)
        elif state is not None:
            state = Whole(cache=cache, hidden=found.hidden)
        return Output(self.out(merge_heads(found.out)), state, aux)

    def join(self, query, key, value, ctx, state):
        """The kept keys, then the new ones: (query, keys, which are first of their document, F)."""
        batch, length = query.shape[:2]
        ids = ctx.segment_ids
        if ids is None:  # the document of the last token goes on
            ids = jnp.broadcast_to(jnp.maximum(state.segment, 1)[:, None], (batch, length))
        ctx = dataclasses.replace(ctx, positions=positions(ctx, length, state.index))
        query, new, _ = self.core.extend(query, key, (value,), ctx)
        first = jnp.diff(ids, axis=1, prepend=state.segment[:, None]) != 0
        own = jnp.broadcast_to(state.index + jnp.arange(length), (batch, length))
        both = lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1)
        keys = Keys(
            arrays=tuple(map(both, state.arrays, new.arrays)),
            query_ids=ids,
            key_ids=both(state.ids, ids),
            query_slots=own,
            key_slots=both(state.slots, own),
        )
        return query, keys, both(state.first, first), both(state.hidden, jnp.zeros(ids.shape))


def prune(state: Pruned, keys: Keys, first, hidden) -> Pruned:
    """Keeps the keys of least F, in order of time; none of earlier documents."""
    assert keys.query_ids is not None and keys.key_ids is not None and keys.key_slots is not None
    segment = keys.query_ids[:, -1]
    real = (keys.key_slots >= 0) & (keys.key_ids == segment[:, None]) & (keys.key_ids > 0)
    cost = jnp.where(real, jnp.where(first, -1.0, hidden), jnp.inf)
    room = state.ids.shape[1]
    newest = jax.lax.top_k(-cost[:, ::-1], room)[1]  # of equals the first: the newest of the flipped
    kept = jnp.sort(cost.shape[1] - 1 - newest, axis=1)
    take = lambda a: jnp.take_along_axis(a, kept.reshape(*kept.shape, *[1] * (a.ndim - 2)), axis=1)
    real = take(real)
    return Pruned(
        arrays=tuple(map(take, keys.arrays)),
        hidden=jnp.where(real, take(hidden), 0),
        ids=jnp.where(real, take(keys.key_ids), 0),
        slots=jnp.where(real, take(keys.key_slots), -1),
        first=take(first) & real,
        index=state.index + keys.query_ids.shape[1],
        segment=segment,
    )


SPEC = Spec(
    module=SelectiveAttention,
    config=Config,
    paper='2410.02703',
    ops=('selective_attention',),
    state='kv',
    causal='causal',
    example=Config(num_heads=4, num_kv_heads=2, memory_weight=0.1),
    flops=attention.flops_of_all_pairs,
)
