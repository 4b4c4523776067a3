"""Plain means: grouped-query attention without a query; what broadcasting keeps and halves."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


def test_is_attention_without_a_query():
    mixer, plain = oracle.build('uniform_attention'), oracle.build('gqa', num_heads=2, num_kv_heads=2)
    plain.query.kernel[...] = jnp.zeros_like(plain.query.kernel[...])
    for name in ('value', 'out'):
        getattr(plain, name).kernel[...] = getattr(mixer, name).kernel[...]
    x = oracle.inputs()
    close(oracle.run(mixer, x), oracle.run(plain, x), tolerances.FLOAT32)


@pytest.mark.parametrize('form, share, spread', [('broadcast', 1.0, 0.5), ('scaled', 1.5, 1.0)])
def test_broadcasting(form, share, spread):
    """The mean becomes `share` times itself, deviations `spread` times theirs."""
    mixer, x = oracle.build('uniform_attention', causal=False, form=form), oracle.inputs()
    if form == 'scaled':
        close(oracle.run(mixer, x), x, tolerances.FLOAT32)  # the start
        mixer.scale[...] = jnp.full((16,), 0.5)
    y, mean = np.asarray(oracle.run(mixer, x)), x.mean(axis=1, keepdims=True)
    close(y, share * mean + spread * (x - mean), tolerances.FLOAT32)
