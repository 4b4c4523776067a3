"""Fewer matrices: one merged matrix is two, shared and triangular ones are symmetric, values of x stay among x."""

import numpy as np
import pytest

from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


def test_merged_is_the_product_of_two():
    two = oracle.build('minimal_attention', similarity='separate')
    one, x = oracle.build('minimal_attention'), oracle.inputs()
    one.query.kernel[...] = two.query.kernel[...] @ two.key.kernel[...].T
    close(oracle.run(one, x), oracle.run(two, x), tolerances.FLOAT32)


@pytest.mark.parametrize('similarity', ['shared', 'cholesky'])
def test_symmetric_similarity(similarity):
    mixer, x = oracle.build('minimal_attention', similarity=similarity), oracle.inputs()
    query, key = (np.asarray(a, np.float64) for a in mixer.compare(x))
    scores = query @ np.swapaxes(key, 1, 2)
    close(scores, np.swapaxes(scores, 1, 2), tolerances.FLOAT32)
    assert (np.diagonal(scores, axis1=1, axis2=2) >= 0).all()
    y = np.asarray(oracle.run(mixer, x))
    assert (y <= np.maximum.accumulate(x, axis=1) + 1e-5).all() and (y >= np.minimum.accumulate(x, axis=1) - 1e-5).all()
