"""Mask, score and dropout functions on the tiles of a kernel: how operands are laid out, loaded and evaluated.

A tile holds 64 rows and a block of columns: [q, k] in the forward kernel, [k, q] ("transposed") in the backward one.
An operand by query or key alone is a vector over rows or columns, one by head or batch a scalar, one by (q, k) a tile,
and of a strip by difference `d` a tile is a Toeplitz matrix of M + N - 1 numbers.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import blocks, common, tile_eval
from pallas_kernels import dropout as dropout_lib
from pallas_kernels import elementwise as ew
from pallas_kernels.common import COL, ROW, TILE

_ONE = np.float32(1)


@dataclasses.dataclass(frozen=True)
class Function:
    """A flattened mask or score: `call` over flat operand values, and its operands."""

    call: Callable
    operands: tuple[ew.Operand, ...]


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a kernel evaluates, over one flat list of operands: first the mask's, then the score's, then the seed.

    A kernel's batch may be several batches of `batch` rows, one after the other: functions see a row's number in its own.
    """

    mask: Function | None
    score: Function | None
    dropout: dropout_lib.Dropout | None
    seed: ew.Operand | None
    T: int
    S: int
    batch: int | None = None
    extent: tuple[float, float] = (-math.inf, math.inf)  # the score's values lie between these

    @property
    def operands(self) -> list[ew.Operand]:
        found = [o for f in (self.mask, self.score) if f for o in f.operands]
        return [*found, self.seed] if self.dropout else found

    @property
    def of_score(self) -> tuple[int, int]:
        """The score's operands: from the first of these numbers to before the second."""
        first = len(self.mask.operands) if self.mask else 0
        return first, first + (len(self.score.operands) if self.score else 0)

    def folded(self, operands, batch: int) -> 'Spec':
        """With these operands, of batches of `batch` rows."""
        first, last = self.of_score
        mask = self.mask and dataclasses.replace(self.mask, operands=tuple(operands[:first]))
        score = self.score and dataclasses.replace(self.score, operands=tuple(operands[first:last]))
        seed = operands[last] if self.dropout else None
        return dataclasses.replace(self, mask=mask, score=score, seed=seed, batch=self.batch or batch)


def make_spec(mask, score, dropout, T: int, S: int, keys_padded: bool) -> Spec:
    """`keys_padded`: key tiles reach beyond S, so the mask must hide those keys."""
    pieces = []
    for value in (mask, score):
        if value is None:
            pieces.append(None)
        else:
            operands, call = ew.flatten(value)
            pieces.append(Function(call, tuple(operands)))
    inner = pieces[0]
    if keys_padded:
        if inner:
            pieces[0] = Function(lambda i, values: inner.call(i, values) & (i.k < i.k_len), inner.operands)
        else:
            pieces[0] = Function(lambda i, values: i.k < i.k_len, ())
    if dropout is not None and dropout.threshold == 0:
        dropout = None
    seed = None if dropout is None else ew.Operand(jnp.asarray(dropout.seed).astype(jnp.uint32), '')
    extent = (-math.inf, math.inf) if score is None else blocks.extent(score, T, S)
    return Spec(pieces[0], pieces[1], dropout, seed, T, S, extent=extent)


def fold(spec: Spec, arrays, batched, size: int, batch: int):
    """`vmap` as a larger batch: a spec and `prepare`d arrays for `size` batches, of those of one, `batched` or shared."""
    operands, found = [], []
    for o, x, own in zip(spec.operands, arrays, batched):
        if 'b' in o.index:
            x = fold_rows(x, own, size, batch)
            rest = [n for c, n in zip(o.index, o.array.shape) if c != 'b']
            o = ew.Operand(jax.ShapeDtypeStruct((x.shape[0], *rest), o.array.dtype), 'b' + o.index.replace('b', ''))
        elif own:
            x = x.reshape(size, 1) if o.index == '' else x[:, None]
            x = fold_rows(x, True, size, batch)
            o = ew.Operand(jax.ShapeDtypeStruct((size * batch, *o.array.shape), o.array.dtype), 'b' + o.index)
        operands.append(o)
        found.append(x)
    return spec.folded(operands, batch), found


def fold_rows(x, batched: bool, size: int, batch: int):
    """[size, batch or 1, ...], or [batch or 1, ...] shared by all, as [size * batch, ...]; one row for all stays one."""
    if not batched:
        if x.shape[0] == 1:
            return x
        x = x[None]
    return jnp.broadcast_to(x, (size, batch, *x.shape[2:])).reshape(size * batch, *x.shape[2:])


def special(score) -> bool:
    """Whether `score` takes results of the special function unit for each element."""
    if score is None:
        return False
    operands, call = ew.flatten(score)
    scalars = [jax.ShapeDtypeStruct((), jnp.result_type(o.array)) for o in operands]
    index = [jax.ShapeDtypeStruct((), jnp.int32)] * 4
    f = lambda s, i, v: call(s, ew.Index(*i, 1, 1), v)
    return tile_eval.special(jax.make_jaxpr(f)(jax.ShapeDtypeStruct((), jnp.float32), index, scalars))


def kind(index: str, transposed: bool) -> str:
    rows, columns = ('k', 'q') if transposed else ('q', 'k')
    if 'd' in index:
        return 'rc'
    return ('r' if rows in index else '') + ('c' if columns in index else '')


def prepare(operand: ew.Operand, T: int, S: int, Tp: int, Sp: int, transposed: bool):
    """The array that a kernel loads: booleans as int8, positions padded to whole tiles.

    Dimensions come out as b, h (where present), then the tile's.
    """
    x, index = jnp.asarray(operand.array), operand.index
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.int8)
    order = [c for c in ('bhkqd' if transposed else 'bhqkd') if c in index]
    x = x.transpose([index.index(c) for c in order])
    pads = [(0, {'q': Tp - T, 'k': Sp - S}.get(c, 0)) for c in order]
    if any(p for _, p in pads):
        x = jnp.pad(x, pads)
    if 'd' in index:  # by the column's position less the row's, of padded lengths
        x, right, left = (x[..., ::-1], Tp - T, Sp - S) if transposed else (x, Sp - S, Tp - T)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(left, right)])
    if not order:
        x = x.reshape(1)
    return x


class Inputs:
    """A kernel's operand references; operands that are one number for the whole head are loaded here, once."""

    def __init__(self, refs, spec: Spec, b, h, padded, transposed: bool):
        self.refs, self.spec, self.b, self.h, self.padded, self.transposed = refs, spec, b, h, padded, transposed
        number = lambda o: kind(o.index, transposed) == ''
        self.numbers = [ref[self.lead(o) or (0,)] if number(o) else None for ref, o in zip(refs, spec.operands)]

    def lead(self, operand) -> tuple:
        """Where batch and head stand in an operand's array."""
        sizes = dict(zip(operand.index, operand.array.shape))
        return tuple(getattr(self, c) if sizes[c] > 1 else 0 for c in 'bh' if c in sizes)

    def at(self, q0, k0, shape):
        """The tile whose first query is q0 and first key k0."""
        return Place(self, q0, k0, shape)


class Place:
    def __init__(self, inputs: Inputs, q0, k0, shape):
        self.inputs, self.q0, self.k0, self.shape = inputs, q0, k0, shape
        self.early = {}  # by number of the operand

    def ahead(self):
        """Loads the score's strips now, whose tiles take longest to come."""
        spec = self.inputs.spec
        strips = [n for n in range(*spec.of_score) if 'd' in spec.operands[n].index]
        self.early = {n: self._load(self.inputs.refs[n], spec.operands[n]) for n in strips}
        return self

    def part(self, first: int, columns: int):
        """Some columns of a tile that is not transposed; `first` a multiple of 8."""
        return self.inputs.at(self.q0, self.k0 + first, (self.shape[0], columns))

    def _positions(self):
        """The positions as `tile_eval` operands: b, h, q, k."""
        M, N = self.shape
        kq, kk = ('c', 'r') if self.inputs.transposed else ('r', 'c')

        def ramp(k, first):
            layout, length, piece = (ROW, M, M) if k == 'r' else (COL, N, 8)
            return tile_eval.Ramp(lambda n: common.iota(n, layout), length, piece, first)

        b, batch = self.inputs.b, self.inputs.spec.batch
        return [
            (b if batch is None else jax.lax.rem(b, batch), jnp.int32, ''),
            (self.inputs.h, jnp.int32, ''),
            (ramp(kq, self.q0), jnp.int32, kq),
            (ramp(kk, self.k0), jnp.int32, kk),
        ]

    def _load(self, ref, operand):
        letters, t = operand.index, self.inputs.transposed
        M, N = self.shape
        (r0, c0) = (self.k0, self.q0) if t else (self.q0, self.k0)
        at = [*self.inputs.lead(operand)]
        k = kind(letters, t)
        if 'd' in letters:
            rows = self.inputs.padded[1] if t else self.inputs.padded[0]
            return common.toeplitz(ref.at[(*at, pl.ds(c0 - r0 + rows - M, M + N - 1))], self.shape)
        at += [pl.ds(r0, M)] if 'r' in k else []
        at += [pl.ds(c0, N)] if 'c' in k else []
        return plgpu.load(ref.at[tuple(at)], layout={'r': ROW, 'c': COL, 'rc': TILE}[k], optimized=False)

    def _values(self, first: int, operands):
        def value(n, o):
            number, ref = self.inputs.numbers[n], self.inputs.refs[n]
            load = lambda: self.early[n] if n in self.early else self._load(ref, o)
            return load if number is None else number, ref.dtype, kind(o.index, self.inputs.transposed)

        return [value(n, o) for n, o in enumerate(operands, first)]

    def _eval(self, fun, operands, first=0):
        """`first`: where the positions b, h, q, k stand among the operands."""
        cast = lambda x: plgpu.layout_cast(x, TILE)
        small = range(first, first + 4) if max(*self.inputs.padded) < 2**22 else ()
        return tile_eval.tile_eval(fun, operands, self.shape, cast, small, center=self.k0)

    def _booleans(self, operands, values):
        return [v != 0 if jnp.result_type(o.array) == jnp.bool_ else v for o, v in zip(operands, values)]

    def visible(self):
        """The mask: a boolean tile."""
        spec = self.inputs.spec
        operands = spec.mask.operands

        def fun(b, h, q, k, *values):
            return spec.mask.call(ew.Index(b, h, q, k, spec.T, spec.S), self._booleans(operands, values))

        (v,) = self._eval(fun, self._positions() + self._values(0, operands))
        return v.to('rc')

    def masked(self, s, hidden=-jnp.inf):
        return jnp.where(self.visible(), s, hidden)

    def score(self, s, scale, derivative=False):
        """The score of the logits scale * s, as a tile and a positive number to multiply it with.

        With `derivative`, also the score's derivative by the scaled logits, None where it is 1.
        """
        value, slope = self._scored(s, scale, derivative)
        return (*self._factored(value), slope) if derivative else self._factored(value)

    def score_by_rows(self, s, scale):
        """As `score`, and last a vector over rows to add to tile * number, or None."""
        held = (value := self._scored(s, scale, False)[0]).value
        if isinstance(held, tile_eval.Shifted):
            return held('r'), 1.0, held.parts()['r']
        return *self._factored(value), None

    def addend(self, s, scale):
        """{kind: vector} where all that the score does is to add these times `scale` to the logits scale * s; else None."""
        value, slope = self._scored(s, scale, True)
        held = value.value
        if slope is not None or not isinstance(held, tile_eval.Shifted) or not isinstance(held.value, tile_eval.Scaled):
            return None
        plain = held.value.value is s and math.isclose(held.value.factor, scale, rel_tol=1e-6)
        return held.parts(1 / scale) if plain else None

    def _scored(self, s, scale, derivative):
        if not derivative:
            return self._evaluated(s, scale, lambda call, s, values: (call(s, values),))[0], None
        run = lambda call, s, values: jax.jvp(lambda s: call(s, values), (s,), (_ONE,))
        value, slope = self._evaluated(s, scale, run)
        return value, self._slope(slope)

    def _factored(self, value):
        held = value.value
        if isinstance(held, tile_eval.Scaled) and held.factor > 0:
            return held.value, held.factor
        return value.to('rc'), 1.0

    def _slope(self, slope):
        return None if slope.literal is not None and slope.literal == 1 else slope.to('rc')

    def score_by_operand(self, s, scale, which: int):
        """As `score`, with the derivative by the value of operand `which`."""

        def run(call, s, values):
            value = values[which].astype(jnp.float32)
            put = lambda x: [x if n == which else v for n, v in enumerate(values)]
            return jax.jvp(lambda x: call(s, put(x)), (value,), (_ONE,))

        value, slope = self._evaluated(s, scale, run)
        return *self._factored(value), self._slope(slope)

    def _evaluated(self, s, scale, run):
        spec = self.inputs.spec
        operands = spec.score.operands

        def fun(s, b, h, q, k, *values):
            i = ew.Index(b, h, q, k, spec.T, spec.S)
            call = lambda s, values: spec.score.call(s, i, self._booleans(operands, values)).astype(jnp.float32)
            return run(call, s * jnp.float32(scale), values)

        return self._eval(fun, [(s, jnp.float32, 'rc')] + self._positions() + self._values(spec.of_score[0], operands), 1)

    def kept(self):
        """Whether dropout keeps each weight: a boolean tile."""
        spec, refs = self.inputs.spec, self.inputs.refs
        rate = spec.dropout.rate
        fun = lambda b, h, q, k, seed: dropout_lib.keep(seed, b, h, q, k, rate)
        seed = self._values(len(refs) - 1, [spec.seed])[0][0], jnp.uint32, ''
        (v,) = self._eval(fun, [*self._positions(), seed])
        return v.to('rc')
