"""Sparse query attention: grouped-query attention with fewer query heads than the width has room for."""

import jax
import numpy as np
import pytest

import attnx
from attnx.spec import Dims
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close

PLACES, WIDTH = 16, 64  # heads that the width has room for; the table of the paper
VARIANTS = {'sqa': (8, 4), 'ssqa': (8, 8), 'xsqa': (4, 4), 'xsmqa': (4, 1)}


@pytest.mark.parametrize(('num_heads', 'num_kv_heads'), VARIANTS.values(), ids=VARIANTS)
def test_is_its_definition_at_its_cost(num_heads, num_kv_heads):
    fields = {'num_kv_heads': num_kv_heads, 'head_dim': WIDTH // PLACES}
    mixer = oracle.build('gqa', width=WIDTH, num_heads=num_heads, **fields)
    x = oracle.inputs(width=WIDTH)
    q, k = oracle.turn(oracle.heads(x, mixer.query, num_heads)), oracle.turn(oracle.heads(x, mixer.key, num_kv_heads))
    out = oracle.attend(q, k, oracle.heads(x, mixer.value, num_kv_heads), oracle.causal(x.shape[1]))
    close(oracle.run(mixer, x), oracle.project(out, mixer.out), tolerances.FLOAT32)

    spec, dims = attnx.get('gqa'), Dims(width=WIDTH)
    flops = lambda n: spec.flops(spec.config(num_heads=n, **fields), dims, 4096)
    assert flops(PLACES) / flops(num_heads) == PLACES / num_heads
    kept = sum(np.prod(a.shape[2:]) for a in jax.eval_shape(lambda: mixer.init_state(1, 8)).arrays)
    assert kept == 2 * num_kv_heads * WIDTH // PLACES  # the cache follows K, the cost of scores N
