"""The backward pass of parts of the keys: their shares, from output and log-sum-exp of the whole, add up to its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnx import ops
from attnx.ops import scores
from attnx.ops.softmax_backward import recalled
from pallas_kernels.elementwise import as_mask, as_score
from tests import tolerances
from tests.laws import close

B, T, S, N, K, H, CUT = 2, 24, 40, 4, 2, 16, 16
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


ARRAYS = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, H), jnp.asarray(scores.alibi_slopes(N))
COTANGENTS = normal(B, T, N, H).at[:, 3].set(0), normal(B, N, T).at[:, :, 3].set(0)  # a row that adds nothing
HIDDEN = 5  # a row that sees nothing


def options(slopes, first, scale):
    mask = as_mask(lambda i: (i.k + first <= i.q + 10) & (i.q != HIDDEN))
    return {'mask': mask, 'score': as_score(scores.temperature(slopes) >> scores.softcap(5.0)), 'scale': scale}


@functools.cache
def whole(scale):
    def call(query, key, value, slopes):
        chosen = options(slopes, 0, scale)
        return ops.softmax_attention(query, key, value, **chosen, return_lse=True, impl='reference')

    found, pull = jax.vjp(call, *ARRAYS)
    return found, pull(COTANGENTS)


@pytest.mark.parametrize('scale', [0.3, -0.3])
@pytest.mark.parametrize('impl', ['reference', 'xla', pytest.param('mosaic_tpu', marks=pytest.mark.slow)])
def test_parts_add_up(impl, scale):
    known, expected = whole(scale)

    def part(first, last):
        def call(query, key, value, slopes):
            return recalled(impl, query, key, value, known=known, dropout=None, **options(slopes, first, scale))

        query, key, value, slopes = ARRAYS
        found, pull = jax.vjp(call, query, key[:, first:last], value[:, first:last], slopes)
        np.testing.assert_array_equal(found[0], known[0])
        return pull(COTANGENTS)

    with pltpu.force_tpu_interpret_mode() if impl == 'mosaic_tpu' else jax.default_matmul_precision('highest'):
        one, two = jax.jit(part, static_argnums=(0, 1))(0, CUT), jax.jit(part, static_argnums=(0, 1))(CUT, S)
    joined = lambda n: jnp.concatenate([one[n], two[n]], axis=1)
    for got, want in zip((one[0] + two[0], joined(1), joined(2), one[3] + two[3]), expected):
        close(got, want, tolerances.FLOAT32_GRAD)
