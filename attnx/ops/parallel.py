"""Ops on a mesh: every device runs the op on its own rows, heads and tokens, and sends what the others' tokens need.

`run` stands between an op and `attnx.dispatch`. Inside `attnx.sharding.use`, where several devices share the work, it wraps
the op in `jax.shard_map` over all axes of the mesh (kernels want that too) and calls the op itself on each device's part. Rows
and heads are independent. Tokens, cut over the context axis, are not:

    softmax attention   `attnx.ops.context_attention`: keys gathered, keys passed round a ring, or heads for tokens
    recurrences         each device runs from the zero state; ONE all-gather of all devices' last states and of what each
                        device's tokens do to a state, and every device knows the state its first token finds
                        (LASP-2, arXiv:2502.07563)
    short convolution   the last W - 1 values of the device before (a halo)

A recurrence is linear in its first state: out = out_0 + R S and S' = S'_0 + A S, with R and A known from keys and decays.
For `gated_linear` they are decays. For `delta_rule` they are what the same op makes of the identity as first state, without
values: two calls on the part instead of one.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from attnx import dispatch, sharding
from attnx.dispatch import Spread
from attnx.ops import chunks
from pallas_kernels.kept import kept, kept_once


class Layout(NamedTuple):
    """Mesh axes over which a call is cut: () and None where it is not."""

    rows: tuple[str, ...]
    heads: tuple[str, ...]
    context: str | None
    size: int  # of the context axis
    repeat: int  # how often a shared head is repeated, so that each device has its own
    sizes: dict[str, int]  # of all axes of the mesh
    whole: tuple[str, ...]  # what could not be cut, and why

    def parts(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.sizes[a] for a in axes)


class Local(NamedTuple):
    """An op, called on one device's part."""

    op: str
    impl: str
    forms: dict[str, Callable]

    def __call__(self, *args, **kwargs):
        return dispatch.run(self.op, self.impl, self.forms, args, kwargs)


def run(op: str, impl: str, forms, args: tuple, kwargs: dict):
    """`dispatch.run` of the op, on each device's part where there is a mesh."""
    local = Local(op, impl, forms)
    if sharding.active() is None:
        return local(*args, **kwargs)
    # Observed here, where arrays are whole: inside they are each device's part.
    return dispatch.shown(op, forms, args, kwargs, lambda: _spread()[op](local, *args, **kwargs))


@functools.cache
def _spread() -> dict[str, Callable]:
    from attnx.ops import context_attention  # which needs this module's Layout

    return {
        'softmax_attention': context_attention.softmax_attention,
        'gated_linear': gated_linear,
        'delta_rule': delta_rule,
        'short_conv': short_conv,
    }


def layout(batch: int, length: int, heads: tuple[int, int] | None = None, *, least: int = 1) -> Layout:
    """How a call on `batch` rows of `length` tokens is cut under the active mesh.

    heads: (all of them, those that the others share), or None: there are none. least: tokens that a part must have.
    """
    active, whole = sharding.active(), []
    assert active is not None
    sizes, mapping, _ = active
    axes = lambda name: tuple(a for a in sharding.axes_of(mapping, name) if sizes[a] > 1)
    count = lambda names: math.prod(sizes[a] for a in names)
    rows, across, context = axes('batch'), axes('heads') if heads else (), axes('length')
    if batch % count(rows):
        whole.append(f'{batch} rows are not divisible over the {count(rows)} devices of {" x ".join(rows)}')
        rows = ()
    repeat = 1
    if across and heads:
        num, shared = heads
        repeat = shared_heads(num, shared, count(across))
        if not repeat:
            whole.append(f'{num} heads over {shared} are not divisible over the {count(across)} devices of {across[0]}')
            across, repeat = (), 1
    context, size = (context[0], sizes[context[0]]) if context else (None, 1)
    if context and (length % size or length // size < least):
        if length > 1:  # one token is decoding: there is nothing to cut
            why = f'fewer than {least} a device' if length % size == 0 else 'not divisible'
            whole.append(f'{length} tokens are {why} over the {size} devices of {context}')
        context, size = None, 1
    return Layout(rows, across, context, size, repeat, dict(sizes), tuple(whole))


def shared_heads(num: int, shared: int, parts: int) -> int:
    """How often to repeat each of `shared` heads so that `parts` devices get whole groups; 0: it can't be done."""
    repeat = parts // math.gcd(shared, parts)
    return repeat if num % (shared * repeat) == 0 and num % parts == 0 else 0


def describe(where: Layout, how: str) -> Spread:
    """The words for `dispatch.record`."""
    named = [(f'rows over {" x ".join(where.rows)}', where.rows), (f'heads over {" x ".join(where.heads)}', where.heads)]
    found = [f'{text} ({where.parts(axes)})' for text, axes in named if axes]
    found += [f'tokens over {where.context} ({where.size}): {how}'] if where.context else []
    return Spread('; '.join(found) or 'every device does all of it', where.whole)


def shard_map(function, in_specs, out_specs):
    """Over all axes of the mesh; a kernel's own derivative rule is opaque to the check of replication."""
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def shift(x, axis: str, by: int = 1):
    """Sends x to the device `by` further on, round the end."""
    size = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(j, (j + by) % size) for j in range(size)])


# Recurrences --------------------------------------------------------------------------------------------------------


def gated_linear(local, query, key, value, log_decay=None, *, initial_state, segment_ids, scale, **options):
    """`attnx.ops.gated_linear` on each device's part."""

    def response(where, q, k, v, _, g, ids):
        """R [B, T, N, H] in q's dtype and A [B, N, H, 1]: scale q times the decay since the part began, the whole decay."""
        dtype = chunks.accumulator(q, k, v)
        groups = v.shape[2] // q.shape[2]
        rows = jnp.repeat(q.astype(dtype) * (1 if scale is None else scale), groups, axis=2)
        if g is None:
            return rows.astype(q.dtype), jnp.ones((rows.shape[0], *rows.shape[2:], 1), dtype)
        g = jnp.asarray(g, dtype)
        since = g * jnp.arange(1, v.shape[1] + 1, dtype=dtype)[:, None] if g.ndim == 1 else jnp.cumsum(g, axis=1)
        since = since if since.ndim == 4 else since[..., None]
        decay = jnp.broadcast_to(jnp.exp(since), rows.shape)
        return (rows * decay).astype(q.dtype), decay[:, -1, ..., None]

    def apply(state, last, change):
        return change * state + last

    return _recurrence(
        local, response, apply, query, key, value, None, log_decay, initial_state, segment_ids, scale=scale, **options
    )


def delta_rule(local, query, key, value, beta, log_decay=None, *, initial_state, segment_ids, **options):
    """`attnx.ops.delta_rule` on each device's part."""

    def response(where, q, k, v, beta, g, ids):
        """R [B, T, N, H] and A [B, N, H, H]: what the op makes of the identity, a column for each row of the state."""
        width = k.shape[-1]
        nothing = jnp.zeros((*v.shape[:3], width), v.dtype)
        eye = jnp.broadcast_to(jnp.eye(width, dtype=chunks.accumulator(q, k, v)), (v.shape[0], v.shape[2], width, width))
        reads, change = local(q, k, nothing, beta, g, initial_state=eye, segment_ids=ids, **options)
        return kept_once(reads), change

    def apply(state, last, change):
        return chunks.matmul(change, state) + last

    return _recurrence(local, response, apply, query, key, value, beta, log_decay, initial_state, segment_ids, **options)


def _recurrence(local, response, apply, query, key, value, beta, log_decay, initial_state, segment_ids, **options):
    where = layout(value.shape[0], value.shape[1], (value.shape[2], key.shape[2]))
    if where.repeat > 1:
        query, key = (jnp.repeat(x, where.repeat, axis=2) for x in (query, key))
    rows, heads, tokens = where.rows or None, where.heads or None, where.context
    per_token = P(rows, tokens, heads)
    arrays = {'query': query, 'key': key, 'value': value, 'beta': beta, 'log_decay': log_decay}
    arrays |= {'initial_state': initial_state, 'segment_ids': segment_ids}
    specs = dict.fromkeys(('query', 'key', 'value', 'beta'), per_token)
    specs['log_decay'] = P(heads) if log_decay is not None and log_decay.ndim == 1 else per_token
    specs |= {'initial_state': P(rows, heads), 'segment_ids': P(rows, tokens)}
    given = {name: x for name, x in arrays.items() if x is not None}

    def body(given):
        q, k, v, beta, g, first, ids = (given.get(name) for name in arrays)
        extra = () if beta is None else (beta,)
        call = lambda state: local(q, k, v, *extra, g, initial_state=state, segment_ids=ids, **options)
        if tokens is None:
            return call(first)
        out, last = call(None)
        reads, change = response(where, q, k, v, beta, g, ids)
        if ids is not None:  # a reset keeps the state from what follows it
            unbroken = jnp.cumsum(chunks.resets(ids), axis=1) == 0
            before = shift(ids[:, -1], tokens)
            continues = (lax.axis_index(tokens) == 0) | (before == ids[:, 0])
            unbroken &= continues[:, None]
            reads = jnp.where(unbroken[:, :, None, None], reads, 0)
            change = jnp.where(unbroken[:, -1, None, None, None], change, 0)
        every = kept(lax.all_gather(jnp.concatenate([last, change.astype(last.dtype)], axis=-1), tokens))
        state = jnp.zeros_like(last) if first is None else first.astype(last.dtype)
        width = last.shape[-1]
        state, found = lax.scan(lambda s, x: (apply(s, x[..., :width], x[..., width:]), s), state, every)
        mine = lax.dynamic_index_in_dim(found, lax.axis_index(tokens), keepdims=False)
        precision = 'highest' if reads.dtype.itemsize > 2 else None  # exact products of 32 bits take no tensor core
        dims = ((3,), (2,)), ((0, 2), (0, 1))  # [B, N, T, V]: an einsum would have tokens last, which others then follow
        more = lax.dot_general(reads, mine, dims, precision, preferred_element_type=mine.dtype)
        more = jnp.moveaxis(more, 1, 2)
        return (out.astype(mine.dtype) + more).astype(out.dtype), state

    spec = {name: specs[name] for name in given}
    with dispatch.spread(describe(where, 'states by one all-gather')):
        return shard_map(body, (spec,), (per_token, P(rows, heads)))(given)


# Convolution --------------------------------------------------------------------------------------------------------


def short_conv(local, x, kernel, *, initial_state, segment_ids, activation, unit_heads):
    """`attnx.ops.short_conv` on each device's part: channels are cut as heads are."""
    taps, heads = kernel.shape[0], unit_heads or x.shape[2]
    where = layout(x.shape[0], x.shape[1], (heads, heads), least=taps - 1)
    unit_heads = unit_heads and unit_heads // where.parts(where.heads)
    local = functools.partial(local, activation=activation, unit_heads=unit_heads)
    rows, channels, tokens = where.rows or None, where.heads or None, where.context
    per_token = P(rows, tokens, channels)
    arrays = {'x': x, 'kernel': kernel, 'initial_state': initial_state, 'segment_ids': segment_ids}
    given = {name: value for name, value in arrays.items() if value is not None}
    specs = {'x': per_token, 'kernel': P(None, channels)}
    specs |= {'initial_state': P(rows, None, channels), 'segment_ids': P(rows, tokens)}

    def body(given):
        x, kernel, first, ids = (given.get(name) for name in arrays)
        if tokens is None or taps == 1:
            return local(x, kernel, initial_state=first, segment_ids=ids)
        begins = lax.axis_index(tokens) == 0
        given = jnp.zeros((x.shape[0], taps - 1, x.shape[2]), x.dtype) if first is None else first
        halo = jnp.where(begins, given, shift(x[:, 1 - taps :], tokens).astype(given.dtype)).astype(x.dtype)
        if ids is not None:
            ids = jnp.concatenate([jnp.where(begins, ids[:, :1], shift(ids[:, 1 - taps :], tokens)), ids], axis=1)
        y, last = local(jnp.concatenate([halo, x], axis=1), kernel, initial_state=jnp.zeros_like(given), segment_ids=ids)
        return y[:, taps - 1 :], lax.all_gather(last, tokens)[-1]

    spec = {name: specs[name] for name in given}
    with dispatch.spread(describe(where, 'a halo from the device before')):
        return shard_map(body, (spec,), (per_token, P(rows, None, channels)))(given)
