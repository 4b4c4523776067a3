"""Signed weights: softmax where all logits are positive, and odd in the query."""

import jax.numpy as jnp
import numpy as np

from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


def test_positive_logits_make_it_softmax_and_the_query_s_sign_is_the_output_s():
    cog = oracle.build('cog', num_heads=2, position='none')
    for linear in (cog.query, cog.key):
        linear.kernel[...] = jnp.abs(linear.kernel[...])
    soft = oracle.build('gqa', num_heads=2, num_kv_heads=2, position='none')
    for name in ('query', 'key', 'value', 'out'):
        getattr(soft, name).kernel[...] = getattr(cog, name).kernel[...]
    x = np.abs(oracle.inputs())
    y = oracle.run(cog, x)
    close(y, oracle.run(soft, x), tolerances.FLOAT32)
    cog.query.kernel[...] = -cog.query.kernel[...]
    np.testing.assert_array_equal(oracle.run(cog, x), -np.asarray(y))
