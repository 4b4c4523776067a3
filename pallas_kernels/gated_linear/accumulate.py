"""What the sweeps share: tensor-core products and their accumulators, float32 numbers as 16-bit terms, the decays of a chunk.

The interpreter knows no register accumulator that is set, and no product whose left operand is in registers. Kernels that
take their accumulators from here run in both.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common
from pallas_kernels.common import COL, ROW, TILE

WHOLE = 3  # bfloat16 terms that make a float32


class _Registers:
    def __init__(self, ref):
        self.ref = ref

    def set(self, value):
        self.ref[...] = value

    def add(self, a, b):
        plgpu.wgmma(self.ref, a, b)

    def load(self, younger=0):
        """The sum, once all but the `younger` last issued products are done; None: as it is, without waiting."""
        return plgpu.wgmma_accumulator_load(self.ref, wait_n=younger)


class _Value:
    def __init__(self, shape):
        self.value = jnp.zeros(shape, jnp.float32)

    def set(self, value):
        self.value = value

    def add(self, a, b):
        self.value += jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

    def load(self, younger=0):
        return self.value


def scoped(body, *shapes, interpret):
    """body(*accumulators), float32, zero at first; values leave only as the body's result."""
    if interpret:
        return body(*map(_Value, shapes))
    accumulators = [plgpu.ACC(shape, jnp.float32) for shape in shapes]
    return pl.run_scoped(lambda *refs: body(*map(_Registers, refs)), *accumulators)


def split(x, terms: int, dtype, nearest=True, packed=False) -> list:
    """A float32 value as a sum of 16-bit ones, largest first: one bfloat16 has 8 bits, two have 16, three are x.

    All but the last bfloat16 are made by integer arithmetic, the first rounded if `nearest`, what follows cut: to convert there
    and back is an instruction an element, at an eighth of the speed. packed: a tile on a GPU, whose first term is made two
    elements an instruction.
    """
    found = []
    for _ in range(terms - 1):
        if packed and not found:
            first, high = common.rounded(x)
            found.append(first)
            x = x - high
            continue
        if dtype == jnp.bfloat16:
            bits = lax.bitcast_convert_type(x, jnp.int32)
            high = lax.bitcast_convert_type((bits + 0x8000 if nearest and not found else bits) & -0x10000, jnp.float32)
        else:
            high = x.astype(dtype).astype(jnp.float32)
        found.append(high.astype(dtype))
        x = x - high
    return [*found, x.astype(dtype)] if terms else []


def multiply(acc, lefts, rights, terms: int, least: int = 0) -> int:
    """Adds the products that `terms` terms of each are worth, least first: sums are cut, not rounded; returns how many.

    least: 1 leaves out the first terms' product.
    """
    places = [(i, j) for i in range(len(lefts)) for j in range(len(rights)) if least <= i + j < terms]
    for i, j in sorted(places, key=sum, reverse=True):
        acc.add(lefts[i], rights[j])
    return len(places)


def product(lefts, rights, terms: int, base=None, parts=None, *, interpret: bool):
    """base + left @ right, a float32 tile.

    The tensor core cuts sums off, 16 tokens or channels at a time. Of three terms the product of the largest has a sum of its
    own, which has few bits, and what is cut off the others is nothing; base is added where additions round.

    parts: what adds up to lefts[0], each to have a sum of its own.
    """
    first, *more = parts or lefts[:1]
    apart = terms >= WHOLE and max(len(lefts), len(rights)) > 1

    def run(acc, *lead):
        multiply(acc, [first, *lefts[1:]] if not lead else lefts, rights, terms, len(lead))
        if not lead:
            return acc.load(0)
        multiply(*lead, [first], rights[:1], terms)
        return acc.load(1) + lead[0].load(0)

    def alone(left, acc):
        multiply(acc, [left], rights[:1], terms)
        return acc.load(0)

    shape = lefts[0].shape[0], rights[0].shape[1]
    found = scoped(run, *[shape] * (1 + apart), interpret=interpret)
    for left in more:
        found += scoped(functools.partial(alone, left), shape, interpret=interpret)
    return found if base is None else found + base


def halves(tile):
    """What adds up to it, half of the columns each: `parts` of a product with short sums."""
    early = plgpu.broadcasted_iota(jnp.int32, tile.shape, 1, layout=TILE) < tile.shape[1] // 2
    return jnp.where(early, tile, jnp.zeros_like(tile)), jnp.where(early, jnp.zeros_like(tile), tile)


def exactly(base, lefts, rights, interpret: bool):
    """base + left @ right, left a tile in registers, as near as float32 comes."""
    return product(lefts, rights, WHOLE, base, halves(lefts[0]), interpret=interpret)


def power(coarse, fine):
    """2^(coarse + fine) to the last bit, of float32 numbers as `decays.cumulative` makes them: exp2 is off by two or three."""
    whole = common.whole(coarse)
    y = (coarse - whole) * common.LN2 + fine * common.LN2
    series = 1 / math.factorial(7)
    for n in reversed(range(7)):
        series = series * y + 1 / math.factorial(n)
    return series * common.power_of_two(whole)


class Decay:
    """What decays within a chunk, in either direction of time, read where it is used: registers are few.

    ref: float32 [2, chunk], sums of base-2 logarithms, coarse and fine. Differences of the coarse ones are exact.
    """

    def __init__(self, ref, reverse: bool):
        self.ref, self.reverse, self.chunk = ref, reverse, ref.shape[1]

    def _vectors(self, layout):
        return [plgpu.load(self.ref.at[part], layout=layout, optimized=False) for part in range(2)]

    def _exp2(self, x, less=(0.0, 0.0)):
        """Factor by factor: a sum of large and small would be rounded. What is fine is at most 2 ** -6."""
        fine = (x[1] - less[1]) * common.LN2
        return jnp.exp2(x[0] - less[0]) * (1.0 + fine * (1.0 + fine * (0.5 + fine * (1 / 6))))

    def _to_end(self, x):
        return self._exp2([self.ref[part, self.chunk - 1] for part in range(2)], x)

    def pairs(self):
        """Of token j (columns) as token i (rows) finds it, a tile."""
        square = (self.chunk, self.chunk)
        i = [common.row(x, square) for x in self._vectors(ROW)]
        j = [common.col(x, square) for x in self._vectors(COL)]
        return self._between(j, i) if self.reverse else self._between(i, j)

    def _between(self, i, j):
        return jnp.exp2((i[0] - j[0]) + (i[1] - j[1]))

    def read(self):
        """Of the state as each token finds it, a row."""
        x = self._vectors(ROW)
        return self._to_end(x) if self.reverse else self._exp2(x)

    def write(self, layout):
        """Of what each token adds to the state, a row or a column."""
        x = self._vectors(layout)
        return self._exp2(x) if self.reverse else self._to_end(x)

    def total(self):
        """Of the state over the chunk, a scalar."""
        return self._to_end((0.0, 0.0))


class Exact(Decay):
    """To the last bit."""

    def _exp2(self, x, less=(0.0, 0.0)):
        return power(x[0] - less[0], x[1] - less[1])

    _between = _exp2


class Kept:
    """The same of decays that all chunks share, computed once."""

    def __init__(self, decay: Decay):
        pairs, read, write, total = decay.pairs(), decay.read(), decay.write(ROW), decay.total()
        self.pairs, self.read, self.write, self.total = (lambda: pairs), (lambda: read), (lambda layout: write), (lambda: total)
