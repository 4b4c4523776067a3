"""Softmax attention whose tokens are cut over the context axis of a mesh. See `softmax_attention`.

Queries and keys of T and S tokens lie in P contiguous parts. Three ways for a query to meet every key:

    heads   (Ulysses, arXiv:2309.14509) an all-to-all gives each device all tokens of a P-th of the heads; another brings the
            output back. Balanced under any mask. Fewer key heads than devices are repeated.
    gather  (as in Llama 3, arXiv:2407.21783) keys and values are gathered, queries stay. Backward reduce-scatters.
    ring    (`attnx.ops.ring`) keys and values go round. They go both ways round, only as far as some device needs them:
            those of a window meet their neighbours only, and so do those of documents, which are data.

Under a causal mask contiguous parts are unbalanced: the last device has nearly twice the average work. `gather` and `ring`
then work on 2 P halves of parts, device r on halves r and 2 P - 1 - r (zigzag), which two permutations bring there and back.

A part's mask and scores are the caller's functions at shifted indices. Blocks that the mask leaves empty are skipped by the
op on each part, documents included. Dropout draws differ from those of one device: each part has a seed of its own.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from attnx import dispatch, sharding
from attnx.ops import ring
from attnx.ops.parallel import Layout, describe, layout, shard_map, shared_heads
from attnx.ops.softmax_backward import recalled
from pallas_kernels import blocks, elementwise
from pallas_kernels import dropout as drop
from pallas_kernels.dropout import Dropout
from pallas_kernels.elementwise import Index, Mask, Operand, Score, Term

GATHER_LIMIT = 2**28  # bytes of gathered keys and values above which `auto` prefers the ring
UNEVEN = 1.25  # work of the busiest device over the average, above which queries go zigzag


class Choice(NamedTuple):
    """How the context axis is crossed."""

    method: str
    why: str
    zigzag: bool = False
    legs: tuple[int, int] = (0, 0)  # ring: so many devices on, and back, do keys go
    pairs: tuple[tuple[int, int], ...] = ((0, 0),)  # ring: pieces of queries and keys that meet on some device


def softmax_attention(local, query, key, value, *, mask, score, bias, scale, sinks, dropout, return_lse, return_stats):
    """`attnx.ops.softmax_attention` on each device's part, options as the op has checked them.

    Raises:
      ValueError: the method that `attnx.sharding.use` was given can't serve this call.
    """
    if return_stats:
        raise ValueError('softmax_attention: return_stats is of a whole batch on one device, and not served on a mesh')
    (B, T, N, _), (_, S, K, _) = query.shape, key.shape
    where = layout(B, T, (N, K))
    dense = [o for f in (mask, score) if f is not None for o in elementwise.flatten(f)[0] if {'q', 'k'} <= set(o.index)]
    choice = None if where.context is None else choose(where, query, key, value, mask, dense)
    heads, repeat = where.heads, where.repeat
    if choice and choice.method == 'heads':
        heads = (*heads, where.context)
        repeat = shared_heads(N, K, where.parts(heads))
    if repeat > 1:
        key, value = (jnp.repeat(x, repeat, axis=2) for x in (key, value))
    rows, tokens, across = where.rows or None, where.context, where.heads or None
    whole_keys = tokens is None or bool(S % where.size)
    cut_dense = choice is not None and choice.method != 'heads' and not choice.zigzag

    def spec(o: Operand):
        cuts = {'b': rows, 'h': heads or None, 'q': tokens if cut_dense and 'k' in o.index else None}
        return P(*(cuts.get(c) if n > 1 else None for c, n in zip(o.index, jnp.shape(o.array))))

    parts, legs = _Parts(where, heads, mask, score, (B, N, T, S), cut_dense), None
    if choice and choice.method == 'ring' and mask is not None:
        count = where.size * (2 if choice.zigzag else 1)
        classes = blocks.classify(mask, B, N, T, S, T // count, S // count)
        if not isinstance(classes, np.ndarray):  # known when it runs: the same for all, so that all go together
            legs = jnp.stack(_legs(_needed(blocks.union(classes), where.size, choice.zigzag)))
    operands = [o.array for o in parts.operands]
    seed = None if dropout is None else dropout.seed
    sent = P(rows, tokens, across)
    specs = (sent, P(rows, None if whole_keys else tokens, across), P(rows, None if whole_keys else tokens, across))
    specs += ([spec(o) for o in parts.operands], P(heads or None), P(), P())
    options = {'bias': None, 'scale': scale, 'return_lse': True}

    def attend(q, k, v, arrays, sinks, seed, q0, k0, known=None):
        """(out, lse) of a part whose first query and key have these indices; or `known`, with the part's gradients."""
        m, s = parts.at(arrays, q.shape[1], k.shape[1], q0, k0)
        d = None if seed is None else Dropout(dropout.rate, parts.seed(seed, q0, k0))
        if known is not None:
            return recalled(local.impl, q, k, v, known=known, mask=m, score=s, scale=scale, dropout=d)
        return local(q, k, v, mask=m, score=s, sinks=sinks, dropout=d, **options)

    def body(q, k, v, arrays, sinks, seed, legs):
        if choice is None:
            return attend(q, k, v, arrays, sinks, seed, 0, 0)
        if choice.method == 'heads':
            swap = lambda x: lax.all_to_all(x, tokens, split_axis=2, concat_axis=1, tiled=True)
            out, lse = attend(swap(q), swap(k), swap(v), arrays, sinks, seed, 0, 0)
            back = functools.partial(lax.all_to_all, axis_name=tokens, tiled=True)
            return back(out, split_axis=1, concat_axis=2), back(lse, split_axis=2, concat_axis=1)
        place = ring.Place(tokens, where.size, choice.zigzag)
        if choice.method == 'gather':
            if not whole_keys:
                k, v = (lax.all_gather(x, tokens, axis=1, tiled=True) for x in (k, v))
            starts = place.starts(lax.axis_index(tokens), T)
            found = [attend(x, k, v, arrays, sinks, seed, q0, 0) for x, q0 in zip(place.out(q, 1), starts)]
            outs, lses = zip(*found)
        else:
            outs, lses = ring.attend(attend, place, choice.pairs, choice.legs, (T, S), q, k, v, arrays, seed, legs)
            if sinks is not None:
                outs, lses = zip(*(_with_sinks(out, lse, sinks) for out, lse in zip(outs, lses)))
        outs = [x.astype(value.dtype) for x in outs]
        return place.back(outs, 1), place.back(lses, 2)

    how = f'{choice.method}{", zigzag" if choice.zigzag else ""}: {choice.why}' if choice else ''
    with dispatch.spread(describe(where, how)):
        out, lse = shard_map(body, specs, (sent, P(rows, across, tokens)))(query, key, value, operands, sinks, seed, legs)
    return (out, lse) if return_lse else out


# The choice ---------------------------------------------------------------------------------------------------------


def choose(where: Layout, query, key, value, mask, dense: list[Operand]) -> Choice:
    """The way over the context axis: the one that was asked for, or the best by mask and shape.

    dense: operands of the mask and the score that are indexed by query and key.
    """
    (B, T, N, _), (_, S, K, H), size = query.shape, key.shape, where.size
    asked, tensor, refused = sharding.active()[2], where.parts(where.heads), {}
    if not shared_heads(N, K, tensor * size):
        refused['heads'] = f'{N} heads over {K} key heads do not divide among {tensor * size} devices'
    if S % size:
        refused = dict.fromkeys(('ring', 'heads'), f'{S} keys do not divide among {size} devices')
    if asked in refused:
        raise ValueError(f'softmax_attention: context method {asked!r} can not serve this call: {refused[asked]}; use "auto"')

    zigzag, pairs = T == S and T % (2 * size) == 0 and not dense, ((0, 0),)
    if zigzag:
        halves = blocks.possible(mask, B, N, T, S, T // size // 2, T // size // 2)
        zigzag, pairs = _uneven(halves), _pairs(halves)
    whole = S % size == 0  # else there is no ring
    legs = _legs(_needed(blocks.possible(mask, B, N, T, S, T // size, S // size), size, False)) if whole else (size - 1, 0)
    steps = sum(legs) + 1
    near = size > 2 and 2 * steps <= size  # balanced as it lies; zigzag would send it round the whole ring
    round_ = (True, _legs(_needed(halves, size, True)), pairs) if zigzag and not near else (False, legs)
    key_heads = K * where.repeat // tensor
    moved = B // where.parts(where.rows) * S * key_heads * (H + value.shape[-1]) * key.dtype.itemsize
    everywhere = any('h' not in o.index and o.array.size > 1 for o in dense)  # each device would hold all of such an array

    if asked == 'heads':
        return Choice('heads', 'as asked')
    if asked == 'gather':
        return Choice('gather', 'as asked', zigzag)
    if asked == 'ring':
        return Choice('ring', f'as asked, {steps} of {size} parts', *round_)
    if near and 'ring' not in refused:
        return Choice('ring', f'the mask reaches {steps} of {size} parts', *round_)
    if key_heads % size == 0 and 'heads' not in refused and not everywhere:
        return Choice('heads', f'{key_heads} key heads divide among {size} devices')
    if moved <= GATHER_LIMIT or 'ring' in refused:
        return Choice('gather', f'keys and values take {moved:,} bytes', zigzag)
    return Choice('ring', f'gathered keys and values would take {moved:,} bytes', *round_)


def _needed(classes, size: int, zigzag: bool):
    """Whether some device needs the keys of the one s before it: bool [size], of classes of parts, or of halves if zigzag."""
    part = np.arange(len(classes))
    device = np.minimum(part, 2 * size - 1 - part) if zigzag else part
    step = (device[:, None] - device) % size
    return ((classes != blocks.EMPTY) & (step == np.arange(size)[:, None, None])).any((1, 2))


def _legs(needed):
    """How far on and how far back keys must go, the fewest steps in all, to be where they are needed: ints or int32 []."""
    xp, steps = blocks._module(needed), np.arange(len(needed))
    back = xp.where(needed & (steps > steps[:, None]), len(needed) - steps, 0).max(1)
    on = len(needed) - 1 - xp.argmin((steps + back)[::-1])
    return (int(on), int(back[on])) if xp is np else (on.astype(jnp.int32), back[on].astype(jnp.int32))


def _uneven(classes: np.ndarray) -> bool:
    """Whether zigzag would even out the work of contiguous parts: classes of half parts [2 P, 2 P]."""
    work = (classes != blocks.EMPTY).sum(1) + 1e-9
    contiguous = work.reshape(-1, 2).sum(1)
    zigzag = work[: len(work) // 2] + work[: len(work) // 2 - 1 : -1]
    return contiguous.max() > UNEVEN * contiguous.mean() and zigzag.max() < contiguous.max()


def _pairs(classes: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Which pieces of a device's queries meet which pieces of some device's keys, zigzag."""
    half = len(classes) // 2
    return tuple((a, b) for a in (0, 1) for b in (0, 1) if classes[a * half :][:half, b * half :][:, :half].any())


# Parts --------------------------------------------------------------------------------------------------------------


class _Parts:
    """The mask and score of a part: the caller's functions at the part's place in the whole."""

    def __init__(self, where: Layout, heads, mask, score, sizes: tuple[int, int, int, int], cut_dense: bool):
        B, N, self.T, self.S = sizes
        self.cut_dense = cut_dense
        self.functions = [_Function(f, self.T, self.S) for f in (mask, score) if f is not None]
        self.has = mask is not None, score is not None
        self.operands = [o for f in self.functions for o in f.operands]
        self.owners = {'b': (where.rows, B // where.parts(where.rows)), 'h': (heads, N // where.parts(heads))}

    def at(self, arrays, queries: int, keys: int, q0, k0):
        """(mask, score) for `queries` queries from index q0 on and `keys` keys from k0 on."""
        start = {'q': q0, 'k': k0, 'd': k0 - q0 + self.T - queries}
        size = {'q': queries, 'k': keys, 'd': queries + keys - 1}
        whole = {'q': self.T, 'k': self.S, 'd': self.T + self.S - 1}
        offsets = {c: lax.axis_index(axes) * number for c, (axes, number) in self.owners.items() if axes}
        offsets |= {c: start[c] for c in 'qk' if not isinstance(start[c], int)}  # else 0: not cut

        def cut(o, x):
            for axis, c in enumerate(o.index):
                kept = c == 'q' and self.cut_dense and 'k' in o.index  # it came cut
                if c in size and size[c] < whole[c] and not kept:
                    x = lax.dynamic_slice_in_dim(x, start[c], size[c], axis)
            return x

        found, arrays = [], list(arrays)
        for f in self.functions:
            mine, arrays = arrays[: len(f.operands)], arrays[len(f.operands) :]
            cuts = [Operand(cut(o, x), o.index) for o, x in zip(f.operands, mine)]
            found.append(f.at(cuts, {c: n for c, n in offsets.items() if c in f.reads}, queries, keys))
        found = iter(found)
        return tuple(next(found) if has else None for has in self.has)

    def seed(self, seed, q0, k0):
        """A seed for this part, where there are several."""
        numbers = [lax.axis_index(axes) for axes, _ in self.owners.values() if axes]
        for n in (*numbers, q0, k0):
            if not isinstance(n, int):
                seed = drop.mix(drop.u32(seed) + drop.u32(n) + drop.GOLDEN)
        return seed


class _Function:
    """A mask or a score whose indices can be moved."""

    def __init__(self, value: Mask | Score, T: int, S: int):
        self.value, self.lengths = value, (T, S)
        self.operands, self.call = elementwise.flatten(value)
        self.scores = isinstance(value, Score)
        scalars = [jax.ShapeDtypeStruct((), jnp.result_type(o.array)) for o in self.operands]
        index = [jax.ShapeDtypeStruct((), jnp.int32)] * 4
        logit = [jax.ShapeDtypeStruct((), jnp.float32)] if self.scores else []
        run = lambda i, s, v: self.call(*s, Index(*i, T, S), v)
        jaxpr = jax.make_jaxpr(run)(index, logit, scalars).jaxpr
        used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
        self.reads = [c for c, v in zip('bhqk', jaxpr.invars) if id(v) in used]  # indices that it looks at itself
        self.moved = {}

    def at(self, operands: Any, offsets: dict[str, Any], queries: int, keys: int):
        if not offsets and (queries, keys) == self.lengths:  # as it was given: its blocks may be known while tracing
            return jax.tree.unflatten(jax.tree.structure(self.value, is_leaf=lambda x: isinstance(x, Operand)), operands)
        letters = tuple(offsets)
        operands = (*(Operand(jnp.asarray(n, jnp.int32), '') for n in offsets.values()), *operands)
        function = self.moved.setdefault(letters, self._moved(letters))
        return Score((Term(function, operands),)) if self.scores else Mask(function, operands)

    def _moved(self, letters):
        def function(*args):
            logit, (i, *values) = args[: self.scores], args[self.scores :]
            by = dict(zip(letters, values))
            i = Index(*(getattr(i, c) + by.get(c, 0) for c in 'bhqk'), *self.lengths)
            return self.call(*logit, i, values[len(letters) :])

        return function


def _with_sinks(out, lse, sinks):
    empty = lse == -jnp.inf
    safe = jnp.where(empty, 0, lse)
    total = jnp.logaddexp(safe, sinks.astype(lse.dtype)[:, None])
    weight = jnp.where(empty, 0, jnp.exp(safe - total))
    return out * jnp.moveaxis(weight, 1, 2)[..., None], jnp.where(empty, -jnp.inf, total)
