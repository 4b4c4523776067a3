"""Operands of masks and scores in blocks of queries and keys; `pallas_kernels.elementwise.Operand` says what they are.

`sizes` is what has the lengths T and S and those of a block, bq and bk; (i, j) is a block's place.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.elementwise import Operand


def fitted(o: Operand, sizes):
    """An operand padded to whole blocks. Block (i, j) then reads a strip from j bk - i bq + (padded T) - bq on."""
    x = jnp.asarray(o.array)
    more = {'q': (0, -sizes.T % sizes.bq), 'k': (0, -sizes.S % sizes.bk), 'd': (-sizes.T % sizes.bq, -sizes.S % sizes.bk)}
    pad = [more.get(c, (0, 0)) for c in o.index]
    return jnp.pad(x, pad) if any(map(any, pad)) else x


def _starts(o, sizes, i, j):
    nq = -(-sizes.T // sizes.bq)
    start = {'q': i * sizes.bq, 'k': j * sizes.bk, 'd': j * sizes.bk - i * sizes.bq + (nq - 1) * sizes.bq}
    return [jnp.asarray(start.get(c, 0), jnp.int32) for c in o.index]


def part(o, array, sizes, i, j):
    """An operand's part for block (i, j), in its own dimensions."""
    size = {'q': sizes.bq, 'k': sizes.bk, 'd': sizes.bq + sizes.bk - 1}
    return lax.dynamic_slice(array, _starts(o, sizes, i, j), [size.get(c, n) for c, n in zip(o.index, array.shape)])


def spread(o, x, sizes):
    """An operand's part as a tile that broadcasts against [B, N, bq, bk]."""
    order = sorted(range(x.ndim), key=lambda a: 'bhqkd'.index(o.index[a]))
    x, letters = jnp.transpose(x, order), ''.join(sorted(o.index, key='bhqkd'.index))
    if letters.endswith('d'):
        # tile[r, c] = x[c - r + bq - 1]: rows of a skewed copy, without a gather, so that its transpose is a plain sum.
        width = sizes.bq + sizes.bk
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
        x = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], sizes.bq, width)).reshape(*x.shape[:-1], -1)
        x = x[..., sizes.bq - 1 : sizes.bq * width - 1].reshape(*x.shape[:-1], sizes.bq, width - 1)[..., : sizes.bk]
        letters = letters[:-1] + 'qk'
    shape = [1] * 4
    for c, n in zip(letters, x.shape):
        shape['bhqk'.index(c)] = n
    return x.reshape(shape)


def add(total, o, x, sizes, i, j):
    """`total`, of an operand's shape, and x, of its part for block (i, j), added to it there."""
    return lax.dynamic_update_slice(total, part(o, total, sizes, i, j) + x.astype(total.dtype), _starts(o, sizes, i, j))
