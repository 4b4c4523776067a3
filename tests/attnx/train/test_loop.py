"""Whole runs of a tiny model: resume is bit-exact, a second command says so; what a run writes, and what it refuses."""

import dataclasses
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import attnx
from attnx import config as config_lib
from attnx.nn import to_flat
from attnx.train import checkpoint, loop, metrics, report
from pallas_kernels.softmax_attention import tiles, tune
from tests.runs import at_step, crash, rows_of, state_of


def terminate(batch):
    os.kill(os.getpid(), signal.SIGTERM)
    return batch


def test_a_run_leaves_everything_and_the_second_command_says_so(config, whole, tmp_path):
    whole = shutil.copytree(whole, tmp_path / 'whole')
    assert {'config.json', 'metrics.jsonl', 'loss.png', 'checkpoints'} <= set(os.listdir(whole))
    saved = json.loads(pathlib.Path(whole, 'config.json').read_text())
    assert list(saved) == sorted(saved)
    assert saved['model.vocab_size'] == 257
    entries = metrics.read(whole)
    assert [e['step'] for e in entries if e['split'] == 'train'] == [1, 2, 3, 4, 5, 6]
    assert [e['step'] for e in entries if e['split'] == 'eval'] == [0, 3, 6]
    assert entries[-1]['nats_per_byte'] < entries[0]['nats_per_byte']
    result = loop.run(config(run_dir=str(whole)))
    assert result.status == 'already complete'
    assert 'is complete: 6 of 6 steps' in result.message
    assert '--config.steps=12' in result.message
    other = loop.run(config(run_dir=str(whole), **{'sample.tokens': 8, 'sample.prompt': 'class '}))
    assert other.status == 'already complete' and other.sample.startswith('class ')  # another prompt is no other run
    longer = loop.run(config(run_dir=str(whole), steps=8, **{'sample.tokens': 8, 'sample.prompt': 'def '}))
    assert (longer.status, longer.step) == ('complete', 8)
    assert longer.sample.startswith('def ')
    assert (whole / 'sample.txt').read_text() == longer.sample
    assert [e['step'] for e in metrics.read(whole) if e['split'] == 'train'] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_trained_model_is_loaded(whole):
    found = attnx.load(whole)
    assert found.step == 6 and found.config.model.vocab_size == 257
    for name, value in to_flat(found.model).items():
        np.testing.assert_array_equal(value, state_of(whole, 6)['params'][name])
    for wrong, message in (((whole, 5), 'has no checkpoint 5; there is: '), (('nowhere',), 'nowhere/config.json')):
        with pytest.raises(ValueError, match=message):
            attnx.load(*wrong)


@pytest.mark.slow
@pytest.mark.parametrize('how', ['signal', 'crash'])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(config, whole, monkeypatch, how):
    made = config()
    with monkeypatch.context() as patch:
        at_step(patch, 5, terminate if how == 'signal' else crash)
        if how == 'signal':
            result = loop.run(made)
            assert (result.status, result.step) == ('stopped', 5)
            assert 'SIGTERM at step 5 of 6, saved. Run the same command' in result.message
        else:
            with pytest.raises(KeyboardInterrupt):
                loop.run(made)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert loop.run(made).status == 'complete'
    jax.tree.map(np.testing.assert_array_equal, state_of(whole, 6), state_of(made.run_dir, 6))
    numbers = lambda run_dir: [
        {k: v for k, v in e.items() if k not in metrics.TIMES} for e in metrics.read(run_dir)
    ]
    assert numbers(made.run_dir) == numbers(whole)


def test_tuned_tiles_belong_to_the_run(config, monkeypatch):
    """Chosen once, kept in run_dir, replayed on resume; other tiles are refused; the table holds again afterwards."""
    small = {'model.num_layers': 1, 'model.pattern': ('gqa',)}
    made, seen = config(tune=True, **small), []
    key = 'Forward H=64 Hv=64'
    choice = tiles.Forward(2, 128, 2, (160, 32))

    def tune_now(calls):
        seen.append(calls)
        return {key: choice}

    monkeypatch.setattr(tune, 'tune', tune_now)
    assert loop.run(made, until=3).status == 'stopped'
    assert seen == [[]] and tiles.pinned() == {}  # no call takes the kernel on a CPU
    kept = pathlib.Path(made.run_dir, 'tiles.json')
    assert tiles.from_json(kept.read_text()) == {key: choice}
    with pytest.raises(ValueError, match='tune'):
        loop.run(config(**small))
    kept.write_text(tiles.to_json({key: dataclasses.replace(choice, keys=64)}))
    with pytest.raises(ValueError, match=f'tiles.{key}'):
        loop.run(made)
    kept.write_text(tiles.to_json({key: choice}))
    monkeypatch.setattr(tune, 'tune', None)
    assert loop.run(made).status == 'complete'


def test_lines_of_the_log_are_neither_lost_nor_doubled(config, whole, monkeypatch, tmp_path):
    """Killed before the first checkpoint, and between the last one and the plot; a torn line in between."""
    made = config()
    with monkeypatch.context() as patch:
        at_step(patch, 2, crash)
        with pytest.raises(KeyboardInterrupt):
            loop.run(made)
    with pathlib.Path(made.run_dir, metrics.FILE).open('a') as stream:
        stream.write('{"step": 2, "spl')
    monkeypatch.setattr(report, 'plot', crash)
    with pytest.raises(KeyboardInterrupt):
        loop.run(made)
    monkeypatch.undo()
    result = loop.run(made)
    assert (result.status, result.evaluation['loss']) == ('complete', rows_of(whole, 'eval')[-1]['loss'])
    for split in ('train', 'eval'):
        assert rows_of(made.run_dir, split) == rows_of(whole, split)


def test_other_data_are_refused_before_any_array_is_read(config, whole, corpus, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / 'run')
    monkeypatch.setattr(ocp.CheckpointManager, 'restore', None)
    plain = loop.data_lib.open

    def changed(*args, **kwargs):
        found = plain(*args, **kwargs)
        found.train._fingerprint = found.train._fingerprint | {'contents': 'else'}
        return found

    monkeypatch.setattr(loop.data_lib, 'open', changed)
    with pytest.raises(ValueError, match=r'other data; differing: contents: saved .*, now .else.'):
        loop.run(config(steps=9, run_dir=str(tmp_path / 'run')))


def test_a_full_disk_is_named(config, monkeypatch):
    def full(self, *args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(metrics.Log, 'open', full)
    with pytest.raises(ValueError, match='could not be written: the disk is full'):
        loop.run(config())


def test_health_changes_nothing_and_is_written_per_layer_and_head(config, whole):
    made = config(**{'health.every': 2, 'health.rows': 4})
    loop.run(made)
    jax.tree.map(np.testing.assert_array_equal, state_of(whole, 6), state_of(made.run_dir, 6))
    rows = rows_of(made.run_dir, 'health')
    assert [row['step'] for row in rows] == [2, 4, 6]
    assert {len(row['layer_1/softmax_attention/max_logit']) for row in rows} == {4}  # heads
    assert len(rows[0]['layer_0/gated_linear/half_life']) == len(rows[0]['layer_0/gated_linear/state_norm']) == 4
    ratios = {name: value for name, value in rows[0].items() if name.startswith('update_ratio/')}
    assert all(len(value) == 1 and 0 < value[0] < 1 for name, value in ratios.items() if name.endswith('kernel'))


def test_sharded_accumulated_run_equals_the_plain_one(config, tmp_path):
    common = {'model.dropout': 0.0, 'model.num_layers': 1, 'model.pattern': ('gqa',)}
    common['model.vocab_size'] = 258  # even, so that the tensor axis can cut it
    plain = loop.run(config(run_dir=str(tmp_path / 'a'), **common))
    change = {'sharding': 'fsdp_tp', 'mesh': {'data': 2, 'fsdp': 2, 'tensor': 2}, 'step.accumulate': 2}
    other = loop.run(config(run_dir=str(tmp_path / 'b'), **common, **change))
    np.testing.assert_allclose(other.evaluation['loss'], plain.evaluation['loss'], rtol=1e-4)


def test_other_settings_are_refused_on_resume(config, whole):
    with pytest.raises(checkpoint.CheckpointError, match=r'other settings: optim.learning_rate: saved 0.003, now'):
        loop.run(config(run_dir=whole, **{'optim.learning_rate': 0.1}))


def test_one_process_a_run_directory(config, tmp_path):
    (tmp_path / 'run').mkdir()
    with loop.locked(tmp_path / 'run'), pytest.raises(ValueError, match='another process trains in'):
        loop.run(config())


def test_a_mirror_that_is_not_installed_is_refused_at_once(config, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r'log.wandb is True, but wandb is not installed: pip install'):
        metrics.Log('.', metrics.Config(wandb=True), {})


def test_wandb_mirrors_the_log_and_a_resumed_run_keeps_its_id(monkeypatch, tmp_path):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append('finish')

    def init(**given):
        calls.append(given)
        return Run()

    wandb = types.ModuleType('wandb')
    wandb.__spec__ = importlib.machinery.ModuleSpec('wandb', None)
    wandb.init, wandb.Settings, wandb.Error = init, dict, RuntimeError
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    for step in (0, 3):
        log = metrics.Log(tmp_path, metrics.Config(wandb=True, project='p'), {'model.width': 8})
        log.open(step)
        log.write(step + 1, 'train', {'loss': 2.0, 'note': 'text'})
        log.close()
    first, second = calls[0], calls[3]
    assert first['project'] == 'p' and first['config'] == {'model.width': 8} and first['id'] == second['id']
    assert calls[1:3] == [(1, {'train/loss': 2.0}), 'finish'] and calls[4][0] == 4

    def refuse(**given):
        raise wandb.Error('no key')

    wandb.init, log = refuse, metrics.Log(tmp_path, metrics.Config(wandb=True), {})
    with pytest.raises(ValueError, match=r'log.wandb: no key; .*WANDB_MODE=offline'):
        log.open(0)
    log.close()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'steps': 2, 'optim.warmup': 5}, 'exceed the run of steps 2'),
        ({'data.batch_size': 12}, 'data.batch_size 12 must be a multiple of 8'),
        ({'sharding': 'fdsp'}, "unknown sharding preset 'fdsp'; did you mean 'fsdp'"),
        ({'compiler': {'xla_gpu_enable_hiding': True}}, r"config.compiler: .*No such compile option: 'xla_gpu_enable_hiding'"),
        ({'model.num_classes': 3}, r'config.model.num_classes is 3; the task .text. has 0'),
    ],
)
def test_settings_that_cannot_be_served(config, change, message):
    with pytest.raises(ValueError, match=message):
        loop.run(config(**change))


def test_tensorboard_and_profile(config):
    small = {'model.num_layers': 1, 'model.pattern': ('gqa',)}
    made = config(**small, **{'log.tensorboard': True, 'profile.start': 2, 'profile.steps': 1})
    loop.run(made)
    assert os.listdir(f'{made.run_dir}/tensorboard')
    assert [name for _, _, names in os.walk(f'{made.run_dir}/profile') for name in names if name.endswith('xplane.pb')]


def test_free_settings():
    assert loop.free('steps')
    assert loop.free('checkpoint.every')
    assert not loop.free('model.width')
    assert not loop.free('optim.learning_rate')
    assert not loop.free('data.batch_size')


def test_peak_of_a_device():
    assert metrics.peak_flops('NVIDIA H100 80GB HBM3') == 989e12
    assert metrics.peak_flops('NVIDIA H100 PCIe') == 756e12
    assert metrics.peak_flops('TPU v5 lite') == 197e12
    assert metrics.peak_flops('cpu') is None


def test_a_log_line_is_json():
    text = metrics.line({'a': jnp.float32(1.5), 'b': np.nan, 'c': 3, 'd': 'x', 'e': jnp.bfloat16(2)})
    assert json.loads(text) == {'a': 1.5, 'b': 'nan', 'c': 3, 'd': 'x', 'e': 2.0}


def test_the_base_config_names_every_setting():
    """Else a setting could not be reached from the command line."""
    spec = importlib.util.spec_from_file_location('base', pathlib.Path(__file__).parents[3] / 'configs/base.py')
    base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(base)
    given = base.get_config()
    built = config_lib.build(loop.Config, given)
    free_form = ('model.mixers', 'data.task', 'mesh', 'step.aux_weights', 'model.overrides', 'model.encoder.overrides')
    free_form += ('model.mlp_overrides', 'model.encoder.mlp_overrides', 'compiler')
    names = lambda d: {n for n in config_lib.flatten(d) if not n.startswith(free_form)}
    assert names(given.to_dict()) == names(config_lib.to_dict(built))
    assert built.data.task == {'kind': 'text'}
    assert built.model.mixers['g'] == {'kind': 'gla'}
