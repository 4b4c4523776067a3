"""No setting of a run is silently ignored: each changes what the run does or leaves behind, or is refused.

Those of mechanisms, models, optimizers and the step are in `tests/test_effects.py` and the law `effective`.
"""

import dataclasses
import pathlib
import re

import grain
import jax
import pytest

from attnx import config as config_lib
from attnx.train import data, loop, metrics

GROUPS = ('data', 'checkpoint', 'log', 'sample', 'profile', 'health')
ALONE = 'used_only_if_asked'
ELSEWHERE = {  # field -> where it is shown
    'run_dir': 'attnx/train/test_loop.py::test_a_run_leaves_everything_and_the_second_command_says_so',
    'distributed': 'attnx/train/test_processes.py::test_two_processes_equal_one',
    'mesh': 'attnx/train/test_loop.py::test_sharded_accumulated_run_equals_the_plain_one',
    'sharding': 'attnx/test_sharding.py::test_no_device_ever_holds_the_whole_model',
    'context': 'attnx/ops/test_parallel.py::test_softmax_attention_over_the_context_axis',
    'compiler': 'attnx/train/test_loop.py::test_settings_that_cannot_be_served',
    'tune': 'attnx/train/test_loop.py::test_tuned_tiles_belong_to_the_run',
    'checkpoint.fallback': f'attnx/train/test_checkpoint.py::test_a_corrupt_checkpoint_is_named_and_the_last_good_one_{ALONE}',
    'checkpoint.elastic': 'attnx/train/test_checkpoint.py::test_another_layout_is_refused_unless_asked',
    'sample.bases': 'attnx/models/test_buckets.py::test_streams_are_mixed_by_their_largest_logits',
    'log.wandb': 'attnx/train/test_loop.py::test_wandb_mirrors_the_log_and_a_resumed_run_keeps_its_id',
    'log.project': 'attnx/train/test_loop.py::test_wandb_mirrors_the_log_and_a_resumed_run_keeps_its_id',
}  # fmt: skip
CHANGED = {
    'seed': 1, 'steps': 5, 'eval_every': 1,
    'data.task': {'kind': 'copy'}, 'data.length': 9, 'data.batch_size': 16, 'data.eval_batches': 2, 'data.seed': 1,
    'data.threads': 1, 'data.prefetch': 3,
    'checkpoint.every': 2, 'checkpoint.keep_last': 3, 'checkpoint.keep_best': 3, 'checkpoint.folder': 'elsewhere',
    'log.every': 2, 'log.tensorboard': True, 'log.peak_flops': 1e9,
    'sample.tokens': 3, 'sample.count': 1, 'sample.prompt': 'x', 'sample.temperature': 0.0, 'sample.top_k': 1,
    'sample.top_p': 0.01,
    'profile.start': 1, 'profile.steps': 2,
    'health.every': 4, 'health.rows': 2,
}  # fmt: skip
REFUSED = {
    'steps': 0, 'eval_every': -1, 'seed': -1, 'run_dir': '', 'sharding': 'fsdp', 'context': 'ring', 'mesh': {'dat': 2},
    'data.length': -1, 'data.batch_size': 0, 'data.eval_batches': -1, 'data.threads': -1, 'data.prefetch': -1, 'data.seed': -1,
    'checkpoint.every': -1, 'checkpoint.keep_last': 1, 'checkpoint.keep_best': -1, 'checkpoint.folder': 'ftp://x',
    'log.every': 0, 'log.project': 'other', 'log.peak_flops': 0.0, 'log.wandb': True,
    'sample.tokens': -1, 'sample.count': -1, 'sample.temperature': -1.0, 'sample.top_k': -1, 'sample.top_p': 0.0,
    'profile.start': 4, 'profile.steps': 0, 'health.every': -1, 'health.rows': 9, 'step.max_non_finite': 3,
}  # fmt: skip


def test_every_field_is_shown():
    fields = {f.name for f in dataclasses.fields(loop.Config)} - {'model', 'optim', 'step', *GROUPS}
    for group in GROUPS:
        fields |= {f'{group}.{f.name}' for f in dataclasses.fields(loop.Config.__dataclass_fields__[group].default_factory())}
    assert fields == {*CHANGED, *ELSEWHERE}
    for where in ELSEWHERE.values():
        path, name = where.split('::')
        assert re.search(rf'^def {name}\(', (pathlib.Path(__file__).parents[2] / path).read_text(), re.M), where


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus')
    for i in range(12):
        (folder / f'{i}.txt').write_text(f'{i} is a number and {i + 1} is the next\n' * 4)
    return str(folder)


@pytest.fixture
def left(corpus, tmp_path, monkeypatch):
    """Runs a tiny model with settings and gives what it did and left."""
    events, plain = [], data.Train.__next__
    monkeypatch.setattr(data.Train, '__next__', lambda self: (events.append('batch'), plain(self))[1])
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: events.append('start'))
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: events.append('stop'))
    options = grain.ReadOptions
    monkeypatch.setattr(grain, 'ReadOptions', lambda **given: (events.append(given), options(**given))[1])

    def run(name, **change):
        config = made(corpus, tmp_path / name, **change)
        loop.run(config)
        files = {p.relative_to(tmp_path / name).as_posix() for p in (tmp_path / name).rglob('*')}
        kept = {name for name in files if re.fullmatch(r'checkpoints/\d+|\w+|\w+\.\w+', name)}
        lines = [{k: k if k in metrics.TIMES else v for k, v in line.items()} for line in metrics.read(config.run_dir)]
        sample = pathlib.Path(config.run_dir, 'sample.txt')
        found = events[:], kept, lines, sample.read_text() if sample.exists() else None
        events.clear()
        return found

    return run


def made(corpus, folder, /, **change):
    given = {
        'run_dir': str(folder),
        'steps': 4,
        'eval_every': 2,
        'model': {'width': 8, 'num_layers': 1, 'pattern': ('gqa',), 'dropout': 0.1},
        'data': {'task': {'kind': 'text', 'path': corpus}, 'length': 8, 'batch_size': 8, 'eval_batches': 1},
        'optim': {'warmup': 1, 'decay': 1},
        'checkpoint': {'every': 1, 'keep_last': 2, 'keep_best': 0},
        'log': {'every': 1},
        'sample': {'tokens': 8, 'count': 2, 'temperature': 2.0, 'top_p': 1.0},
        'profile': {'start': 2, 'steps': 1},
        'health': {'every': 2},
    }
    for name, value in change.items():
        group, _, field = name.rpartition('.')
        (given.setdefault(group, {}) if group else given)[field] = value
    return config_lib.build(loop.Config, given)


@pytest.mark.slow
def test_each_setting_changes_what_a_run_does_or_leaves(left, tmp_path):
    base, silent = left('base'), []
    assert left('again') == base
    for number, (name, value) in enumerate(CHANGED.items()):
        value = str(tmp_path / value) if name == 'checkpoint.folder' else value
        if left(str(number), **{name: value}) == base:
            silent.append(name)
    assert not silent


@pytest.mark.parametrize('name', REFUSED)
def test_values_without_a_meaning_are_refused(corpus, tmp_path, name):
    with pytest.raises(ValueError, match=re.escape(name.rpartition('.')[2]) if name != 'mesh' else 'mesh axis'):
        loop.check(made(corpus, tmp_path, **{name: REFUSED[name]}))
