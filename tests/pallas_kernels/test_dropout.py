"""The bits of dropout: as documented, unbiased, without visible structure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dropout


def mix(x):
    x = np.asarray(x, np.uint32)
    x = x ^ (x >> 16)
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


@pytest.fixture(scope='module')
def kept():
    n = np.arange(1024, dtype=np.int32)
    return np.asarray(jax.jit(lambda s: dropout.keep(s, 1, 2, n[:, None], n[None], 0.25))(np.uint32(5))) - 0.75


def test_bits_are_as_documented():
    golden, seed = np.uint32(0x9E3779B9), np.array([4294967290], np.uint32)
    q, k = np.arange(70, dtype=np.uint32)[:, None], np.arange(200, dtype=np.uint32)[None]
    row = mix(q + mix(np.uint32(3) + mix(np.uint32(1) + mix(seed + golden))))
    x = row ^ mix((k // 64) * 32 + k % 32 + mix(seed ^ golden))
    x = x * np.uint32(0x9E3779B1)
    x = x ^ (x >> 15)
    x = x * np.uint32(0x85EBCA77)
    half = np.where(k % 64 < 32, x & 0xFFFF, x >> 16)
    got = dropout.keep(4294967290, 1, 3, jnp.arange(70)[:, None], jnp.arange(200)[None], 0.1)
    np.testing.assert_array_equal(got, half >= round(0.1 * 65536))


def test_rate_and_independence(kept):
    n, variance = kept.size, 0.25 * 0.75
    near = lambda mean, spread: abs(mean) < 5 * spread / np.sqrt(n)
    assert near(kept.mean(), np.sqrt(variance))
    for other in (np.roll(kept, 1, 0), np.roll(kept, 1, 1), np.roll(kept, 32, 1), np.roll(kept, 64, 1), kept.T):
        assert near((kept * other).mean(), variance * np.sqrt(2))
    corners = kept * np.roll(kept, 3, 0) * np.roll(kept, 5, 1) * np.roll(np.roll(kept, 3, 0), 5, 1)
    assert near(corners.mean(), variance**2 * 2)
    for axis in (0, 1):
        spread = kept.mean(axis).std() / np.sqrt(variance / 1024)
        assert 0.85 < spread < 1.15


def test_each_coordinate_matters(kept):
    n = np.arange(1024, dtype=np.int32)
    for seed, b, h in ((6, 1, 2), (5, 2, 2), (5, 1, 3), (5, 2, 1)):
        other = np.asarray(dropout.keep(jnp.uint32(seed), b, h, n[:, None], n[None], 0.25)) - 0.75
        assert abs((kept * other).mean()) < 5 * 0.25 * 0.75 / 1024


def test_value_type():
    drop = dropout.from_key(0.5, jax.random.key(0))
    assert drop.inverse_keep == 2 and drop.seed.dtype == jnp.uint32
    assert jax.tree.leaves(drop) == [drop.seed]
    assert dropout.Dropout(1e-9).threshold == 0
    for rate in (-0.1, 1.0, 0.999999, '0.1'):
        with pytest.raises(ValueError, match='rate'):
            dropout.check(dropout.Dropout(rate))
