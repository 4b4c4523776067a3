"""Conversions: what they must leave alone, and the identities of each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import config as config_lib
from attnx.interop import convert as lib
from attnx.models import ModelConfig, build
from attnx.nn import from_flat, to_flat
from tests import tolerances
from tests.laws import close

BASE = {'vocab_size': 31, 'width': 32, 'num_layers': 4, 'max_length': 32, 'pattern': ('a',), 'mlp': {'hidden': 16}}
SOURCE = {'kind': 'gqa', 'num_heads': 4, 'num_kv_heads': 2, 'position': 'none'}
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 10)).astype(np.int32)
run = jax.jit(lambda m: m(TOKENS).logits)


def config_of(**mixers):
    names = mixers.pop('pattern', ('a',)), mixers.pop('overrides', {})
    fields = {**BASE, 'pattern': names[0], 'overrides': names[1], 'mixers': mixers}
    return config_lib.build(ModelConfig, fields, 'config.model')


@pytest.fixture(scope='module')
def source():
    config = config_of(a=SOURCE)
    return config, jax.jit(lambda: build(config, rngs=nnx.Rngs(0)))()


def test_layers_round_trip():
    config = config_of(a=SOURCE, b={'kind': 'gla'}, pattern=('a', 'b'), overrides={2: 'b'})
    flat = jax.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    flat = {k: jnp.arange(v.size, dtype=v.dtype).reshape(v.shape) for k, v in to_flat(flat).items()}
    rest, layers = lib.by_layer(config, flat)
    assert not any('stacks' in name for name in rest) and [('mixer/gate/kernel' in p) for p in layers].count(True) <= 3
    again = lib.from_layers(config, rest, layers)
    assert again.keys() == flat.keys() and all(np.array_equal(again[k], flat[k]) for k in flat)


@pytest.mark.parametrize(
    'target',
    [
        {'kind': 'moh', 'num_heads': 4, 'num_kv_heads': 2, 'shared_heads': 1, 'top_k': 3},
        {'kind': 'moh', 'num_heads': 4, 'num_kv_heads': 2, 'shared_heads': 1, 'top_k': 3, 'router': 'norm'},
        {'kind': 'cla'},
        {'kind': 'echo'},
    ],
    ids=lambda t: ' '.join(map(str, t.values())),
)
def test_all_heads_on_and_own_keys_change_nothing(source, target):
    config, model = source
    changed = config_of(a=SOURCE, b={**target, 'position': 'none'}, overrides={1: 'b', 3: 'b'})
    close(run(lib.convert(model, config, changed)), run(model), tolerances.FLOAT32)


def test_readers_lose_what_they_read(source):
    config, model = source
    for kind, lost in (('cla', {'key/kernel', 'value/kernel'}), ('echo', {'key/kernel', 'query/kernel'})):
        both = {'a': {'kind': kind, 'position': 'none'}, 'b': {'kind': kind, 'source': 'shared'}}
        target = config_of(**both, pattern=('a', 'b'))
        _, layers = lib.by_layer(target, to_flat(lib.convert(model, config, target)))
        _, old = lib.by_layer(config, to_flat(model))
        assert {f'mixer/{name}' for name in lost} == set(old[1]) - set(layers[1]) and set(old[0]) == set(layers[0])


def test_pooled_heads_are_means(source):
    config, model = source
    target = config_of(a={**SOURCE, 'num_kv_heads': 1})
    kernel = to_flat(model)['body/stacks/0/layers/0/mixer/key/kernel']
    found = to_flat(lib.convert(model, config, target))['body/stacks/0/layers/0/mixer/key/kernel']
    close(found, (kernel[..., :8] + kernel[..., 8:]) / 2, tolerances.FLOAT32)
    twins = {k: jnp.tile(v[..., :8], 2) if k.endswith(('mixer/key/kernel', 'mixer/value/kernel')) else v
             for k, v in to_flat(model).items()}  # fmt: skip
    twins = from_flat(model, twins)
    close(run(lib.convert(twins, config, target)), run(twins), tolerances.FLOAT32)


LATENT = {'kind': 'mla', 'num_heads': 4, 'head_dim': 6, 'rope_dim': 2, 'value_dim': 8, 'latent_norm': False, 'position': 'none'}


@pytest.mark.parametrize('query_rank', [0, 32])
def test_full_rank_latents_are_exact_where_heads_share_the_rotated_part(source, query_rank):
    config, model = source

    def share(name, v):  # the last two channels of both key heads, alike
        return v.at[..., 14:16].set(v[..., 6:8]) if name.endswith('mixer/key/kernel') else v

    alike = from_flat(model, {k: share(k, v) for k, v in to_flat(model).items()})
    target = config_of(a={**LATENT, 'kv_rank': 32, 'query_rank': query_rank})
    student = lib.convert(alike, config, target)
    close(run(student), run(alike), tolerances.FLOAT32_GRAD)  # the SVD's own rounding
    small = lib.convert(alike, config, config_of(a={**LATENT, 'kv_rank': 8}))
    assert np.abs(np.asarray(run(small)) - np.asarray(run(alike))).max() > 1e-3
    assert len(attnx.generate(small, [[1, 2]], max_new_tokens=2, temperature=0)[0]) == 2


def test_factors():
    """Without a rotated part the products are the matrices; truncated, the error is the tail of the singular values."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    old = attnx.get('gqa').config(num_heads=4, num_kv_heads=2)
    sizes = {'query': 32, 'key': 16, 'value': 16, 'out': 32}
    parameters = {f'{name}/kernel': draw(32, size) for name, size in sizes.items()}
    found = lib.latent_factors(parameters, old, 32, rope_dim=0, kv_rank=32, query_rank=32)
    heads = lambda w: np.repeat(np.asarray(w).reshape(32, 2, 8), 2, axis=1).reshape(32, 32)
    close(found['query_down/kernel'] @ found['query/kernel'], parameters['query/kernel'], tolerances.FLOAT32)
    for name in ('key/kernel', 'value/kernel'):
        close(found['down/kernel'] @ found[name], heads(parameters[name]), tolerances.FLOAT32)
    kernel, values = parameters['query/kernel'], np.linalg.svd(np.asarray(parameters['query/kernel']), compute_uv=False)
    down, up = lib.factor(kernel, 20)
    close(np.sum(np.square(kernel - down @ up)), np.sum(values[20:] ** 2), tolerances.FLOAT32)
    kept = np.cumsum(values**2) / np.sum(values**2)
    rank = lib.energy_rank(kernel, 0.9)
    assert rank % 8 == 0 and kept[rank - 1] >= 0.9 and kept[max(rank - 9, 0)] < 0.9


def test_dropped_layers(source):
    config, model = source
    flat = to_flat(model)
    mute = from_flat(model, {k: v.at[1].set(0) if k.endswith('mixer/out/kernel') else v for k, v in flat.items()})
    smaller, target = lib.drop_layers(mute, config, [1])
    close(run(smaller), run(mute), tolerances.FLOAT32)
    assert sum(v.size for v in to_flat(smaller).values()) == sum(v.size for v in flat.values()) - 3 * 32 * 32
    again, _ = lib.drop_layers(smaller, target, [])
    close(run(again), run(mute), tolerances.FLOAT32)
    assert len(attnx.generate(smaller, [[1, 2]], max_new_tokens=2, temperature=0)[0]) == 2


@pytest.mark.parametrize(
    ('target', 'error'),
    [
        ({'a': {'kind': 'gla'}}, 'layer 0: gqa can not become gla; there is: any -> skip'),
        ({'a': {**SOURCE, 'num_kv_heads': 4}}, 'layer 0: gqa -> gqa: 4 heads over 2 of width 8 can not become 4 over 4'),
        ({'a': {**LATENT, 'head_dim': 8}}, 'layer 0: gqa -> mla: needs num_heads=4'),
    ],
)
def test_what_can_not_be_converted(source, target, error):
    config, model = source
    with pytest.raises(ValueError, match=error):
        lib.convert(model, config, config_of(**target))
    with pytest.raises(ValueError, match='keeps width and number of layers'):
        lib.convert(model, config, dataclasses.replace(config, num_layers=5))
