"""Accumulators of tensor-core products, on the GPU and in the interpreter.

The interpreter knows no register accumulator that is set, and no product whose left operand is in registers. Kernels that
take their accumulators from here run in both.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


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
