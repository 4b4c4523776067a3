"""Scores of layers and heads at their known values, and pruning that must change nothing."""

import jax
import numpy as np
import pytest
from flax import nnx

from attnx import config as config_lib
from attnx.interop import prune
from attnx.models import ModelConfig, build
from attnx.nn import from_flat, to_flat
from tests import tolerances
from tests.laws import close

TOKENS = np.random.default_rng(0).integers(0, 31, (2, 10)).astype(np.int32)
run = jax.jit(lambda m: m(TOKENS).logits)


@pytest.fixture(scope='module', params=['gqa', pytest.param('mha', marks=pytest.mark.slow)])
def source(request):
    mixer = {'kind': request.param, 'num_heads': 4, **({'num_kv_heads': 2, 'sinks': True} if request.param == 'gqa' else {})}
    fields = {'vocab_size': 31, 'width': 32, 'num_layers': 3, 'max_length': 32, 'pattern': ('a',), 'mixers': {'a': mixer}}
    config = config_lib.build(ModelConfig, {**fields, 'mlp': {'hidden': 16}}, 'config.model')
    return config, jax.jit(lambda: build(config, rngs=nnx.Rngs(0)))()


def edit(model, change):
    return from_flat(model, {k: change(v) if k.endswith('mixer/out/kernel') else v for k, v in to_flat(model).items()})


def test_a_layer_without_output_scores_zero(source):
    scores = jax.jit(lambda m: prune.layer_scores(m, TOKENS))(edit(source[1], lambda v: v.at[1].set(0)))
    assert abs(float(scores[1])) < 1e-6 and scores.shape == (3,) and (np.asarray(scores)[[0, 2]] > 1e-4).all()


def test_heads_score_what_they_add(source):
    """A head without an output projection scores 0; twice the projection, twice the score; padding does not count."""
    config, model = source
    ids = np.ones_like(TOKENS)
    ids[:, 7:] = 0
    score = lambda m, tokens: jax.jit(lambda m: prune.head_scores(m, config, tokens, segment_ids=ids)[2])(m)
    base = score(model, TOKENS)
    changed = edit(model, lambda v: v.at[2, :8].set(0).at[2, 16:24].multiply(-2))
    close(score(changed, TOKENS), base * np.array([0, 1, 2, 1]), tolerances.FLOAT32)
    moved = TOKENS.copy()
    moved[:, 7:] = 5
    close(score(model, moved), base, tolerances.FLOAT32)


def test_pruning_mute_heads_changes_nothing(source):
    config, model = source
    half = edit(model, lambda v: v.at[:, :16].set(0))  # half of the heads: of gqa, those that read the first key head
    smaller, target = prune.prune(half, config, TOKENS, heads=0.5)
    close(run(smaller), run(half), tolerances.FLOAT32)
    layer = target.layers()[0].config
    assert (layer.num_heads, layer.head_dim) == (2, 8)
    with pytest.raises(ValueError, match=r'heads 1.0 is not in \[0, 1\)'):
        prune.prune(half, config, TOKENS, heads=1.0)


def test_pruning_mute_neurons_changes_nothing(source):
    """Six hidden units that read nothing: their gate and value are 0."""
    config, model = source
    mute = {k: v.at[..., :6].set(0) if '/mlp/up/' in k else v for k, v in to_flat(model).items()}
    mute = from_flat(model, mute)
    scores = jax.jit(lambda m: prune.neuron_scores(m, TOKENS)[1])(mute)
    assert (np.asarray(scores) == 0).tolist() == [True] * 6 + [False] * 10
    smaller, target = prune.prune(mute, config, TOKENS, neurons=0.375)
    assert target.mlp.hidden == 10
    close(run(smaller), run(mute), tolerances.FLOAT32)


def test_similarity_of_maps(source):
    """1 with itself; of layers with equal queries and keys on equal inputs; in [0, 1]."""
    model = source[1]
    found = np.asarray(jax.jit(lambda m: prune.map_similarity(m, TOKENS))(model))
    assert np.allclose(np.diag(found), 1, atol=1e-6) and np.allclose(found, found.T) and (abs(found - 0.5) < 0.501).all()
    mute = edit(model, lambda v: 0 * v)  # every layer reads the embedding
    names = {k: v.at[1].set(v[0]) if '/mixer/' in k else v for k, v in to_flat(mute).items()}
    names = {k: 0 * v if k.endswith('mlp/down/kernel') else v for k, v in names.items()}
    same = np.asarray(jax.jit(lambda m: prune.map_similarity(m, TOKENS))(from_flat(model, names)))
    assert np.isclose(same[0, 1], 1, atol=1e-6) and same[0, 2] < 0.999


def test_alike_inner_layers_copy():
    alike = np.array([[1.0 if abs(i - j) < 2 else 0.5 for j in range(7)] for i in range(7)])
    assert prune.copying(alike, least=0.9) == ('own', 'own', 'own', 'copy', 'own', 'own', 'own')
    assert prune.copying(alike, least=0.5) == ('own', 'own', 'own', 'copy', 'copy', 'own', 'own')
    assert prune.copying(alike, least=1.1) == ('own',) * 7


def test_a_model_becomes_one_whose_layers_copy(source):
    import dataclasses

    from attnx.interop.convert import convert

    config, model = source
    who = prune.copying(prune.map_similarity(model, TOKENS), least=0.0, ends=1)
    assert who == ('own', 'own', 'own')
    deep = dataclasses.replace(config, num_layers=5)
    larger = jax.jit(lambda: build(deep, rngs=nnx.Rngs(0)))()
    who = prune.copying(prune.map_similarity(larger, TOKENS), least=0.0, ends=1)
    assert who == ('own', 'own', 'copy', 'copy', 'own')
    given = {k: v for k, v in config.mixers['a'].items() if k != 'kind'}
    mixers = {'own': {'kind': 'echo', **given}, 'copy': {'kind': 'echo', 'source': 'shared', **given}}
    if 'sinks' in given:
        mixers['copy'] = {k: v for k, v in mixers['copy'].items() if k not in ('sinks',)}
    target = dataclasses.replace(deep, pattern=who, mixers=mixers)
    assert run(convert(larger, deep, target)).shape == (2, 10, 31)
