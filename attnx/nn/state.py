"""States that several mechanisms share, and the one rule for documents in them.

Segment ids number the documents of a packed row; 0 is padding. A state remembers the segment of its last token, so that
a recurrence that goes on in another document starts from zero. Ragged prompts are padded on the left.
"""

import dataclasses
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
from jax import core

from attnx.spec import Context


@dataclass_transform(frozen_default=True, kw_only_default=True)
def _dataclass(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


@_dataclass
class Recurrent:
    """State of a recurrence."""

    memory: Any  # pytree of arrays [B, …]: matrix or vector states (float32), convolution windows
    segment: jax.Array  # int32 [B]: document of the last token; 0 before the first

    @classmethod
    def init(cls, memory: Any) -> 'Recurrent':
        batch = jax.tree.leaves(memory)[0].shape[0]
        return cls(memory=memory, segment=jnp.zeros((batch,), jnp.int32))

    def resume(self, ctx: Context, batch: int, length: int) -> tuple[Any, jax.Array]:
        """(memory to go on from: zero in rows that begin another document, segment ids [B, T])."""
        ids = ctx.segment_ids
        if self.segment.shape[0] != batch:
            raise ValueError(f'the state has {self.segment.shape[0]} rows, the input {batch}')
        if ids is None:  # the document of the last token goes on
            ids = jnp.broadcast_to(jnp.maximum(self.segment, 1)[:, None], (batch, length))
        same = self.segment == ids[:, 0]
        kept = lambda m: jnp.where(same.reshape(-1, *[1] * (m.ndim - 1)), m, 0).astype(m.dtype)
        return jax.tree.map(kept, self.memory), ids

    def advance(self, memory: Any, ids: jax.Array) -> 'Recurrent':
        memory = jax.tree.map(lambda new, old: new.astype(old.dtype), memory, self.memory)
        return Recurrent(memory=memory, segment=ids[:, -1])


def starts(ids: jax.Array) -> jax.Array:
    """The index of the first token of each token's document: int32 [B, T] -> [B, T]."""
    first = jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0
    return jax.lax.cummax(jnp.where(first, jnp.arange(ids.shape[1]), 0), axis=1)


def running_sum(x: jax.Array, ids: jax.Array, start: jax.Array | int = 0) -> jax.Array:
    """Sums of x [B, T, C] from the begin of each token's document on; those of the first document begin at `start` [B, C]."""
    fresh = jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0
    join = lambda a, b: (a[0] | b[0], jnp.where(b[0], b[1], a[1] + b[1]))
    return jax.lax.associative_scan(join, (fresh[:, :, None], x.at[:, 0].add(start)), axis=1)[1]


@_dataclass
class Keys:
    """What a query block attends to. Slots are absolute token indices; None: queries and keys are the same tokens."""

    arrays: tuple[jax.Array, ...]  # each [B, S, …]
    query_ids: jax.Array | None  # int32 [B, T]
    key_ids: jax.Array | None  # int32 [B, S], 0 = empty or padding
    query_slots: jax.Array | None = None  # int32 [1, T], consecutive
    key_slots: jax.Array | None = None  # int32 [1, S], consecutive if T > 1; below 0 = empty

    @property
    def length(self) -> int:
        return self.arrays[0].shape[1]

    def of_last(self, length: int) -> 'Keys':
        """The same keys as the last `length` queries see them."""
        cut = lambda a: None if a is None else a[:, -length:]
        return dataclasses.replace(self, query_ids=cut(self.query_ids), query_slots=cut(self.query_slots))

    def of_queries(self, per_key: jax.Array) -> jax.Array:
        """[B, S] -> [B, T]: the entries of the queries' own keys, where slots are indices into the arrays."""
        if self.query_slots is None:
            return per_key
        length = self.query_slots.shape[1]
        return jax.lax.dynamic_slice_in_dim(per_key, self.query_slots[0, 0], length, axis=1)

    def in_documents(self) -> tuple[jax.Array | None, jax.Array | None]:
        """Positions inside the documents: queries' int32 [B, T] and keys' [B, S]; not of a ring, which forgets them."""
        if self.key_ids is None:
            return self.query_slots, self.key_slots
        where = jnp.arange(self.length) - starts(self.key_ids)
        return self.of_queries(where), where

    def distances(self) -> jax.Array | None:
        """int32 [T + S - 1]: key minus query slot as a strip, entry k - q + (T - 1); None without slots."""
        if self.query_slots is None:
            return None
        queries, keys = self.query_slots[0], self.key_slots[0]
        ahead = jnp.arange(1 - queries.size, 0) + keys[0]
        return jnp.concatenate([ahead, keys]) - queries[0]


@_dataclass
class Cache:
    """Arrays of past tokens with room for `capacity`; a ring where it must hold only the last `capacity`."""

    arrays: tuple[jax.Array, ...]  # each [B, capacity, …], such as keys and values, or a latent
    segment_ids: jax.Array  # int32 [B, capacity], 0 = empty or padding
    index: jax.Array  # int32 []: tokens seen
    ring: bool = dataclasses.field(default=False, metadata={'static': True})

    @classmethod
    def init(cls, batch: int, capacity: int, shapes: tuple[tuple[int, ...], ...], dtype, ring: bool = False) -> 'Cache':
        """dtype: of all arrays, or a tuple with one for each."""
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,) * len(shapes)
        return cls(
            arrays=tuple(jnp.zeros((batch, capacity, *s), d) for s, d in zip(shapes, dtypes)),
            segment_ids=jnp.zeros((batch, capacity), jnp.int32),
            index=jnp.zeros((), jnp.int32),
            ring=ring,
        )

    def segments(self, ctx: Context, length: int) -> jax.Array:
        """Segment ids [B, T] of new tokens; without any in the context the last document goes on."""
        if ctx.segment_ids is not None:
            return ctx.segment_ids
        batch, capacity = self.segment_ids.shape
        last = jnp.take_along_axis(self.segment_ids, jnp.full((batch, 1), (self.index - 1) % capacity), axis=1)
        return jnp.broadcast_to(jnp.maximum(last, 1), (batch, length))

    def extend(self, ctx: Context, arrays: tuple[jax.Array, ...]) -> tuple['Cache', Keys]:
        """Appends tokens [B, T, …].

        Raises:
          ValueError: there is no room, in a cache that is no ring. Under `jit`, where the number of tokens seen is not known,
            only more tokens than fit in all are refused; further ones would overwrite the last.
        """
        length, (batch, capacity) = arrays[0].shape[1], self.segment_ids.shape
        if arrays[0].shape[0] != batch:
            raise ValueError(f'the state has {batch} rows, the input {arrays[0].shape[0]}')
        seen = 0 if isinstance(self.index, core.Tracer) else int(self.index)
        if not self.ring and seen + length > capacity:
            raise ValueError(f'the state has room for {capacity} tokens, its capacity; {seen} were seen, {length} are given')
        ids = self.segments(ctx, length)
        new = tuple(a.astype(old.dtype) for a, old in zip(arrays, self.arrays))
        old = (*self.arrays, self.segment_ids)
        if not self.ring:
            write = lambda o, n: jax.lax.dynamic_update_slice_in_dim(o, n, self.index, axis=1)
            *stored, stored_ids = map(write, old, (*new, ids))
            keys = Keys(
                arrays=tuple(stored),
                query_ids=ids,
                key_ids=stored_ids,
                query_slots=(self.index + jnp.arange(length))[None],
                key_slots=jnp.arange(capacity)[None],
            )
        else:
            last = min(length, capacity)
            where = (self.index + jnp.arange(length - last, length)) % capacity
            *stored, stored_ids = (o.at[:, where].set(n[:, -last:]) for o, n in zip(old, (*new, ids)))
            if length == 1:  # the ring holds just the window: attend to it in place
                slots = self.index - (self.index - jnp.arange(capacity)) % capacity
                keys = Keys(
                    arrays=tuple(stored),
                    query_ids=ids,
                    key_ids=stored_ids,
                    query_slots=self.index[None, None],
                    key_slots=slots[None],
                )
            else:  # unrolled ring, then the new tokens: consecutive
                order = (self.index + jnp.arange(capacity)) % capacity
                *past, past_ids = (jnp.concatenate([o[:, order], n], axis=1) for o, n in zip(old, (*new, ids)))
                keys = Keys(
                    arrays=tuple(past),
                    query_ids=ids,
                    key_ids=past_ids,
                    query_slots=(self.index + jnp.arange(length))[None],
                    key_slots=(self.index + jnp.arange(-capacity, length))[None],
                )
        cache = dataclasses.replace(
            self, arrays=tuple(stored), segment_ids=stored_ids, index=self.index + length
        )
        return cache, keys


def attend_to(cache: Cache | None, ctx: Context, arrays: tuple[jax.Array, ...]) -> tuple[Cache | None, Keys]:
    """The cache's keys after these, or just these where there is no cache."""
    if cache is not None:
        return cache.extend(ctx, arrays)
    return None, Keys(arrays=arrays, query_ids=ctx.segment_ids, key_ids=ctx.segment_ids)


def positions(ctx: Context, length: int, start: jax.Array | int = 0) -> jax.Array:
    """int32 [B or 1, T]: the context's positions, or `start`, start + 1, …"""
    return ctx.positions if ctx.positions is not None else (start + jnp.arange(length))[None]
