"""Gaussian gates: flat ones share out equally, gates sum to one, two equal bells are one narrower bell."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnx.spec import Context
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


@pytest.mark.parametrize('axis, causal', [('features', True), ('time', False)])
def test_gates(axis, causal):
    build = lambda k: oracle.build('gaussian_adaptive', causal=causal, num_heads=2, num_gaussians=k, axis=axis)
    one, two, x = build(1), build(2), oracle.inputs()
    heads = jnp.asarray(x.reshape(2, 12, 2, 8))
    gate = np.asarray(one.gate(heads, None, 0))
    close(gate.sum({'features': -1, 'time': 1}[axis]), 1.0 + 0 * gate.sum({'features': -1, 'time': 1}[axis]), 1e-5)
    two.width[...] = jnp.repeat(one.width[...], 2, axis=-1) * 2**0.5
    close(two.gate(heads, None, 0), gate, tolerances.FLOAT32)
    order = np.random.default_rng(0).permutation(8 if axis == 'features' else 12)
    turned = heads[..., order] if axis == 'features' else heads[:, order]
    expected = gate[..., order] if axis == 'features' else gate[:, order]
    close(one.gate(turned, None, 0), expected, tolerances.FLOAT32)
    importance = np.asarray(one.importance(x, Context()))
    assert importance.min() == 0 and importance.max() == 1 and importance.shape == x.shape
    one.width[...] = jnp.full_like(one.width[...], 1e4)
    close(oracle.run(one, x), x / (8 if axis == 'features' else 12), tolerances.FLOAT32)
