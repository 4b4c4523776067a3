"""Head embeddings: their definition, their parameter count, and what they cancel to."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnx.nn import to_flat
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close

TABLES = ('query_heads', 'key_heads', 'value_heads')


def expected(mixer, x, turn):
    made = {}
    for name in ('query', 'key', 'value'):
        e = np.asarray(getattr(mixer, f'{name}_heads')[...], np.float64)
        y = oracle.heads(x, getattr(mixer, name), 1)
        made[name] = y + e if mixer.config.form == 'add' else y * (1 + e)
    q, k = turn(made['query']), turn(made['key'])
    return oracle.project(oracle.attend(q, k, made['value'], oracle.causal(x.shape[1])), mixer.out)


@pytest.mark.parametrize('form', ['add', 'mul'])
@pytest.mark.parametrize('position', ['rope', 'none'])
def test_is_its_definition(form, position):
    mixer, x = oracle.build('mhe', num_heads=4, form=form, position=position), oracle.inputs()
    turn = oracle.turn if position == 'rope' else lambda y: y
    close(oracle.run(mixer, x), expected(mixer, x, turn), tolerances.FLOAT32)


def test_without_position_a_shift_of_keys_cancels_and_a_scale_moves_to_queries():
    x = oracle.inputs()
    add = oracle.build('mhe', num_heads=4, form='add', position='none')
    before = oracle.run(add, x)
    add.key_heads[...] = jnp.zeros((4, 4))
    close(oracle.run(add, x), before, tolerances.FLOAT32)
    mul = oracle.build('mhe', num_heads=4, form='mul', position='none')
    before = oracle.run(mul, x)
    mul.query_heads[...] = (1 + mul.query_heads[...]) * (1 + mul.key_heads[...]) - 1
    mul.key_heads[...] = jnp.zeros((4, 4))
    close(oracle.run(mul, x), before, tolerances.FLOAT32)


def test_parameters():
    count = lambda name, **fields: sum(v.size for v in to_flat(oracle.build(name, num_heads=4, **fields)).values())
    n, h = 4, 4
    one = 3 * n * h * h + n * h * n * h  # projections of one head, and the output's
    assert count('mhe') == one + 3 * n * h
    assert count('mha') - count('mhe') == (3 * n**2 - 3 * n) * h**2 - 3 * n * h
