"""Whole runs of a tiny model: resume is bit-exact, a second command says so, failures name their cause."""

import dataclasses
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
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
from attnx.train import checkpoint, data, health, loop, metrics, report
from pallas_kernels.softmax_attention import tiles, tune

TEXT = 'def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n    print(add(i, i))\n'


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus')
    for i in range(12):
        (folder / f'file_{i}.py').write_text(TEXT.replace('10', str(i)) * 3)
    return str(folder)


def make_config(corpus, run_dir):
    """Makes a config by overriding the tiny one, flat: config(steps=3, **{'optim.kind': 'lion'})."""

    def make(**change):
        given = {
            'run_dir': str(run_dir),
            'steps': 6,
            'eval_every': 3,
            'model': {'width': 16, 'num_layers': 2, 'pattern': ('retnet', 'gqa'), 'dropout': 0.1},
            'data': {'task': {'kind': 'text', 'path': corpus}, 'length': 16, 'batch_size': 8, 'eval_batches': 2},
            'optim': {'warmup': 2, 'decay': 2},
            'checkpoint': {'every': 2},
            'log': {'every': 1},
            'sample': {'tokens': 0},
        }
        for name, value in change.items():
            config_lib.put(given, name, value)
        return config_lib.build(loop.Config, given)

    return make


@pytest.fixture
def config(corpus, tmp_path):
    return make_config(corpus, tmp_path / 'run')


@pytest.fixture(scope='module')
def whole(corpus, tmp_path_factory):
    """The folder of an uninterrupted run."""
    made = make_config(corpus, tmp_path_factory.mktemp('whole') / 'run')()
    assert loop.run(made).status == 'complete'
    return made.run_dir


def state_of(run_dir, step):
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(f'{run_dir}/checkpoints/{step}/state')


def at_step(monkeypatch, number, action):
    """Calls `action(batch)` in place of batch `number` (1, 2, …) of training."""
    plain = data.Train.__next__

    def patched(self):
        batch = plain(self)
        return action(batch) if self.step == number else batch

    monkeypatch.setattr(data.Train, '__next__', patched)


def terminate(batch):
    os.kill(os.getpid(), signal.SIGTERM)
    return batch


def crash(batch):
    raise KeyboardInterrupt


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
    made, seen = config(tune=True), []
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
        loop.run(config())
    kept.write_text(tiles.to_json({key: dataclasses.replace(choice, keys=64)}))
    with pytest.raises(ValueError, match=f'tiles.{key}'):
        loop.run(made)
    kept.write_text(tiles.to_json({key: choice}))
    monkeypatch.setattr(tune, 'tune', None)
    assert loop.run(made).status == 'complete'


def test_a_bad_loss_stops_with_a_report(config, monkeypatch):
    made = config()
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


def test_a_tolerated_bad_update_is_told(config, monkeypatch, capfd):
    made = config(**{'step.non_finite': 'skip', 'step.max_non_finite': 1})
    at_step(monkeypatch, 4, lambda batch: batch | {'weights': np.full_like(batch['weights'], np.nan)})
    assert loop.run(made).status == 'complete'
    assert 'step 4: loss or gradient is not finite; skipped (1 of 1); training rows ' in capfd.readouterr().err
    assert [e['bad'] for e in metrics.read(made.run_dir) if e['split'] == 'train'] == [0, 0, 0, 1, 1, 1]


def rows_of(run_dir, split='train'):
    return [{k: v for k, v in e.items() if k not in metrics.TIMES} for e in metrics.read(run_dir) if e['split'] == split]


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
    change = {'model.num_layers': 1, 'model.pattern': ('gqa',)}
    made = config(**change, **{'step.non_finite': 'rewind', 'step.max_non_finite': 1})
    plain = data.Train.__next__
    spoilt = lambda batch: batch | {'weights': np.full_like(batch['weights'], np.inf)}
    monkeypatch.setattr(data.Train, '__next__', lambda self: spoilt(plain(self)) if self.step >= 3 else plain(self))
    with pytest.raises(report.TrainingFailure, match='step 3: loss'):
        loop.run(made)


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


@pytest.fixture
def made(config):
    """A model of four layers (two repeats of two), its parameters and a batch."""
    model = config(**{'model.num_layers': 4, 'model.dropout': 0.0}).model
    program = loop.program(dataclasses.replace(model, vocab_size=20, max_length=8), packed=False)
    params = jax.jit(program.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, 20, (2, 8)).astype(np.int32) for name in ('tokens', 'targets')}
    return program, params, batch | {'weights': np.ones((2, 8), np.float32)}


def diagnose(program, params, batch, gradients=None):
    return report.diagnose(
        step=1,
        metrics={'loss': jnp.nan, 'objective': jnp.nan, 'grad_norm': jnp.nan},
        shapes=params,
        params=report.censuses(params),
        batch=report.censuses(batch),
        trace=lambda: [report.census(*t) for t in health.tensors(program.trace(params, batch, None))],
        gradients=lambda: report.censuses(gradients or {}),
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
    made = config(**{'log.tensorboard': True, 'profile.start': 2, 'profile.steps': 1})
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


def command(*flags):
    root = pathlib.Path(__file__).parents[3]
    return subprocess.run([sys.executable, 'train.py', *flags], cwd=root, capture_output=True, text=True, timeout=120)


def test_a_resolved_config_runs_again_from_json_alone(config, tmp_path):
    change = {'model.overrides': {1: 'm'}, 'model.mixers': {'m': {'kind': 'gqa', 'masks': (('window', 4),)}}, 'steps': 4}
    made = config(**change)
    text = config_lib.to_json(made)
    assert config_lib.from_json(loop.Config, text) == made
    sparse = config(**{'model.mlp_overrides': {1: {'kind': 'moe', 'experts': 4}}})
    assert config_lib.from_json(loop.Config, config_lib.to_json(sparse)) == sparse
    loop.run(made)
    written = pathlib.Path(made.run_dir, 'config.json').read_text()
    again = config_lib.from_json(loop.Config, written.replace(made.run_dir, str(tmp_path / 'again')))
    assert again.model.max_length == 16  # what the task decided is in it
    loop.run(again)
    jax.tree.map(np.testing.assert_array_equal, state_of(made.run_dir, 4), state_of(again.run_dir, 4))
    for wrong, message in (
        (text.replace('"model.width"', '"model.widht"'), "unknown key config.model.widht; did you mean 'width'"),
        ('{"run_dir": "a", "run_dir.b": 1}', "'run_dir' is a value"),
        ('[1]', 'expected a JSON object'),
        ('{', 'not JSON'),
    ):
        with pytest.raises(ValueError, match=message):
            config_lib.from_json(loop.Config, wrong)


def test_no_config_file_is_executed_for_a_resolved_one(tmp_path):
    (tmp_path / 'c.json').write_text('{"steps": 0}')
    watch = "import sys; sys.argv = ['train.py', f'--resolved={sys.argv[1]}']; ran = []\n" + (
        "sys.addaudithook(lambda event, args: event == 'exec' and ran.append(args[0].co_filename))\n"
        "import runpy\ntry: runpy.run_path('train.py', run_name='__main__')\n"
        "finally: print('configs' in ' '.join(ran), 'train.py' in ' '.join(ran))"
    )
    root = pathlib.Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, '-c', watch, str(tmp_path / 'c.json')], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == 'False True'
    assert 'c.json: config: steps 0 must be >= 1' in done.stderr


def test_text_that_is_shown_can_not_steer_a_terminal(capfd):
    loop.tell(loop.Result(1, 'complete', {}, 'a\tb\n\x1b[2Jc\x9bd', 'done'))
    metrics.Progress(1, 0).say('x\x1b]0;title\x07')
    told = capfd.readouterr()
    assert 'a\tb\n\\x1b[2Jc\\x9bd' in told.out
    assert told.err == 'x\\x1b]0;title\\x07\n'


BAD = {
    'key': ('--config.model.widht=8', "unknown config key 'widht'; did you mean 'width'? valid: conv_taps, "),
    'group': ('--config.modle.width=8', "unknown config key 'modle'; did you mean 'model'? valid: checkpoint, "),
    'file': ('--config=configs/bas.py', "no config file 'configs/bas.py'; did you mean 'configs/base.py'?"),
    'size': ('--config=configs/sizes.py:9b', "unknown size '9b' of configs/sizes.py; valid: 1b, 7b, 70b"),
    'argument': ('steps=3', "unexpected arguments ['steps=3']"),
    'mechanism': ("--config.model.pattern=('glaa',)", "pattern names 'glaa'", "did you mean 'gla'? valid: a, agent, "),
    'kind': ('--config.model.mixers.a.kind=gqq', "unknown mechanism 'gqq'; did you mean 'gqa'?"),
    'override': ("--config.model.overrides={9: 'gla'}", 'overrides', '9'),
    'heads': ('--config.model.mixers.a.num_heads=3', 'num_kv_heads 2 does not divide num_heads 3'),
    'width': ('--config.model.mixers.g.num_heads=3', 'value width 128 must divide into num_heads 3'),
    'field': ("--config.model.mlp_overrides={1: {'kindd': 'moe'}}", "did you mean 'kind'?"),
    'type': ("--config.model.overrides={'a': 3}", 'overrides'),
    'number': ('--config.steps=0', 'steps 0 must be >= 1'),
    'choice': ('--config.optim.kind=adam', "unknown kind 'adam'; did you mean 'adamw'? valid: adamw, lion, muon"),
    'schedule': ('--config.optim.decay=1000', 'exceed the run of steps 400'),
    'preset': ('--config.sharding=fsdpp', "unknown sharding preset 'fsdpp'; did you mean 'fsdp'?"),
    'method': ('--config.context=rings', "unknown context method 'rings'; did you mean 'ring'?"),
    'mirror': ('--config.log.wandb=True', 'log.wandb is True, but wandb is not installed: pip install wandb'),
    'task': ('--config.data.task.kind=textt', "unknown task 'textt'; did you mean 'text'?"),
    'nowhere': ('--config.data.task.path=/nowhere/*.py', "no file in '/nowhere/*.py'"),
    'empty': ('--config.data.task.path={tmp}/empty', 'no file in', 'expected a text or .jsonl file'),
    'blank': ('--config.data.task.path={tmp}/blank', 'leaves no training text (1 documents, 0 bytes)'),
    'json': ('--config.data.task.path={tmp}/lines.jsonl', "line 1: expected a JSON object with the field 'text'"),
    'packing': ('--config.model.kind=encoder --config.model.mixers.g.kind=agent',
                'layer 0 (g) keeps 1 documents of a packed row apart, the data pack up to',
                "or one document a row: data.task.packing = 'off'"),
    'corrupt': ('--config.run_dir={tmp}/corrupt', 'checkpoint 6', 'differs from its digest', 'good checkpoint is step 4',
                'set checkpoint.fallback=True'),
    'foreign': ('--config.run_dir={tmp}/foreign', 'holds foreign files (notes.txt)', 'give another run_dir'),
    'resolved': ('--resolved={tmp}/c.json', "c.json: unknown key config.model.widht; did you mean 'width'?"),
}  # fmt: skip


@pytest.fixture(scope='module')
def bad(whole, tmp_path_factory):
    """A folder of bad input of every kind."""
    folder = tmp_path_factory.mktemp('bad')
    shutil.copytree(whole, folder / 'corrupt')
    damaged = max((folder / 'corrupt/checkpoints/6').rglob('*'), key=lambda path: path.stat().st_size * path.is_file())
    damaged.write_bytes(damaged.read_bytes()[:-1] + b'?')
    for name in ('empty', 'blank', 'foreign/checkpoints'):
        (folder / name).mkdir(parents=True)
    (folder / 'blank/a.txt').touch()
    (folder / 'lines.jsonl').write_text('{"txt": "a"}\n')
    (folder / 'foreign/checkpoints/notes.txt').write_text('mine')
    (folder / 'c.json').write_text('{"model.widht": 3}')
    return folder


@pytest.fixture(scope='module')
def second():
    """A second of this machine's processor: to import jax takes most of one where it does nothing else."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, '-c', 'import jax'], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return max(1.0, 1.2 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))


@pytest.mark.parametrize('name', BAD)
def test_bad_input_gets_one_line_within_a_second(bad, second, name):
    flag, *messages = BAD[name]
    flags = flag.replace('{tmp}', str(bad)).split(' --')
    flags = [flags[0], *('--' + more for more in flags[1:])]
    flags += [] if name in ('corrupt', 'foreign', 'resolved') else [f'--config.run_dir={bad}/none']
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(*flags)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    for message in messages:
        assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < second
