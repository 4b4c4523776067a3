"""Pooling against XLA's windows, borders of documents, and the cases in which it gives nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


def pool(x, size, pad):
    """Average pooling of [B, …, M] over the dimensions between, padding not counted."""
    total, count = (
        jax.lax.reduce_window(a, 0.0, jax.lax.add, (1, *size, 1), (1,) * a.ndim, ((0, 0), *pad, (0, 0)))
        for a in (jnp.asarray(x), jnp.ones_like(x))
    )
    return total / count - x


@pytest.mark.parametrize('window', [1, 3, 5])
def test_lines_and_grids(window):
    x, reach = oracle.inputs(), window // 2
    causal = oracle.build('pooling', window=window)
    close(oracle.run(causal, x), pool(x, (window,), ((window - 1, 0),)), tolerances.FLOAT32)
    both = oracle.build('pooling', causal=False, window=window)
    close(oracle.run(both, x), pool(x, (window,), ((reach, reach),)), tolerances.FLOAT32)
    grid = oracle.build('pooling', causal=False, window=window, grid=4)
    image = pool(x.reshape(2, 3, 4, 16), (window, window), ((reach, reach),) * 2)
    close(oracle.run(grid, x), image.reshape(x.shape), tolerances.FLOAT32)


def test_grids_do_not_reach_into_other_documents():
    x, ids = oracle.inputs(length=14), np.array([[1] * 6 + [2] * 6 + [0] * 2] * 2, np.int32)
    mixer = oracle.build('pooling', causal=False, grid=3)
    y = oracle.run(mixer, x, segment_ids=ids)
    for part in (slice(0, 6), slice(6, 12)):
        image = pool(x[:, part].reshape(2, 2, 3, 16), (3, 3), ((1, 1),) * 2)
        close(y[:, part], image.reshape(2, 6, 16), tolerances.FLOAT32)
    assert np.abs(y[:, 12:]).max() == 0


def test_constants_give_nothing():
    y = oracle.run(oracle.build('pooling'), jnp.ones((2, 9, 16)))
    assert np.abs(y).max() < 1e-6


def test_what_it_can_not_do_is_refused():
    with pytest.raises(ValueError, match='odd'):
        oracle.build('pooling', causal=False, window=4)
    with pytest.raises(ValueError, match='grid'):
        oracle.build('pooling', grid=4)
