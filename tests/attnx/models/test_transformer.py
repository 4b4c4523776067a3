"""Stacks, overrides, kinds of models, and what bad configs raise."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import config as config_lib
from attnx.models import ModelConfig, StackConfig, build
from attnx.models.config import units
from attnx.nn import flat_axes, from_flat, to_flat
from tests import tolerances
from tests.laws import close

SMALL = {'vocab_size': 31, 'width': 32, 'num_layers': 4, 'max_length': 32, 'pattern': ('retnet', 'gqa')}
CHEAP = {'pattern': ('gqa', 'pooling'), 'num_layers': 2}  # for what does not depend on the mechanism


def model_of(**fields):
    config = config_lib.build(ModelConfig, {**SMALL, **fields}, 'config.model')
    return config, jax.jit(lambda: build(config, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope='module')
def tokens():
    return np.random.default_rng(0).integers(0, 31, (2, 20)).astype(np.int32)


def test_pattern_becomes_stacks():
    config = config_lib.build(ModelConfig, {**SMALL, 'num_layers': 9, 'overrides': {4: 'gqa'}}, 'config.model')
    cut = [([layer.name for layer in unit], repeats) for unit, repeats in units(config.layers(), 2)]
    assert cut == [(['retnet', 'gqa'], 2), (['gqa', 'gqa'], 1), (['retnet', 'gqa'], 1), (['retnet'], 1)]


def test_scan_equals_layer_by_layer(tokens):
    """The scanned stack computes what its layers compute one after another, with their own indices."""
    for fields in ({**CHEAP, 'overrides': {2: 'pooling'}, 'num_layers': 5}, {'pattern': ('differential',), 'num_layers': 2}):
        _, model = model_of(**fields)
        out = jax.jit(lambda m, t: m(t).logits)(model, tokens)
        traced = jax.jit(lambda m, t: dict(m.trace(t)))(model, tokens)
        assert traced.keys() == {'embedding', 'logits', *(f'layer_{i}' for i in range(fields['num_layers']))}
        close(out, traced['logits'], tolerances.FLOAT32)


@pytest.mark.quick('norm,norm_position,positions,tie_embeddings', 'mlp,positions,logit_softcap', 'remat1')
@pytest.mark.parametrize(
    'fields',
    [
        {'norm': 'layernorm', 'norm_position': 'post', 'positions': 'learned', 'tie_embeddings': False},
        {'mlp': {'kind': 'relu2', 'bias': True}, 'positions': 'sinusoidal', 'logit_softcap': 5.0},
        {'remat': 'full'},
        {'remat': 'dots'},
        {'mixers': {'a': {'kind': 'gqa', 'qk_norm': True, 'num_kv_heads': 1}}, 'pattern': ('a',), 'mlp': {'kind': 'gelu'}},
    ],
    ids=lambda f: ','.join(f),
)
def test_every_option_takes_effect_and_trains(fields, tokens):
    _, model = model_of(**{**CHEAP, **fields})
    loss = lambda m: jnp.mean(jnp.square(m(tokens).logits))
    value, grads = jax.jit(jax.value_and_grad(loss))(model)
    assert np.isfinite(value)
    assert all(np.abs(np.asarray(g)).max() > 0 for g in to_flat(grads).values())
    _, plain = model_of(**CHEAP)
    expected, expected_grads = jax.jit(jax.value_and_grad(loss))(plain)
    if 'remat' not in fields:
        assert value != expected
        return
    for name, g in to_flat(expected_grads).items():
        close(to_flat(grads)[name], g, tolerances.FLOAT32_GRAD)


def test_dropout_needs_a_key_and_differs_by_layer(tokens):
    _, model = model_of(**CHEAP, dropout=0.5)
    run = jax.jit(lambda m, key: m(tokens, key=key).logits)
    plain, one, again, other = run(model, None), *(run(model, jax.random.key(k)) for k in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.allclose(one, other) and not np.allclose(one, plain)


def test_packed_rows_equal_separate_rows(tokens):
    _, model = model_of()
    ids = np.array([[1] * 8 + [2] * 9 + [0] * 3] * 2, np.int32)
    positions = np.array([[*range(8), *range(9), *range(3)]] * 2, np.int32)
    run = jax.jit(lambda m, t, i, p: m(t, segment_ids=i, positions=p).logits)
    packed = run(model, tokens, ids, positions)
    alone = np.zeros_like(tokens)
    alone[:, :9] = tokens[:, 8:17]
    alone_ids = np.array([[1] * 9 + [0] * 11] * 2, np.int32)
    expected = run(model, alone, alone_ids, np.tile(np.arange(20, dtype=np.int32), (2, 1)))
    close(packed[:, 8:17], expected[:, :9], tolerances.FLOAT32)


def test_encoder_classifies_and_ignores_padding(tokens):
    _, model = model_of(kind='encoder', pattern=('gqa',), num_classes=10, vocab_size=0, input_dim=4)
    x = np.random.default_rng(0).standard_normal((2, 20, 4)).astype(np.float32)
    ids = np.ones((2, 20), np.int32)
    ids[:, 15:] = 0
    moved = x.copy()
    moved[:, 15:] = 9.0
    run = jax.jit(lambda m, x: m(x, segment_ids=ids).logits)
    assert run(model, x).shape == (2, 10)
    close(run(model, moved), run(model, x), tolerances.FLOAT32)
    with pytest.raises(ValueError, match='has no next token'):
        attnx.generate(model, [[1]], max_new_tokens=1, temperature=0)


def test_encoder_decoder_reads_its_source(tokens):
    fields = {'kind': 'encoder_decoder', 'pattern': ('gqa',), 'num_layers': 2}
    fields['encoder'] = {'num_layers': 2, 'pattern': ('gqa',)}
    _, model = model_of(**fields)
    run = jax.jit(lambda m, s: m(tokens, source=s).logits)
    source = tokens[:, ::-1].copy()
    assert not np.allclose(run(model, source), run(model, tokens))
    with pytest.raises(ValueError, match='reads a source'):
        model(tokens)
    found = attnx.generate(model, [[1, 2], [3]], max_new_tokens=3, temperature=0, source=jnp.asarray(source))
    assert [len(row) for row in found] == [3, 3]


def test_flat_view_round_trips():
    _, model = model_of()
    flat = to_flat(model)
    assert flat.keys() == flat_axes(model).keys()
    again = from_flat(model, flat)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    with pytest.raises(ValueError, match='parameters missing'):
        from_flat(model, dict(list(flat.items())[1:]))
    with pytest.raises(ValueError, match='not of this model'):
        from_flat(model, {**flat, 'other': 1})


@pytest.mark.slow
def test_compile_time_does_not_grow_with_depth():
    """48 layers of a two-layer pattern compile in at most 1.5 times the time of one unit. CPU time, best of two."""

    def seconds(num_layers):
        config = config_lib.build(ModelConfig, {**SMALL, 'num_layers': num_layers}, 'config.model')
        abstract = jax.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
        ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
        step = jax.grad(lambda m, t: jnp.sum(m(t).logits))
        best = float('inf')
        for _ in range(2):
            jax.clear_caches()
            start = time.process_time()
            jax.jit(step).lower(abstract, ids).compile()
            best = min(best, time.process_time() - start)
        return best

    jax.config.update('jax_enable_compilation_cache', False)
    try:
        assert seconds(48) < 1.5 * seconds(2)
    finally:
        jax.config.update('jax_enable_compilation_cache', True)


@pytest.mark.parametrize(
    'fields, expected',
    [
        ({'widht': 3}, "config.model.widht; did you mean 'width'"),
        ({'pattern': ('glaa',)}, "did you mean 'gla'"),
        ({'pattern': ()}, 'pattern is empty'),
        ({'pattern': 'gla'}, 'expected a tuple'),
        ({'overrides': {17: 'gla'}}, r'not an integer in \[0, 4\)'),
        ({'mixers': {'a': {'kind': 'gla', 'window': 3}}, 'pattern': ('a',)}, 'unknown key config.model.mixers.a.window'),
        ({'mixers': {'a': {'num_heads': 3}}, 'pattern': ('a',)}, "has no 'kind'"),
        ({'mixers': {'a': {'kind': 'gqa', 'num_heads': 3}}, 'pattern': ('a',)}, 'does not divide'),
        ({'mixers': {'a': {'kind': 'gqa', 'num_heads': 5, 'num_kv_heads': 5}}, 'pattern': ('a',)}, '5 heads'),
        ({'mixers': {'a': {'kind': 'gqa', 'masks': (('windw', 4),)}}, 'pattern': ('a',)}, "did you mean 'window'"),
        ({'kind': 'encoder', 'pattern': ('gla',)}, 'causal only'),
        ({'width': 'wide'}, 'expected int, was given str'),
        ({'dtype': 'bf16'}, "did you mean 'bfloat16'"),
        ({'vocab_size': 0}, 'a vocabulary of at least 1'),
        ({'mixers': {'a': {'kind': 'gqa', 'window': 3}}}, 'mixers.a sets window, but no layer'),
        ({'kind': 'encoder', 'num_classes': 3, 'pattern': ('gqa',), 'tie_embeddings': True}, 'no embedding to read logits'),
        ({'encoder': {'num_layers': 3}}, 'belong to kind encoder_decoder'),
    ],
)
def test_bad_configs_name_what_is_wrong(fields, expected):
    start = time.monotonic()
    with pytest.raises(ValueError, match=expected):
        config = config_lib.build(ModelConfig, {**SMALL, **fields}, 'config.model')
        jax.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    assert time.monotonic() - start < 5


def test_stack_config_of_the_encoder_is_strict():
    given = {'kind': 'encoder_decoder', 'encoder': {'num_layers': 3}}
    assert config_lib.build(ModelConfig, given).encoder == StackConfig(num_layers=3)
    assert dataclasses.is_dataclass(config_lib.build(ModelConfig, {}).mlp)


@pytest.mark.parametrize(('unroll', 'barriers'), [(1, 4), (0, 0)])
def test_products_are_kept_from_being_computed_twice_in_a_loop(unroll, barriers):
    """XLA's GPU compiler otherwise clones a product whose result also goes to the loop's stack."""
    fields = SMALL | {'pattern': ('gqa',), 'mlp': {'kind': 'none'}, 'unroll': unroll, 'impl': 'reference'}
    config = config_lib.build(ModelConfig, fields, 'config.model')
    model = jax.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    text = str(jax.make_jaxpr(lambda model: model(jnp.zeros((1, 4), jnp.int32)).logits)(model))
    assert text.count('optimization_barrier') - barriers in (0, 1), text  # one more for the op's own result
