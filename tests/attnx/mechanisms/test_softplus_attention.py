"""LSSA and LSSAR: equal cosines average, lengths of queries and keys do not matter."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


@pytest.mark.parametrize('power', [0.0, 15.0])
def test_equal_cosines_and_lengths(power):
    mixer, x = oracle.build('softplus_attention', num_heads=2, power=power), oracle.inputs()
    y = oracle.run(mixer, x)
    mixer.query.kernel[...] = 3 * mixer.query.kernel[...]
    mixer.key.kernel[...] = 0.2 * mixer.key.kernel[...]
    close(oracle.run(mixer, x), y, 1e-4)  # the norm's 1e-6 is not invariant
    mixer.key.kernel[...] = jnp.zeros_like(mixer.key.kernel[...])
    value = oracle.heads(x, mixer.value, 2)
    mean = np.cumsum(value, axis=1) / np.arange(1, x.shape[1] + 1)[:, None, None]
    close(oracle.run(mixer, x), oracle.project(mean, mixer.out), tolerances.FLOAT32)
