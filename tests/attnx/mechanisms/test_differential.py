"""Differential attention: its definition, and what it is when both maps agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.mechanisms.softmax.differential import lambda_init
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


def expected(mixer, x, layer):
    n, k = mixer.num_heads, mixer.num_kv_heads
    q, key = oracle.turn(oracle.heads(x, mixer.query, 2 * n)), oracle.turn(oracle.heads(x, mixer.key, 2 * k))
    v = oracle.heads(x, mixer.value, k)
    start = 0.8 - 0.6 * np.exp(-0.3 * layer)
    (a1, b1), (a2, b2) = (np.asarray(p[...], np.float64) for p in (mixer.first, mixer.second))
    share = np.exp(a1 @ b1) - np.exp(a2 @ b2) + start
    q, key = np.split(q, 2, axis=2), np.split(key, 2, axis=2)
    maps = [oracle.attend(q[i], key[i], v, oracle.causal(x.shape[1])) for i in (0, 1)]
    return oracle.project(oracle.rms(maps[0] - share * maps[1], 1e-5) * (1 - start), mixer.out)


@pytest.mark.parametrize('num_kv_heads', [1, 2])
def test_is_its_definition_at_any_layer(num_kv_heads):
    mixer, x = oracle.build('differential', num_heads=2, num_kv_heads=num_kv_heads), oracle.inputs()
    for layer in (0, 7):
        close(oracle.run(mixer, x, layer=layer), expected(mixer, x, layer), tolerances.FLOAT32)


def test_lambda_starts_at_a_fifth_and_grows_to_four_fifths():
    close(lambda_init(jnp.arange(3)), 0.8 - 0.6 * np.exp(-0.3 * np.arange(3)), tolerances.FLOAT32)
    assert abs(float(lambda_init(0)) - 0.2) < 1e-6 and abs(float(lambda_init(100)) - 0.8) < 1e-6


def test_equal_maps_leave_a_share_of_one_and_the_norm_removes_it():
    mixer, x = oracle.build('differential', num_heads=2), oracle.inputs()
    for f in (mixer.query, mixer.key):
        half = f.kernel[...].shape[1] // 2
        f.kernel[...] = jnp.tile(f.kernel[...][:, :half], (1, 2))
    out = oracle.run(mixer, x)
    mixer.first[...] = mixer.first[...] + 0.3  # another lambda: the same direction up to sign
    moved = oracle.run(mixer, x)
    close(jnp.abs(moved), jnp.abs(out), 1e-3)  # the norm's eps is not scaled along


def test_both_maps_drop_apart():
    mixer, x = oracle.build('differential', num_heads=2, dropout=0.5), oracle.inputs()
    for f in (mixer.query, mixer.key):
        half = f.kernel[...].shape[1] // 2
        f.kernel[...] = jnp.tile(f.kernel[...][:, :half], (1, 2))
    y, again, other = (np.asarray(oracle.run(mixer, x, key=jax.random.key(seed))) for seed in (0, 0, 1))
    assert np.array_equal(y, again) and not np.allclose(y, other)
    # Dropped alike, equal maps would still be a share of one, which the norm removes: as many heads, alike up to sign.
    mixer.first[...] = mixer.first[...] + 0.3
    moved = np.asarray(oracle.run(mixer, x, key=jax.random.key(0)))
    assert not np.allclose(np.abs(moved), np.abs(y), atol=1e-2)
