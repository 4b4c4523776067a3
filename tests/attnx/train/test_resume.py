"""`train.py` is killed and continues bit for bit, on an NVIDIA GPU too: `JAX_PLATFORMS=cuda pytest -m gpu <this file>`."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import attnx
from attnx.nn import params as params_lib
from attnx.train import metrics

ROOT = pathlib.Path(__file__).parents[3]
STEPS, EVERY, KILLED = 60, 10, 35
SETTINGS = {
    'steps': STEPS, 'checkpoint.every': EVERY, 'log.every': 1, 'eval_every': 0, 'sample.tokens': 0, 'data.eval_batches': 1,
    'optim.warmup': 5, 'optim.decay': 10,
    'model.num_layers': 2, 'model.dropout': 0.1, 'model.mixers.a.num_heads': 2, 'model.mixers.g.num_heads': 2,
}  # fmt: skip
SIZES = {
    # Sums of the same order in every process: no kernel is chosen by how fast it was, none adds as its threads come.
    'cuda': ({'model.dtype': 'bfloat16'}, '--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0'),
    'cpu': ({'model.width': 16, 'data.length': 16, 'data.batch_size': 2}, '--xla_backend_optimization_level=0'),
}


@pytest.fixture
def trainer():
    """Starts train.py; ends what is left of it."""
    started = []

    def start(platform, corpus, run_dir):
        sizes, flags = SIZES[platform]
        given = SETTINGS | sizes | {'data.task.path': corpus, 'run_dir': run_dir}
        env = {'JAX_PLATFORMS': platform, 'XLA_FLAGS': flags, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
        command = [sys.executable, 'train.py', *(f'--config.{name}={value}' for name, value in given.items())]
        with open(f'{run_dir}.txt', 'a') as said:
            started.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=said, stderr=said))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def ended(process, run_dir, code):
    assert process.wait(300) == code, pathlib.Path(f'{run_dir}.txt').read_text()[-4000:]


def lines(run_dir):
    return [{k: v for k, v in entry.items() if k not in metrics.TIMES} for entry in metrics.read(run_dir)]


@pytest.mark.parametrize('platform', [pytest.param('cuda', marks=pytest.mark.gpu), pytest.param('cpu', marks=pytest.mark.slow)])
def test_killed_and_continued(tmp_path, trainer, platform):
    corpus, whole, broken = tmp_path / 'corpus', tmp_path / 'whole', tmp_path / 'broken'
    corpus.mkdir()
    for i in range(12):
        (corpus / f'file_{i}.py').write_text(f'def add_{i}(a, b):\n    return a + b + {i}\n\n\n' * 40)
    undisturbed, killed = (trainer(platform, corpus, folder) for folder in (whole, broken))
    while killed.poll() is None and (not (broken / 'metrics.jsonl').exists() or len(lines(broken)) <= KILLED):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    ended(killed, broken, -signal.SIGKILL)
    reached = lines(broken)[-1]['step']
    ended(undisturbed, whole, 0)
    ended(trainer(platform, corpus, broken), broken, 0)
    assert f'resumed {broken} at step' in pathlib.Path(f'{broken}.txt').read_text()
    assert EVERY < reached < STEPS
    assert lines(broken) == lines(whole)  # losses, gradient norms: what optimizer and data decide
    ours, theirs = (params_lib.to_flat(attnx.load(folder).model) for folder in (broken, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
