"""Meshes, presets and what is refused before a run."""

import dataclasses
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import attnx
from attnx import catalog, explanation, plan, sharding
from attnx import config as config_lib
from attnx.models import ModelConfig
from attnx.models.config import Layer
from attnx.spec import Dims
from attnx.train import loop, optim


@pytest.mark.parametrize(
    ('sizes', 'message'),
    [
        ({'dta': 2}, "unknown mesh axis 'dta'; did you mean 'data'"),
        ({'data': -1, 'fsdp': -1}, 'at most one size may be -1'),
        ({'data': 0}, 'the others are >= 1'),
        ({'data': 3}, r"does not tile 8 devices; the nearest that does: \{'data': 8\}"),
        ({'data': -1, 'tensor': 3}, r"does not tile 8 devices; the nearest that does: \{'data': 4, 'tensor': 2\}"),
        ({'fsdp': 4, 'context': 4}, r"the nearest that does: \{'fsdp': 2, 'context': 4\}"),
    ],
)
def test_meshes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sizes)


def test_the_rest_of_the_devices():
    assert sharding.shown(sharding.make_mesh({'data': -1, 'expert': 2}).shape) == {'data': 4, 'expert': 2}
    assert sharding.make_mesh().shape['data'] == 8


@pytest.mark.parametrize(
    ('preset', 'method', 'message'),
    [
        ('fsdpp', 'auto', "unknown sharding preset 'fsdpp'; did you mean 'fsdp'"),
        ('context', 'rings', "unknown context method 'rings'; did you mean 'ring'"),
        ('ddp', 'auto', r"no use for mesh axis 'context' of size 4.*'context' or 'fsdp_context', or mesh \{'data': 8\}"),
    ],
)
def test_presets_that_do_not_fit(preset, method, message):
    mesh = sharding.abstract_mesh({'data': 2, 'context': 4})
    with pytest.raises(ValueError, match=message), sharding.use(mesh, preset, method):
        pass


def model(**change):
    return config_lib.build(ModelConfig, {'vocab_size': 64, 'width': 64, 'num_layers': 2, 'max_length': 32} | change)


@pytest.mark.parametrize(
    ('change', 'preset', 'sizes', 'length', 'message'),
    [
        ({}, 'context', {'context': 4}, 30, r"30: .*\(lengths 28 and 32 do\).*works: \{'data': 2, 'context': 2\}"),
        ({}, 'fsdp_tp', {'tensor': 8}, 32, r"layer 0 \(gqa\): 4 heads are not.*works: \{'data': 2, 'tensor': 4\}"),
        ({'pattern': ('gqa', 'mamba2')}, 'fsdp_tp', {'data': 2, 'tensor': 4}, 32, r"1 \(mamba2\).*\{'data': 4, 'tensor': 2\}"),
        ({'mlp': {'kind': 'moe', 'experts': 6}}, 'ddp', {'expert': 4}, 32, r"6 experts.*works: \{'data': 2, 'expert': 2\}"),
        ({'pattern': ('gated_deltanet',)}, 'context', {'context': 16}, 32, '32 tokens are fewer than 3 a device'),
    ],
)
def test_a_mesh_that_does_not_suit_the_model(change, preset, sizes, length, message):
    with pytest.raises(ValueError, match=message):
        plan.check_sharding(model(**change), sizes, preset, length=length, batch=16)


def test_a_mesh_that_suits_the_model():
    for preset, sizes in (('fsdp_tp', {'fsdp': 2, 'tensor': 4}), ('fsdp_context', {'data': 2, 'context': 4}), ('ddp', {})):
        plan.check_sharding(model(pattern=('gqa', 'gla')), sizes, preset, length=32, batch=16)


def test_a_mechanism_that_can_not_be_cut(monkeypatch):
    limited = dataclasses.replace(catalog.get('gla'), limits={'context': 'each step needs the last'})
    monkeypatch.setattr(catalog, 'get', lambda name: limited)
    with pytest.raises(ValueError, match=r'layer 0 \(gla\): it can not serve a sequence that is cut: each step needs the last'):
        plan.check_sharding(model(pattern=('gla',)), {'context': 4}, 'context', length=32, batch=16)


def test_parameters_that_do_not_divide_name_the_nearest_mesh():
    mesh = sharding.abstract_mesh({'data': 1, 'fsdp': 4, 'context': 2})
    with pytest.raises(ValueError, match=r"dimension 0 \(embed\) of size 6 .* 8 parts .*works: \{'data': 4, 'fsdp': 2\}"):
        sharding.param_shardings(mesh, 'fsdp_context', {'w': ('embed', 'mlp')}, {'w': (6, 8)})


def test_what_does_not_divide_is_not_constrained():
    with sharding.use(sharding.make_mesh({'data': 4, 'context': 2}), 'context'):
        run = jax.jit(lambda x: sharding.constrain(x, ('batch', 'length', 'embed')))
        assert run(jnp.ones((3, 1, 4))).sharding.is_fully_replicated
        assert run(jnp.ones((4, 1, 4))).sharding.spec[0] == 'data'


def test_explain_says_how_a_layer_is_spread():
    said = attnx.explain('sliding_window', width=64, length=64, num_heads=4, window=8, mesh={'context': 4}, preset='context')
    assert 'spread: tokens over context (4): ring: the mask reaches 2 of 4 parts' in said
    said = attnx.explain('gla', width=64, length=30, mesh={'context': 4}, preset='context')
    assert 'not cut: 30 tokens are not divisible over the 4 devices of context' in said


def test_no_device_ever_holds_the_whole_model():
    """Parameters and optimizer states are made where they lie."""
    given = model(width=128, vocab_size=1024, pattern=('mha',), num_layers=1)
    made = loop.program(dataclasses.replace(given, max_length=8), packed=False)
    transform, _ = optim.build(optim.Config(), 200, made.axes)
    mesh = sharding.make_mesh({'fsdp': 8})
    where = sharding.param_shardings(mesh, 'fsdp', made.axes, {name: s.shape for name, s in made.shapes.items()})
    where = {'params': where, 'opt': optim.state_shardings(transform, made.shapes, where, mesh)}

    def init(key):
        params = made.init(key)
        return {'params': params, 'opt': transform.init(params)}

    key = jax.random.key(0)
    memory = jax.jit(init, out_shardings=where).lower(key).compile().memory_analysis()
    whole = plan.size(jax.eval_shape(init, key))
    assert memory.output_size_in_bytes < whole / 7
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < whole / 2


def test_the_plan_of_a_mesh():
    found = plan.plan(model(), length=32, batch=8, packed=False, mesh={'data': -1, 'context': 4}, preset='context')
    assert not found.refused
    assert found.layers[0].calls[0].spread.how.startswith('tokens over context (4): gather, zigzag')
    found = plan.plan(model(), length=30, batch=8, packed=False, mesh={'context': 4}, preset='context')
    assert 'mesh: length 30: it does not divide' in found.refused[0]


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'sharding': 'context', 'mesh.context': 8, 'data.length': 100}, r"lengths 96.*works: {'data': -1, 'context': 4}"),
        ({'mesh.expert': 8, 'model.mlp.kind': 'moe', 'model.mlp.experts': 6}, r"6 experts.*works: {'data': -1, 'expert': 2}"),
        ({'mesh.tensor': 8, 'sharding': 'fsdp_tp'}, r"\(g\): 4 heads are not.*works: {'data': -1, 'tensor': 4}"),
        ({'mesh.fsdp': 8, 'sharding': 'fsdp', 'data.batch_size': 12}, 'batch_size 12 must be a multiple of 8'),
        ({'mesh.fsdp': 3, 'sharding': 'fsdp'}, r"does not tile 8 devices; the nearest that does: {'data': 4, 'fsdp': 2}"),
    ],
)
def test_numbers_are_refused_before_jax_is_imported(settings, message, tmp_path):
    command = ['train.py', f'--config.run_dir={tmp_path}', *(f'--config.{name}={value}' for name, value in settings.items())]
    done = subprocess.run([sys.executable, '-X', 'importtime', *command], capture_output=True, text=True)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and re.search(message, error), done.stderr[-2000:]
    assert not re.search(r'\| +jax$', done.stderr, re.M)


@pytest.mark.slow
@pytest.mark.parametrize('name', catalog.scan())
def test_heads_that_numbers_refuse_are_not_cut(name):
    """What is refused by the number of heads alone, no op could have cut."""
    spec = catalog.get(name)
    example = spec.example[0] if isinstance(spec.example, tuple) else spec.example
    if not (given := {field: 3 for field in ('num_heads', 'num_kv_heads') if getattr(example, field, 0)}):
        pytest.skip('no heads')
    try:
        layer = Layer(name, spec, dataclasses.replace(example, **given))
    except ValueError as error:
        assert 'heads' in str(error)  # three are refused, whatever the mesh
        pytest.skip(f'no three heads: {error}')
    dims = Dims(width=48, causal=spec.causal != 'bidirectional', num_layers=2)
    with sharding.use(sharding.abstract_mesh({'tensor': 2}), 'fsdp_tp'):
        calls, _ = explanation.layer_calls(spec, layer.config, dims, 12, 4)
    assert plan.cut_heads(layer) % 2 == 0 or any(call.spread and call.spread.whole for call in calls)
