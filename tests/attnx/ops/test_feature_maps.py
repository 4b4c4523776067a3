import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.ops import feature_maps
from tests import tolerances
from tests.attnx.ops.recurrences import assert_close


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize('name', feature_maps.FIXED)
def test_fixed(name):
    """Width as announced, dtype kept, finite values and gradients on wide inputs, one token independent of others."""
    phi = feature_maps.fixed(name)
    x = jnp.concatenate([normal(3, 6), jnp.asarray([[0.0] * 6, [-200.0] * 6, [200.0, -200.0] * 3])])
    features, back = jax.vjp(phi, x)
    assert features.shape == (6, feature_maps.width(name, 6))
    assert phi(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert np.isfinite(features).all()
    assert np.isfinite(back(jnp.ones_like(features))[0]).all()
    assert_close(phi(x[:1]), features[:1], tolerances.FLOAT64)
    if name not in ('identity', 'silu', 'taylor'):
        assert (np.asarray(features) >= 0).all()


def test_values():
    x = jnp.asarray([-1.0, 2.0])
    expected = {
        'elu1': [np.exp(-1), 3.0],
        'exp': np.exp([-3.0, 0.0]),
        'exp_pair': np.exp([-3.0, 0.0, 0.0, -3.0]),
        # r = relu([-1, 2, 1, -2]) = [0, 2, 1, 0]; times r rolled by one = [0, 0, 2, 1]
        'dpfp': [0.0, 0.0, 2.0, 0.0],
    }
    for name, values in expected.items():
        assert_close(feature_maps.fixed(name)(x), np.array(values), tolerances.FLOAT64)
    assert_close(feature_maps.exp(x, shift=1.0), np.exp([-2.0, 1.0]), tolerances.FLOAT64)


def test_taylor_is_the_second_order_of_exp():
    q, k = normal(5, seed=1), normal(5, seed=2)
    s = float(q @ k) / np.sqrt(5)
    found = float(feature_maps.taylor(q) @ feature_maps.taylor(k))
    assert found == pytest.approx(1 + s + s**2 / 2, rel=tolerances.FLOAT64)


@pytest.mark.parametrize('normalize', ['joint', 'halves', 'none'])
def test_hedgehog(normalize):
    x, weight, bias = normal(2, 3, 4, 6), normal(4, 6, 5, seed=1), normal(4, 5, seed=2)
    y = jnp.einsum('btnh,nhf->btnf', x, weight) + bias
    found = feature_maps.hedgehog(x, weight, bias, normalize=normalize)
    raw = jnp.concatenate([jnp.exp(y), jnp.exp(-y)], axis=-1)
    totals = {'joint': raw.sum(-1, keepdims=True), 'none': 1.0}
    halves = [half / half.sum(-1, keepdims=True) for half in (jnp.exp(y), jnp.exp(-y))]
    expected = jnp.concatenate(halves, axis=-1) if normalize == 'halves' else raw / totals[normalize]
    assert_close(found, expected, tolerances.FLOAT64)


def test_hedgehog_floor_prevents_empty_rows():
    found = feature_maps.hedgehog(jnp.full((1, 1, 2), 1e4), jnp.ones((1, 2, 3)))
    assert float(found.min()) == 1e-12


def test_learned_linear_maps():
    x, weight, other = normal(2, 3, 4, 6), normal(4, 6, 5, seed=1), normal(4, 6, 5, seed=2)
    y, z = (jnp.einsum('btnh,nhf->btnf', x, w) for w in (weight, other))
    assert_close(feature_maps.t2r(x, weight), jnp.maximum(y, 0), tolerances.FLOAT64)
    assert_close(feature_maps.product(x, weight, other), y * z, tolerances.FLOAT64)


def test_bad_input():
    x, weight = normal(2, 3, 4, 6), normal(4, 6, 5)
    cases = [
        (lambda: feature_maps.fixed('elu_1'), "unknown feature map 'elu_1'; did you mean 'elu1'"),
        (lambda: feature_maps.t2r(x, weight[:2]), r'weight has shape \(2, 6, 5\), expected \[N, H, F\] = \(4, 6, F\)'),
        (lambda: feature_maps.t2r(x, weight, normal(5)), r'bias has shape \(5,\), expected \[N, F\] = \(4, 5\)'),
        (lambda: feature_maps.hedgehog(x, weight, normalize='half'), "did you mean 'halves'"),
        (lambda: feature_maps.dpfp(x, nu=0), 'nu is 0'),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_names_are_unique_maps():
    x = normal(4, 6)
    outputs = {name: np.asarray(feature_maps.fixed(name)(x)) for name in feature_maps.FIXED if name != 'dpfp'}
    for (a, x), (b, y) in itertools.combinations(outputs.items(), 2):
        assert x.shape != y.shape or not np.allclose(x, y), (a, b)
