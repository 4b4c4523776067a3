"""HeadMask: exactly so many heads, no gradient to them, importance as a finite difference; and learning from a teacher."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import config as config_lib
from attnx import models
from attnx.train import heads, loop, metrics, step
from tests import tolerances
from tests.laws import close

FIELDS = {'vocab_size': 31, 'width': 16, 'num_layers': 3, 'max_length': 16, 'pattern': ('gqa', 'retnet'), 'mlp': {'hidden': 8}}
CONFIG = config_lib.build(models.ModelConfig, FIELDS, 'config.model')
KEY = jax.random.key(0)


@pytest.fixture(scope='module')
def made():
    """(program, parameters, heads of its projections, batch, parameters -> total loss and its gradients)"""
    program = loop.program(CONFIG, packed=False)
    params = jax.jit(program.init)(KEY)
    tokens = np.random.default_rng(0).integers(0, 31, (2, 11)).astype(np.int32)
    batch = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'weights': np.ones((2, 10), np.float32)}
    plain = jax.jit(lambda p: step.gradients(program.forward, p, batch, KEY, step.Config())[:2])
    return program, params, heads.projections(CONFIG, program.shapes), batch, plain


def test_projections_are_those_of_the_layers(made):
    program, _, found, _, _ = made
    layers = {f'body/stacks/{s}/layers/{p}/mixer/out/kernel' for s, p in ((0, 0), (0, 1), (1, 0))}
    assert set(found) == layers and set(found.values()) == {4}
    assert sum(program.shapes[name].shape[0] * n for name, n in found.items()) == 12


@pytest.mark.quick('importance')
@pytest.mark.parametrize('by', ['random', 'importance'])
def test_masked_heads_are_left_out_and_get_no_gradient(made, by):
    program, params, found, batch, plain = made
    config = step.Config(mask_heads=5, mask_heads_by=by)
    run = lambda config: jax.jit(lambda p: step.without_heads(program.forward, p, batch, KEY, config, found))(params)
    total, grads, _ = run(config)
    dead = {name: np.abs(np.asarray(grads[name])).reshape(len(grads[name]), n, -1).max(2) == 0 for name, n in found.items()}
    assert sum(d.sum() for d in dead.values()) == 5
    query = grads['body/stacks/0/layers/0/mixer/query/kernel'].reshape(1, 16, 4, 4)
    mine = dead['body/stacks/0/layers/0/mixer/out/kernel']
    assert np.array_equal(np.abs(np.asarray(query)).max(axis=(1, 3)) == 0, mine)
    keep = {name: 1.0 - d for name, d in dead.items()}
    close(total, plain(heads.masked(params, keep))[0], tolerances.FLOAT32)
    if by == 'importance':
        scores = jax.jit(lambda p, grads: heads.importance(p, grads, found))(params, plain(params)[1])
        flat = np.concatenate([np.asarray(v).ravel() for v in scores.values()])
        gone = np.concatenate([d.ravel() for d in dead.values()])
        assert flat[gone].min() > flat[~gone].max()
        loss = lambda keep: step.objective(program.forward, heads.masked(params, keep), batch, KEY, step.Config())[0]
        slopes = jax.jit(jax.grad(loss))(jax.tree.map(jnp.ones_like, scores))
        for name, score in scores.items():
            close(abs(slopes[name]) / batch['weights'].sum(), score, tolerances.FLOAT32_GRAD)
    else:
        scaled, _, _ = run(dataclasses.replace(config, mask_heads_rescale=True))
        assert scaled != total


def test_evaluation_has_all_heads_and_settings_are_checked(made):
    program, params, _, batch, _ = made
    with pytest.raises(ValueError, match='mask_heads 12 must be below 12'):
        step.without_heads(program.forward, params, batch, KEY, step.Config(mask_heads=12), made[2])
    for fields, error in (
        ({'mask_heads_rescale': True}, 'set mask_heads, how many'),
        ({'mask_heads': 1, 'mask_heads_by': 'rando'}, "did you mean 'random'"),
        ({'hard': 0.5}, 'set distill, its weight'),
    ):
        with pytest.raises(ValueError, match=error):
            step.Config(**fields)


def test_divergence(made):
    program, params, _, batch, _ = made
    a, b = (np.random.default_rng(s).standard_normal((2, 10, 31)) for s in (0, 1))
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum(-1, keepdims=True) for x in (a, b))
    close(jax.jit(step.divergence)(a, b, 2.0), 4 * (p * np.log(p / q)).sum(-1), tolerances.FLOAT32)
    config = step.Config(distill=1.0, hard=0.0)
    own = jax.jit(lambda p: program.forward(p, batch, None)[0])(params)
    run = jax.jit(lambda p, t: step.gradients(program.forward, p, {**batch, 'teacher_logits': t}, KEY, config))
    total, grads, metrics = run(params, own)  # its own teacher: nothing to learn
    assert abs(float(total)) < 1e-5 and max(np.abs(np.asarray(g)).max() for g in grads.values()) < 1e-4
    total, _, metrics = run(params, own + jnp.asarray(b, jnp.float32))
    close(total, metrics['divergence'], tolerances.FLOAT32)
    assert total > 0.1
    with pytest.raises(ValueError, match='the batch has no teacher_logits'):
        jax.eval_shape(lambda p: step.gradients(program.forward, p, batch, KEY, config), params)


@pytest.mark.parametrize('strangers', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_learns_from_a_teacher_and_begins_where_it_is_told(tmp_path, strangers):
    (tmp_path / 'text').mkdir()
    (tmp_path / 'text' / 'a.py').write_text(pathlib.Path(__file__).read_text())
    task = {'kind': 'text', 'path': str(tmp_path / 'text')}
    model = {**FIELDS, 'vocab_size': 257, 'num_layers': 1}

    def run(name, step=None, **others):
        given = {
            'run_dir': str(tmp_path / name),
            'steps': 2,
            'eval_every': 0,
            'model': model,
            'data': {'task': task, 'length': 16, 'batch_size': 8, 'eval_batches': 1},
            'optim': {'learning_rate': 1e-6, 'warmup': 0, 'decay': 0},
            'sample': {'tokens': 0},
            'log': {'every': 1},
            'step': step or {},
        }
        result = loop.run(config_lib.build(loop.Config, given), **others)
        return result, [e['divergence'] for e in metrics.read(tmp_path / name) if 'divergence' in e]

    teacher = config_lib.build(models.ModelConfig, model)
    teacher = jax.jit(lambda: models.build(teacher, rngs=nnx.Rngs(7)))()
    same, near = run('same', {'distill': 1.0, 'hard': 0.0}, teacher=teacher, initial=teacher)
    assert len(near) == 2 and max(map(abs, near)) < 1e-4
    if strangers:
        plain, _ = run('plain')
        other, far = run('other', {'distill': 1.0}, teacher=teacher)
        assert len(far) == 2 and min(far) > 1e-3
        moved = [abs(result.evaluation['loss'] - plain.evaluation['loss']) for result in (other, same)]
        assert moved[0] < 1e-3 < moved[1]
    for error, others in (('a teacher and its weight', {'teacher': teacher}), ('parameters missing', {'initial': {}})):
        with pytest.raises(ValueError, match=error):
            run('bad', **others)
