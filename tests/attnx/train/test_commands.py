"""`train.py` as a command: resolved configs, bad input in one line within a second, nothing that steers a terminal."""

import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from attnx import config as config_lib
from attnx.train import loop, metrics
from tests.runs import state_of

ROOT = pathlib.Path(__file__).parents[3]


def test_a_resolved_config_runs_again_from_json_alone(config, tmp_path):
    mixers = {'m': {'kind': 'gqa', 'masks': (('window', 4),)}}
    change = {'model.num_layers': 1, 'model.overrides': {0: 'm'}, 'model.mixers': mixers, 'steps': 4}
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
    done = subprocess.run(
        [sys.executable, '-c', watch, str(tmp_path / 'c.json')], cwd=ROOT, capture_output=True, text=True, timeout=120
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


def seconds(*command):
    """A command's processor time, and what it said."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


@pytest.fixture(scope='module')
def second():
    """A second of this machine's processor: to import jax takes most of one where it does nothing else."""
    return max(1.0, 1.2 * seconds('-c', 'import jax')[0])


@pytest.mark.quick(
    'key', 'file', 'mechanism', 'heads', 'type', 'choice', 'nowhere', 'json', 'packing', 'corrupt', 'foreign',
    'resolved'
)
@pytest.mark.parametrize('name', BAD)
def test_bad_input_gets_one_line_within_a_second(bad, second, name):
    flag, *messages = BAD[name]
    flags = flag.replace('{tmp}', str(bad)).split(' --')
    flags = [flags[0], *('--' + more for more in flags[1:])]
    flags += [] if name in ('corrupt', 'foreign', 'resolved') else [f'--config.run_dir={bad}/none']
    took, done = seconds('train.py', *flags)
    assert done.returncode == 2
    for message in messages:
        assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    for _ in range(3):  # what shares a core or its cache only adds to the time
        took = took if took < second else min(took, seconds('train.py', *flags)[0])
    assert took < second
