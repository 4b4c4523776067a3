"""EchoAtt: a copying layer has the weights of its source to the bit, and no queries or keys."""

import jax
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx.nn import to_flat
from attnx.spec import Context, Dims
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


def chain(**fields):
    spec, dims = attnx.get('echo'), Dims(width=16, num_layers=2)
    make = lambda **f: jax.jit(lambda: spec.build(spec.config(**f), dims, rngs=nnx.Rngs(0)))()
    return make(**fields), make(source='shared')


def test_a_copy_has_the_weights_of_its_source():
    source, copy = chain()
    assert sorted(to_flat(copy)) == ['out/kernel', 'value/kernel']
    for name in ('value', 'out'):
        getattr(copy, name).kernel[...] = getattr(source, name).kernel[...]
    first = jax.jit(lambda m, x: m(x, Context()))(source, oracle.inputs())
    again = jax.jit(lambda m, x, shared: m(x, Context(shared=shared)).y)(copy, oracle.inputs(), first.shared)
    assert np.array_equal(again, first.y)
    x = oracle.inputs() + 1.0  # another input: other values under the same weights
    q, k = oracle.turn(oracle.heads(x - 1, source.query, 4)), oracle.turn(oracle.heads(x - 1, source.key, 2))
    expected = oracle.project(oracle.attend(q, k, oracle.heads(x, copy.value, 2), oracle.causal(12)), copy.out)
    again = jax.jit(lambda m, x, shared: m(x, Context(shared=shared)).y)(copy, x, first.shared)
    close(again, expected, tolerances.FLOAT32)


def test_a_source_alone_is_grouped_query_attention():
    (source, _), x = chain(), oracle.inputs()
    close(oracle.run(source, x), oracle.run(oracle.build('gqa', num_heads=4), x), tolerances.FLOAT32)


def test_refusals():
    config = attnx.get('echo').config
    with pytest.raises(ValueError, match='qk_norm: a layer that copies'):
        config(source='shared', qk_norm=True)
    source, _ = chain(num_kv_heads=4)
    made = jax.eval_shape(lambda x: source(x, Context()), oracle.inputs()).shared
    with pytest.raises(ValueError, match=r'weights of \(num_heads, num_kv_heads, head_dim\) \(4, 2, 4\)'):
        jax.eval_shape(lambda x, s: chain()[1](x, Context(shared=s)).y, oracle.inputs(), made)
