"""Every entry of configs/papers.py trains: updates that change every parameter and bring the loss down."""

import functools
import importlib.util
import json
import pathlib

import jax
import numpy as np
import optax
import pytest

from attnx import catalog, plan, tasks
from attnx import config as config_lib
from attnx.train import heads, loop, step
from attnx.train.config import completed

PATH = pathlib.Path(__file__).parent.parent / 'configs' / 'papers.py'
QUICK = ('mvpa',)  # of side inputs

UNREAD = ('decoupled_embeddings', 'attention_drop')  # with layers that do not read their normed input


@functools.cache
def configs():
    spec = importlib.util.spec_from_file_location('papers', PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def batch_of(task: str):
    """Two rows of a task, given as JSON."""
    fields = json.loads(task)
    text = fields['kind'] == 'text'
    task = tasks.build(tasks.config(**fields, **({'path': str(PATH.parent)} if text else {})), length=32 if text else 0)
    rows = [task.train[i] for i in range(2)]
    return task, {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize(
    'variant', [pytest.param(v, marks=[] if v in QUICK else [pytest.mark.slow]) for v in configs().VARIANTS]
)
def test_trains(variant):
    given = config_lib.build(loop.Config, configs().get_config(variant), 'config')
    task, batch = batch_of(json.dumps(dict(given.data.task)))
    config = completed(given.model, task)
    config.check_packing()
    config.check_inputs({*batch} - {*tasks.FIELDS})
    made = loop.program(config, packed=task.packed)
    assert plan.flops_per_token(config, made.axes, made.shapes, task.length) > 0
    transform = optax.adam(1e-4)  # so small that three steps go downhill: label attention overshoots at ten times that
    of_heads = heads.projections(config, made.shapes)
    update = jax.jit(step.train_step(made.forward, transform, lambda n: 1e-4, given.step, of_heads))
    state = first = step.init_state(jax.jit(made.init)(jax.random.key(0)), transform)
    losses = []
    for _ in range(3):
        state, values = update(state, batch, jax.random.key(0))
        losses.append(float(values['objective']))
        assert not values['bad']
    assert losses[-1] < losses[0]
    still = [n for n, v in state['params'].items() if np.array_equal(v, first['params'][n])]
    still = [n for n in still if variant not in UNREAD or 'mixer_norm' not in n]
    assert not still, f'parameters that did not move: {still}'


@pytest.mark.parametrize('variant', configs().VARIANTS)
def test_is_found_by_its_paper(variant):
    given = configs().VARIANTS[variant]
    kinds = {mixer['kind'] for mixer in given['mixers'].values()} | {*given.get('overrides', {}).values()}
    options = catalog.find_options(paper=given['paper'])
    assert options or kinds & {e.name for e in catalog.select(paper=given['paper'])}
    assert variant in catalog.models().get(given['paper'], ['off_by_one'])  # which is no paper


def test_unknown_variant():
    with pytest.raises(ValueError, match="unknown variant 'moe'"):
        configs().get_config('moe')
