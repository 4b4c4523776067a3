"""What the sweeps share: accumulators of tensor-core products, float32 numbers as 16-bit terms, the decays of a chunk.

The interpreter knows no register accumulator that is set, and no product whose left operand is in registers. Kernels that
take their accumulators from here run in both.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common
from pallas_kernels.common import COL, ROW


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


def split(x, terms: int, dtype) -> list:
    """A float32 value as a sum of 16-bit ones, largest first: one bfloat16 has 8 bits, two have 16, three are x."""
    found = []
    for _ in range(terms):
        found.append(x.astype(dtype))
        x = x - found[-1].astype(jnp.float32)
    return found


def factors(ref, reverse: bool):
    """What decays pairs of tokens, a tile; reads of the state, a row; writes to it, a column; and the state, a scalar.

    ref: float32 [2, chunk], sums of base-2 logarithms, coarse and fine. Differences of the coarse ones are exact.
    """
    chunk = ref.shape[1]
    rows = [plgpu.load(ref.at[part], layout=ROW, optimized=False) for part in range(2)]
    cols = [plgpu.load(ref.at[part], layout=COL, optimized=False) for part in range(2)]
    ends = [ref[part, chunk - 1] for part in range(2)]
    square, exp2 = (chunk, chunk), lambda terms: jnp.exp2(terms[0] + terms[1])
    minus = lambda xs, ys: [x - y for x, y in zip(xs, ys)]
    i, j = [common.row(x, square) for x in rows], [common.col(x, square) for x in cols]
    if reverse:
        return exp2(minus(j, i)), exp2(minus(ends, rows)), exp2(cols), exp2(ends)
    return exp2(minus(i, j)), exp2(rows), exp2(minus(ends, cols)), exp2(ends)
