"""Counter-based dropout of attention weights: the same bits in every implementation, block size and recomputation.

The bits (all uint32, wrapping; indices are absolute, so no tile size enters):

    mix(x)   x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16
    row      mix(q + mix(h + mix(b + mix(seed + GOLDEN))))              a vector over a tile's rows
    word     (k // 64) * 32 + k % 32                                    one word serves columns k and k + 32 of 64
    column   mix(word + mix(seed ^ GOLDEN))                             a vector over half a tile's columns
    x        row ^ column; x *= 0x9e3779b1; x ^= x >> 15; x *= 0x85ebca77
    half     x & 0xffff where k % 64 < 32, else x >> 16
    keep     half >= round(rate * 65536)

So a kernel hashes half of its columns and takes both halves of each word: in aligned groups of 64 columns the first
32 are the low halves, the next 32 the high halves. A rate is rounded to a multiple of 1/65536, `inverse_keep` likewise.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = np.uint32(0x9E3779B9)


@dataclasses.dataclass(frozen=True, eq=False)
class Dropout:
    """Drops attention weights after the softmax with probability `rate` and scales the kept ones by 1 / (1 - rate).

    Attributes:
      rate: Python float in [0, 1), static.
      seed: uint32 scalar (an int will do); a fresh one each step and layer. Under `jax.shard_map` the indices are a
        shard's own: mix the shard's number into the seed, say by `from_key` of a folded key.
    """

    rate: float
    seed: Any = 0

    @property
    def threshold(self) -> int:
        return round(self.rate * 65536)

    @property
    def inverse_keep(self) -> float:
        """1 / (1 - rate), of the rate as rounded."""
        return 65536 / (65536 - self.threshold)


jax.tree_util.register_dataclass(Dropout, data_fields=['seed'], meta_fields=['rate'])


def from_key(rate: float, key: jax.Array) -> Dropout:
    """`Dropout` with a seed drawn from a JAX key."""
    return Dropout(rate, jax.random.bits(key, (), jnp.uint32))


def check(dropout: Dropout | None) -> None:
    """Raises ValueError unless `dropout` is None or a `Dropout` with a rate in [0, 1) and a scalar integer seed."""
    if dropout is None:
        return
    if not isinstance(dropout, Dropout):
        raise ValueError(f'dropout must be None or Dropout(rate, seed), given {type(dropout).__name__} {dropout!r}')
    if not isinstance(dropout.rate, float | int) or not 0 <= dropout.rate < 1 or dropout.threshold >= 65536:
        raise ValueError(f'dropout: rate must be a Python number in [0, 1), given {dropout.rate!r}')
    if jnp.shape(dropout.seed) != () or not jnp.issubdtype(jnp.result_type(dropout.seed), jnp.integer):
        raise ValueError(
            f'dropout: seed must be one integer, given {jnp.result_type(dropout.seed)}{jnp.shape(dropout.seed)}; '
            'from a JAX key: dropout.from_key(rate, key)'
        )


def mix(x):
    """A full avalanche of 32 bits: each input bit flips each output bit about half the time."""
    x = x ^ (x >> 16)
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def row_hash(seed, b, h, q):
    """uint32 per (b, h, q), broadcast."""
    seed, b, h, q = u32(seed), u32(b), u32(h), u32(q)
    return mix(q + mix(h + mix(b + mix(seed + GOLDEN))))


def column_hash(seed, word):
    """uint32 per word; `word` is (k // 64) * 32 + k % 32."""
    return mix(u32(word) + mix(u32(seed) ^ GOLDEN))


def combine(row, column):
    """The random word of a row hash and a column hash."""
    x = row ^ column
    x = x * np.uint32(0x9E3779B1)
    x = x ^ (x >> 15)
    return x * np.uint32(0x85EBCA77)


def keep(seed, b, h, q, k, rate: float):
    """Whether the weight at (b, h, q, k) is kept: bool, the indices' broadcast shape."""
    k = u32(k)
    x = combine(row_hash(seed, b, h, q), column_hash(seed, (k >> 6) * 32 + (k & 31)))
    half = jnp.where((k & 32) == 0, x & np.uint32(0xFFFF), x >> 16)
    return half >= np.uint32(round(rate * 65536))


def u32(x):
    """x as uint32, wrapping."""
    # An int may exceed int32, and jnp.asarray would refuse it.
    return jnp.uint32(x & 0xFFFFFFFF) if isinstance(x, int) else jnp.asarray(x).astype(jnp.uint32)
