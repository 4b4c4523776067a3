"""Scores: what happens to scaled logits. Small values to compose with `>>`, applied left to right.

    scores.alibi(slopes) >> scores.softcap(30.)

Any function of a logit and an index is a score too: `lambda s, i: s - 0.1 * abs(i.q - i.k)`. Floating operand arrays
get gradients in every implementation. `score >> None` is the score. Relative positions are k - q, sequences of different
lengths aligned at the end.
"""

import math

import jax.numpy as jnp
import numpy as np

from pallas_kernels.elementwise import Index, Operand, Score, Term, as_score

__all__ = [
    'Index', 'Operand', 'Score', 'Term', 'alibi', 'alibi_slopes', 'as_score', 'bias', 'relative', 'softcap', 't5',
    't5_buckets', 'temperature',
]  # fmt: skip


def bias(array) -> Score:
    """s + array, broadcast: [B|1, N|1, T|1, S|1], or without leading dimensions."""
    if array is None:
        raise ValueError('scores.bias: needs an array [B|1, N|1, T, S]; given None')
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating) or not 2 <= array.ndim <= 4:
        raise ValueError(
            f'scores.bias: array must be floating [B|1, N|1, T, S], given {array.dtype}{array.shape}'
            + ('; for a boolean mask: masks.array' if array.dtype == jnp.bool_ else '')
        )
    letters = 'bhqk'[-array.ndim :]
    # A dimension of size 1 is not indexed: its gradient then needs no [T, S] array either.
    letters, shape = zip(*((c, n) for c, n in zip(letters, array.shape) if n > 1)) if array.size > 1 else ((), ())
    return _add(array.reshape(shape), ''.join(letters))


def alibi(slopes, query_positions=None, key_positions=None, *, bidirectional: bool = False) -> Score:
    """s - slope_h (q - k): ALiBi (arXiv:2108.12409); bidirectional: s - slope_h |q - k|.

    Args:
      slopes: float [N], from `alibi_slopes` or learned.
      query_positions, key_positions: int [B, T] and [B, S], both or none: for decoding from a cache in any order.
    """
    operands = [Operand(_floating('alibi', 'slopes', slopes, 'N'), 'h')]
    if _both('alibi', query_positions, key_positions):
        operands += [Operand(jnp.asarray(query_positions), 'bq'), Operand(jnp.asarray(key_positions), 'bk')]
    return Score((Term(_alibi, tuple(operands), (bool(bidirectional),)),))


def alibi_slopes(num_heads: int) -> np.ndarray:
    """float32 [N]: 2^(-8h / N), h = 1…N, for a power of two; else those of the lower power P and every other of 2P."""
    if num_heads < 1:
        raise ValueError(f'scores.alibi_slopes: num_heads must be at least 1, given {num_heads}')
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power, 2)]
    return np.array(slopes[:num_heads], np.float32)


def t5_buckets(relative, num_buckets: int = 32, max_distance: int = 128, *, bidirectional: bool = False):
    """The bucket of each relative position k - q: exact up to half the buckets, then logarithmic to `max_distance`.

    As in T5's code (arXiv:1910.10683): keys ahead of their query share bucket 0, or, bidirectional, own the upper half.
    """
    even = 4 if bidirectional else 2
    if num_buckets < even or num_buckets % even:
        raise ValueError(f'scores.t5_buckets: num_buckets must be a positive multiple of {even}, given {num_buckets}')
    relative = jnp.asarray(relative)
    n = num_buckets // 2 if bidirectional else num_buckets
    base = jnp.where(relative > 0, n, 0) if bidirectional else 0
    distance = jnp.abs(relative) if bidirectional else jnp.maximum(-relative, 0)
    exact = n // 2
    if max_distance <= exact:
        raise ValueError(f'scores.t5_buckets: max_distance must exceed {exact}, given {max_distance}')
    # Where a bucket begins: the integers at which the logarithmic formula steps, found in exact host arithmetic.
    starts = [next(d for d in range(exact, max_distance + 1) if _log_bucket(d, exact, n, max_distance) >= bucket)
              for bucket in range(exact + 1, n)]  # fmt: skip
    large = exact + jnp.searchsorted(jnp.array(starts, jnp.int32), distance, side='right')
    return base + jnp.where(distance < exact, distance, large).astype(jnp.int32)


def _log_bucket(distance, exact, n, max_distance):
    if distance >= max_distance:
        return n - 1
    return min(n - 1, exact + int(math.log(distance / exact) / math.log(max_distance / exact) * (n - exact)))


def t5(
    table,
    query_length: int,
    key_length: int | None = None,
    *,
    max_distance: int = 128,
    bidirectional: bool = False,
    query_positions=None,
    key_positions=None,
) -> Score:
    """s + table[bucket(k - q), h]: T5's learned relative bias (arXiv:1910.10683). T5 itself uses scale=1.

    Args:
      table: float [num_buckets, N]; gets gradients.
      query_length, key_length: T and S (T by default); the bias is a strip of length T + S - 1 a head.
      query_positions, key_positions: int [B, T] and [B, S], both or none. With them the bias is a [B, N, T, S] array:
        for decoding, where T is small.
    """
    table = _floating('t5', 'table', table, 'num_buckets', 'N')
    find = lambda relative: t5_buckets(relative, table.shape[0], max_distance, bidirectional=bidirectional)
    if _both('t5', query_positions, key_positions):
        difference = jnp.asarray(key_positions)[:, None, :] - jnp.asarray(query_positions)[:, :, None]
        return bias(jnp.moveaxis(table[find(difference)], 3, 1))
    key_length = query_length if key_length is None else key_length
    buckets = find(jnp.arange(query_length + key_length - 1) - (key_length - 1))
    # A product rather than a gather, whose gradient would add in any order on an accelerator.
    chosen = (buckets == jnp.arange(table.shape[0])[:, None]).astype(table.dtype)
    return relative(jnp.einsum('bn,bx->nx', table, chosen, precision='highest'))


def relative(strip) -> Score:
    """s + strip[.., k - q]: any bias of the relative position.

    strip: float [T + S - 1], [N, T + S - 1] or [B, N, T + S - 1]; entry x is for keys x - (S - 1) tokens ahead of the
    query: x = S - 1 is the query's own position, lower entries are the past.
    """
    if strip is None:
        raise ValueError('scores.relative: needs a strip, float [N, T + S - 1]; given None')
    strip = jnp.asarray(strip)
    if not jnp.issubdtype(strip.dtype, jnp.floating) or not 1 <= strip.ndim <= 3:
        raise ValueError(f'scores.relative: strip must be float [N, T + S - 1], given {strip.dtype}{strip.shape}')
    return _add(strip, 'bhd'[-strip.ndim :])


def softcap(cap: float) -> Score:
    """cap · tanh(s / cap): bounded logits (Gemma 2, arXiv:2408.00118)."""
    if not isinstance(cap, int | float | np.number) or not 0 < cap < math.inf:
        raise ValueError(f'scores.softcap: cap must be a positive number, given {cap!r}')
    return Score((Term(_softcap, (), (float(cap),)),))


def temperature(value) -> Score:
    """s / value: a positive number, or a float array [] or [N] (learned, a head's own), which gets gradients."""
    if isinstance(value, int | float):
        if not 0 < value < math.inf:
            raise ValueError(f'scores.temperature: value must be positive, given {value!r}')
        return Score((Term(_divide, (), (float(value),)),))
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating) or value.ndim > 1:
        raise ValueError(f'scores.temperature: value must be float [] or [N], given {value.dtype}{value.shape}')
    return Score((Term(_divide, (Operand(value, 'h'[: value.ndim]),)),))


def _add(array, letters):
    return Score((Term(_sum, (Operand(array, letters),)),))


# Indices enter as exact float32 differences, and no logit is read twice: what a kernel's derivative rule likes.


def _sum(s, i, value):
    return s + value.astype(s.dtype)


def _alibi(s, i, slope, *rest):
    *positions, bidirectional = rest
    q, k = positions or (i.q + (i.k_len - i.q_len), i.k)
    ahead = (k - q).astype(s.dtype)
    return s + slope.astype(s.dtype) * (-abs(ahead) if bidirectional else ahead)


def _softcap(s, i, cap):
    return cap * jnp.tanh(s / cap)


def _divide(s, i, value):
    return s / (value.astype(s.dtype) if hasattr(value, 'astype') else value)


def _both(score, query_positions, key_positions) -> bool:
    if (query_positions is None) != (key_positions is None):
        raise ValueError(f'scores.{score}: give query_positions and key_positions both, or none')
    return query_positions is not None


def _floating(score, name, x, *dims):
    want = ', '.join(dims)
    if x is None:
        raise ValueError(f'scores.{score}: needs {name}, float [{want}]; given None')
    x = jnp.asarray(x)
    if x.ndim != len(dims) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f'scores.{score}: {name} must be float [{want}], given {x.dtype}{x.shape}')
    return x
