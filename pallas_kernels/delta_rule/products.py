"""What the delta rule's kernels share: products of float32 matrices that are given as 16-bit terms, largest first; strengths;
decays to the last bit."""

import functools
import math

import jax.numpy as jnp

from pallas_kernels import common
from pallas_kernels.common import COL, ROW
from pallas_kernels.gated_linear import accumulate

TERMS = 2  # 16 bits
WHOLE = 3  # bfloat16 terms that make a float32


def multiply(acc, lefts, rights, terms: int, least: int = 0):
    """Adds the products that `terms` terms of each are worth, least first, as sums are cut; without the first if `least`."""
    places = [(i, j) for i in range(len(lefts)) for j in range(len(rights)) if least <= i + j < terms]
    for i, j in sorted(places, key=sum, reverse=True):
        acc.add(lefts[i], rights[j])


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

    scoped = functools.partial(accumulate.scoped, interpret=interpret)
    shape = lefts[0].shape[0], rights[0].shape[1]
    found = scoped(run, *[shape] * (1 + apart))
    for left in more:
        found += scoped(functools.partial(alone, left), shape)
    return found if base is None else found + base


def strengths(beta):
    """beta as p b, p a power of two near its root: multiplying by p rounds nothing. float32, beta > 0."""
    _, exponent = jnp.frexp(beta)
    power = jnp.ldexp(jnp.float32(1), exponent // 2)
    return power, beta / power


def power(coarse, fine):
    """2^(coarse + fine) to the last bit, of float32 numbers as `decays.cumulative` makes them: exp2 is off by two or three."""
    whole = common.whole(coarse)
    y = (coarse - whole) * common.LN2 + fine * common.LN2
    series = 1 / math.factorial(7)
    for n in reversed(range(7)):
        series = series * y + 1 / math.factorial(n)
    return series * common.power_of_two(whole)


class Decay(accumulate.Decay):
    """As good as float32."""

    def _exp2(self, x, less=(0.0, 0.0)):
        return power(x[0] - less[0], x[1] - less[1])

    def pairs(self):
        square = (self.chunk, self.chunk)
        i = [common.row(x, square) for x in self._vectors(ROW)]
        j = [common.col(x, square) for x in self._vectors(COL)]
        return self._exp2(j, i) if self.reverse else self._exp2(i, j)


def decay_of(terms: int):
    """How sweeps of so many terms read the decays of a chunk."""
    return Decay if terms >= WHOLE else accumulate.Decay
