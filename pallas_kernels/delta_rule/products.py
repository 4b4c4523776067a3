"""Products of float32 matrices that are given as 16-bit terms, largest first."""

import jax.numpy as jnp

from pallas_kernels.gated_linear import accumulate

TERMS = 2  # 16 bits
WHOLE = 3  # bfloat16 terms that make a float32


def multiply(acc, lefts, rights, terms: int, lead=None):
    """Adds what `terms` terms of each are worth, least first: sums are cut; the largest to `lead`, if given."""
    places = [(i, j) for i in range(len(lefts)) for j in range(len(rights)) if i + j < terms]
    for i, j in sorted(places, key=sum, reverse=True):
        (acc if lead is None or i + j else lead).add(lefts[i], rights[j])


def product(lefts, rights, terms: int, base=None, *, interpret: bool):
    """base + left @ right, a float32 tile.

    The tensor core cuts sums off. Of three terms the product of the largest has a sum of its own, which has few bits, and what
    is cut off the others is nothing; base is added where additions round.
    """

    def run(acc, *lead):
        multiply(acc, lefts, rights, terms, *lead)
        found = acc.load(0)
        for other in lead:
            found += other.load(0)
        return found if base is None else found + base

    shape = lefts[0].shape[0], rights[0].shape[1]
    apart = terms >= WHOLE and max(len(lefts), len(rights)) > 1
    return accumulate.scoped(run, *[shape] * (1 + apart), interpret=interpret)


def strengths(beta):
    """beta as p b, p a power of two near its root: multiplying by p rounds nothing. float32, beta > 0."""
    _, exponent = jnp.frexp(beta)
    power = jnp.ldexp(jnp.float32(1), exponent // 2)
    return power, beta / power
