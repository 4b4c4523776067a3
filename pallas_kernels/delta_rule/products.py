"""What the delta rule's kernels share."""

import jax.numpy as jnp

from pallas_kernels.gated_linear import accumulate

TERMS = 2  # 16 bits


def strengths(beta):
    """beta as p b, p a power of two near its root: multiplying by p rounds nothing. float32, beta > 0."""
    _, exponent = jnp.frexp(beta)
    power = jnp.ldexp(jnp.float32(1), exponent // 2)
    return power, beta / power


def decay_of(terms: int):
    """How sweeps of so many terms read the decays of a chunk."""
    return accumulate.Exact if terms >= accumulate.WHOLE else accumulate.Decay
