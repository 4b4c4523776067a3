"""Mask, score and dropout functions on the tiles of a TPU kernel, and the tables that say which tiles it visits.

A tile is [q, k] in the forward kernel, [k, q] ("transposed") in the backward one. Vectors take the shape that costs a
TPU nothing to widen: one over rows is (rows, 128), the same in all lanes, one over columns (8, columns), the same in all
sublanes; repeating either names the same registers again. A row vector comes from its lane form by a transposition, made
when a kernel enters a row of tiles and kept in scratch memory. A strip by difference is rolled into a tile, row r by r.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import blocks, tile_eval
from pallas_kernels import elementwise as ew
from pallas_kernels.softmax_attention import functions

LANES, SUBLANES = 128, 8
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
_FIELD = 13
MOST_BLOCKS = 2**_FIELD  # a side
MOST_WORDS = 220_000  # the scalar memory holds 2^18 words, all told


# Which tiles


def words(classes):
    """The tiles to visit, row by row, as words of a table: row, column, class, whether first and last of the row.

    Args:
      classes: int8 [b, n, rows, columns]; a row without a tile gets one that is empty, to write its output.

    Returns:
      int32 [b, n, L], and the steps of the grid: an int, L, where `classes` is NumPy, else traced and at most L.
    """
    xp = np if isinstance(classes, np.ndarray) else jnp
    *_, rows, columns = classes.shape
    live = classes != blocks.EMPTY
    visited = live | (~live.any(-1, keepdims=True) & (np.arange(columns) == 0))
    seen = xp.cumsum(visited, -1)
    ends = visited & (seen == 1), visited & (seen == seen[..., -1:])
    place = np.arange(rows, dtype=np.int32)[:, None] + (np.arange(columns, dtype=np.int32) << _FIELD)
    word = place + sum(x.astype(np.int32) << at for x, at in zip((classes, *ends), (2 * _FIELD, 28, 29)))
    visited, word = (x.reshape(*x.shape[:-2], -1) for x in (visited, word))
    count = visited.sum(-1, dtype=np.int32)[..., None]
    size = word.shape[-1]
    position = xp.where(visited, xp.cumsum(visited, -1) - 1, size)  # a scatter: sorting compiles slowly
    if xp is np:
        placed = np.zeros((*word.shape[:-1], size + 1), np.int32)
        np.put_along_axis(placed, position, np.broadcast_to(word, visited.shape), -1)
        word = placed[..., :size]
    else:
        place = lambda position, word: jnp.zeros(size + 1, jnp.int32).at[position].set(word)[:size]
        word = jnp.vectorize(place, signature='(n),(n)->(n)')(position, word)
    # Beyond the count, the last tile again, as an empty one: nothing moves, nothing is done.
    end = xp.take_along_axis(word, count - 1, -1) & (2 ** (2 * _FIELD) - 1)
    word = xp.where(np.arange(word.shape[-1]) < count, word, end).astype(np.int32)
    return (word[..., : count.max()], int(count.max())) if xp is np else (word, count.max())


class Step:
    """A word of the table, read by the kernel or an index map."""

    def __init__(self, table, lead, b, h, t):
        at = (b if lead[0] > 1 else 0) * lead[1] + (h if lead[1] > 1 else 0)
        word = table[at * (table.shape[0] // (lead[0] * lead[1])) + t]
        take = lambda at, bits: lax.shift_right_logical(word, np.int32(at)) & np.int32(2**bits - 1)
        self.row, self.column, self.kind = take(0, _FIELD), take(_FIELD, _FIELD), take(2 * _FIELD, 2)
        self.first, self.last = take(28, 1) == 1, take(29, 1) == 1


def fitting(classes):
    """`classes`, united over heads, then over batches too, where their tables would not fit the scalar memory."""
    for axis in (1, 0):
        if np.prod(classes.shape) > MOST_WORDS:
            classes = united(classes, axis)
    return classes


def united(classes, axis: int):
    """One table for all along `axis`: empty or full only where all of them are."""
    xp = np if isinstance(classes, np.ndarray) else jnp
    low, high = classes.min(axis, keepdims=True), classes.max(axis, keepdims=True)
    partial = xp.where(low == blocks.FULL, blocks.FULL, blocks.PARTIAL)
    return xp.where(high == blocks.EMPTY, blocks.EMPTY, partial).astype(np.int8)


def kinds(classes) -> set[int]:
    """The classes that may occur; a row without a tile counts as an empty one."""
    if not isinstance(classes, np.ndarray):
        return {blocks.EMPTY, blocks.PARTIAL, blocks.FULL}
    counts = (classes != blocks.EMPTY).sum((-1, -2))
    ragged = (counts != counts.max()).any() or not (classes != blocks.EMPTY).any(-1).all()
    return set(np.unique(classes[classes != blocks.EMPTY]).tolist()) | ({blocks.EMPTY} if ragged else set())


def cases(step: Step, present: set[int], compute):
    """Runs compute(partial) for a tile that is not empty; only the classes that may occur are compiled."""
    live = sorted(present - {blocks.EMPTY})
    for kind in live:
        run = lambda kind=kind: compute(kind == blocks.PARTIAL)
        run() if present == {kind} else pl.when(step.kind == kind)(run)


# Operands


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A tile of `queries` x `keys`, of which `part` keys are in registers at a time; lengths padded to whole tiles."""

    queries: int
    keys: int
    part: int
    T: int
    S: int


class Operands:
    """How a kernel takes the operands of its functions: arrays, block specs, and scratch for vectors over rows."""

    def __init__(self, spec: functions.Spec, sizes: Sizes, lead, transposed: bool):
        self.spec, self.sizes, self.transposed = spec, sizes, transposed
        self.arrays, self.specs, self.scratch, self.slots = [], [], [], []
        for o in spec.operands:
            self._add(o, lead)

    def _add(self, o: ew.Operand, lead):
        sizes, spec = self.sizes, self.spec
        kind = functions.kind(o.index, self.transposed)
        order = [c for c in 'bhqkd' if c in o.index]
        x = jnp.asarray(o.array).transpose([o.index.index(c) for c in order])
        x = _wide(x, dense=set('qk') <= set(order))
        size = dict(zip(order, x.shape))
        x = x.reshape([size.pop(c, 1) for c in 'bh'] + list(size.values()))
        at = lambda b, h: (b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0)
        slot = None
        if kind == '':
            shape, x = x.shape, x.reshape(-1)
            self.specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
            slot = shape
        elif 'd' in order:
            n, room = (spec.S, sizes.S) if self.transposed else (spec.T, sizes.T)
            x = x[..., ::-1] if self.transposed else x
            left = room - n + 1
            x = jnp.pad(x, [(0, 0), (0, 0), (left, sizes.T + sizes.S - left - x.shape[2])])[:, :, None]
            self.specs.append(pl.BlockSpec((None, None, 1, x.shape[3]), lambda b, h, t, w: (*at(b, h), 0, 0)))
        elif set('qk') <= set(order):

            def dense(b, h, t, w):
                step = Step(w, lead, b, h, t)
                return (*at(b, h), *((step.column, step.row) if self.transposed else (step.row, step.column)))

            self.specs.append(pl.BlockSpec((None, None, sizes.queries, sizes.keys), dense))
        else:
            size, room = (sizes.queries, sizes.T) if 'q' in order else (sizes.keys, sizes.S)
            x = jnp.pad(x, [(0, 0), (0, 0), (0, room - x.shape[2])])[:, :, None]
            place = 'row' if kind == 'r' else 'column'
            vector = lambda b, h, t, w: (*at(b, h), 0, getattr(Step(w, lead, b, h, t), place))
            self.specs.append(pl.BlockSpec((None, None, 1, size), vector))
            if kind == 'r':
                slot = len(self.scratch)
                self.scratch.append(pltpu.VMEM((size, LANES), x.dtype))
        self.arrays.append(x)
        self.slots.append(slot)


def _wide(x, dense: bool):
    """An operand in a type that a TPU loads: 32 bits, but for dense tiles, which may be narrow."""
    if dense:
        if x.dtype == jnp.bool_:
            return x.astype(jnp.int8)
        if x.dtype in (jnp.bfloat16, jnp.int8):
            return x
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(jnp.float32)
    return x if x.dtype == jnp.uint32 else x.astype(jnp.int32)


class Inputs:
    """A kernel's operand references, at one batch and head."""

    def __init__(self, operands: Operands, refs, scratch, b, h):
        self.operands, self.refs, self.scratch, self.b, self.h = operands, refs, scratch, b, h
        self.spec, self.transposed = operands.spec, operands.transposed
        self.padded = operands.sizes.T, operands.sizes.S

    def enter(self):
        """Turns the vectors over rows into columns; to call where a row of tiles begins."""
        for ref, o, slot in zip(self.refs, self.spec.operands, self.operands.slots):
            if functions.kind(o.index, self.transposed) == 'r':
                self.scratch[slot][...] = jnp.broadcast_to(ref[...], (LANES, ref.shape[1])).T

    def at(self, step: Step, first: int, size: int):
        """`size` keys of a tile from its key `first` on."""
        return Place(self, step, first, size)


class Place(functions.Place):
    """`functions.Place` for a TPU: the loads, and the shapes of vectors."""

    def __init__(self, inputs: Inputs, step: Step, first: int, size: int):
        sizes, transposed = inputs.operands.sizes, inputs.transposed
        i, j = (step.column, step.row) if transposed else (step.row, step.column)
        self.keys = pl.ds(first, size)  # of the tile's
        shape = (size, sizes.queries) if transposed else (sizes.queries, size)
        super().__init__(inputs, i * sizes.queries, j * sizes.keys + first, shape)

    def _positions(self):
        t, (M, N) = self.inputs.transposed, self.shape

        def vector(kind, start):
            shape, axis = ((M, LANES), 0) if kind == 'r' else ((SUBLANES, N), 1)
            return lambda: lax.broadcasted_iota(jnp.int32, shape, axis) + start

        kq, kk = ('c', 'r') if t else ('r', 'c')
        return [
            (self.inputs.b, jnp.int32, ''),
            (self.inputs.h, jnp.int32, ''),
            (vector(kq, self.q0), jnp.int32, kq),
            (vector(kk, self.k0), jnp.int32, kk),
        ]

    def _load(self, n: int, o: ew.Operand):
        ref, slot, t = self.inputs.refs[n], self.inputs.operands.slots[n], self.inputs.transposed
        sizes, (M, N), kind = self.inputs.operands.sizes, self.shape, functions.kind(o.index, self.inputs.transposed)
        keys = self.keys
        if kind == '':
            b, h = (x if n > 1 else 0 for x, n in zip((self.inputs.b, self.inputs.h), slot))
            return ref[b * slot[1] + h]
        if kind == 'r':
            return self.inputs.scratch[slot][keys if t else slice(None)]
        if kind == 'c':
            return jnp.broadcast_to(ref[:, slice(None) if t else keys], (SUBLANES, N))
        if 'd' in o.index:
            start = self.q0 - self.k0 - M + sizes.S if t else self.k0 - self.q0 - M + sizes.T
            strip = ref[:, pl.ds(pl.multiple_of(start, LANES), M + N)]
            return pltpu.roll(jnp.broadcast_to(strip, (M, M + N)), N, 1, stride=1, stride_axis=0)[:, :N]
        x = ref[:, keys].astype(_loaded(ref.dtype))
        return x.T if t else x

    def _values(self, first: int, operands):
        kind = lambda o: functions.kind(o.index, self.inputs.transposed)
        dtype = lambda n: _loaded(self.inputs.refs[n].dtype)
        return [(lambda n=n, o=o: self._load(n, o), dtype(n), kind(o)) for n, o in enumerate(operands, first)]

    def _eval(self, fun, operands, first=0):
        small = range(first, first + 4) if max(*self.inputs.padded) < 2**22 else ()
        return tile_eval.tile_eval(fun, operands, self.shape, None, small, self._spread)

    def _spread(self, v, k, to):
        M, N = self.shape
        shape = {'r': (M, LANES), 'c': (SUBLANES, N), 'rc': (M, N)}[to]
        v = jnp.asarray(v)
        if v.dtype == jnp.bool_:  # registers of booleans are not repeated
            return self._spread(jnp.where(v, np.int32(1), np.int32(0)), k, to) != 0
        if k == '':
            return jnp.broadcast_to(v, shape)
        return jnp.tile(v, (1, N // LANES) if k == 'r' else (M // SUBLANES, 1))


def _loaded(dtype):
    """The type in which an operand of `dtype` is computed with."""
    if jnp.dtype(dtype).itemsize == 4:
        return jnp.dtype(dtype)
    return jnp.dtype(jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else jnp.int32)


def wide(x, n: int):
    """A vector over rows (rows, 128), n columns wide."""
    return x[:, :n] if n <= LANES else jnp.tile(x, (1, -(-n // LANES)))[:, :n]


# What both calls tell the compiler


def inputs_of_backward(bq: int, bk: int, H: int, Hv: int, query, key, line) -> list:
    """Blocks of q, k, v, do, lse and delta, by the index maps of a query tile, a key tile and a query tile's row numbers."""
    sizes = ((bq, H), query), ((bk, H), key), ((bk, Hv), key), ((bq, Hv), query), ((1, bq), line), ((1, bq), line)
    return [pl.BlockSpec((None, None, *size), lies) for size, lies in sizes]


def parameters(resident: int = 0, semantics=('parallel', 'parallel', 'arbitrary')):
    """`resident`: bytes held beyond the tiles of a step, which with their temporaries stay below 28 MiB."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=28 * 2**20 + resident)


def resident(T, H) -> int:
    """Bytes of a float32 output of T rows that stays while a head is worked on, in two buffers."""
    return 2 * T * -(-H // LANES) * LANES * 4


def cost(B, N, classes, sizes: Sizes, H, Hv, products: int, streams):
    """Work and traffic of the tiles that are visited; all of them where that is not known while tracing."""
    share = (classes != blocks.EMPTY).mean() if isinstance(classes, np.ndarray) else 1.0
    pairs = share * B * N * sizes.T * sizes.S
    moved = sum(x.size * x.dtype.itemsize for x in streams) + pairs / sizes.queries * (H + Hv) * streams[0].dtype.itemsize
    return pl.CostEstimate(flops=int(pairs * products * (H + Hv)), bytes_accessed=int(moved), transcendentals=int(pairs))
