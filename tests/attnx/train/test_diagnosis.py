"""A bad loss or gradient: the report names it, policies skip it or rewind past it, the first bad layer is found."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.train import data, health, loop, metrics, report
from tests.runs import at_step, crash, rows_of, state_of


def test_a_bad_loss_stops_with_a_report(config, monkeypatch):
    made = config(**{'model.pattern': ('gqa',)})
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda batch: batch | {'weights': np.full_like(batch['weights'], np.nan)})
        with pytest.raises(report.TrainingFailure, match=r'step 4: loss nan.*first bad tensor: batch weights'):
            loop.run(made)
    found = json.loads(pathlib.Path(made.run_dir, report.FAILURE).read_text())
    assert found['step'] == 4
    assert found['first']['nan'] == 8 * 16
    assert {'embedding', 'layer_0', 'layer_1/softmax_attention/query', 'layer_1', 'logits'} <= set(found['activations'])
    assert found['training_rows'] == data.open(made.data, run_dir=made.run_dir).rows(3)
    assert loop.run(made).status == 'complete'  # the checkpoint before it is good


@pytest.mark.slow
def test_a_tolerated_bad_update_is_told(config, monkeypatch, capfd):
    made = config(**{'step.non_finite': 'skip', 'step.max_non_finite': 1})
    at_step(monkeypatch, 4, lambda batch: batch | {'weights': np.full_like(batch['weights'], np.nan)})
    assert loop.run(made).status == 'complete'
    assert 'step 4: loss or gradient is not finite; skipped (1 of 1); training rows ' in capfd.readouterr().err
    assert [e['bad'] for e in metrics.read(made.run_dir) if e['split'] == 'train'] == [0, 0, 0, 1, 1, 1]


@pytest.mark.quick('2')
@pytest.mark.parametrize('position', [2, 5])
def test_rewinding_goes_past_the_bad_batch(config, monkeypatch, capfd, position):
    """Before and after the first checkpoint; killed afterwards and resumed, it is the same run."""
    change = {'steps': 8, 'eval_every': 0, 'model.num_layers': 1, 'model.pattern': ('gqa',)}
    made = config(**change, **{'step.non_finite': 'rewind', 'step.max_non_finite': 1})
    at_step(monkeypatch, position, lambda batch: batch | {'weights': np.full_like(batch['weights'], np.nan)})
    assert loop.run(made).status == 'complete'
    told = capfd.readouterr().err
    back = 0 if position == 2 else 4
    assert f'step {position}: loss nan' in told
    assert f'Rewound to step {back}, past that batch (1 of 1)' in told
    assert [row['step'] for row in rows_of(made.run_dir)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row['step'] for row in rows_of(made.run_dir, 'eval')] == [0, 8]
    if position == 2:
        return
    again = dataclasses.replace(made, run_dir=made.run_dir + '_killed')
    with monkeypatch.context() as patch:
        at_step(patch, 8, crash)
        with pytest.raises(KeyboardInterrupt):
            loop.run(again)
    assert loop.run(again).status == 'complete'
    assert rows_of(again.run_dir) == rows_of(made.run_dir)
    jax.tree.map(np.testing.assert_array_equal, state_of(made.run_dir, 8), state_of(again.run_dir, 8))


def test_rewinding_is_bounded(config, monkeypatch):
    change = {'steps': 8, 'model.num_layers': 1, 'model.pattern': ('gqa',)}
    made = config(**change, **{'step.non_finite': 'rewind', 'step.max_non_finite': 1})
    plain = data.Train.__next__
    spoilt = lambda batch: batch | {'weights': np.full_like(batch['weights'], np.inf)}
    monkeypatch.setattr(data.Train, '__next__', lambda self: spoilt(plain(self)) if self.step >= 3 else plain(self))
    with pytest.raises(report.TrainingFailure, match='step 3: loss'):
        loop.run(made)


@pytest.fixture
def made(config):
    """A model of four layers (two repeats of two), its parameters and a batch."""
    model = config(**{'model.num_layers': 4, 'model.dropout': 0.0}).model
    program = loop.program(dataclasses.replace(model, vocab_size=20, max_length=8), packed=False)
    params = jax.jit(program.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, 20, (2, 8)).astype(np.int32) for name in ('tokens', 'targets')}
    return program, params, batch | {'weights': np.ones((2, 8), np.float32)}


censuses = jax.jit(report.censuses)


def diagnose(program, params, batch, gradients=None):
    tensors = jax.jit(lambda params: [report.census(*t) for t in health.tensors(program.trace(params, batch, None))])
    return report.diagnose(
        step=1,
        metrics={'loss': jnp.nan, 'objective': jnp.nan, 'grad_norm': jnp.nan},
        shapes=params,
        params=censuses(params),
        batch=censuses(batch),
        trace=lambda: tensors(params),
        gradients=lambda: censuses(gradients or {}),
    )


def test_the_first_bad_layer_is_found(made):
    program, params, batch = made
    name = next(n for n in params if '/layers/1/' in n and n.endswith('mlp/down/kernel'))
    huge = params | {name: params[name].at[1].set(3e38)}  # finite, but it overflows: repeat 1, place 1 is layer 3
    first = diagnose(program, huge, batch)['first']
    assert (first['stage'], first['tensor'], first['layer']) == ('activation', 'layer_3', 3)
    assert first['rows'] == [0, 1]
    query = next(n for n in params if '/layers/1/' in n and n.endswith('query/kernel'))
    width = params[query].shape[-1] // 4
    huge = params | {query: params[query].at[1, :, 2 * width].set(3e38)}  # head 2 of 4, in the same layer
    first = diagnose(program, huge, batch)['first']
    assert (first['tensor'], first['layer'], first['heads']) == ('layer_3/softmax_attention/query', 3, [2])
    bad = params | {name: params[name].at[1, 0, 0].set(jnp.nan)}
    first = diagnose(program, bad, batch)['first']
    assert (first['stage'], first['tensor'], first['layer'], first['nan']) == ('parameter', name, 3, 1)


def test_bad_gradients_are_ordered_from_the_last_layer(made):
    program, params, batch = made
    spoiled = [n for n in params if n.endswith('mlp/down/kernel')] + ['embedding']
    grads = {n: p * jnp.nan if n in spoiled else p for n, p in params.items()}
    grads = {n: g.at[1].set(0.0) if '/layers/1/' in n else g for n, g in grads.items()}
    bad = diagnose(program, params, batch, grads)['bad']
    assert [(e['stage'], e['layer']) for e in bad] == [
        ('loss', None),
        ('gradient', 2),
        ('gradient', 1),
        ('gradient', None),
    ]
