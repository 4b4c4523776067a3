"""Several processes train one model: as many devices in one process give the same losses."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from attnx.train import loop

ROOT = pathlib.Path(__file__).parents[3]
FLAGS = (
    '--config.steps=3', '--config.eval_every=0', '--config.log.every=1', '--config.checkpoint.every=0',
    '--config.sample.tokens=0', '--config.optim.kind=adamw', '--config.optim.warmup=1', '--config.optim.decay=1',
    '--config.model.width=32', '--config.model.num_layers=2', "--config.model.pattern=('gla','a')",
    "--config.model.mlp_overrides={1: {'kind': 'moe', 'experts': 4}}",
    "--config.model.mixers.a.num_heads=4", '--config.model.vocab_size=258',
    '--config.data.length=32', '--config.data.batch_size=8', '--config.data.eval_batches=1',
)  # fmt: skip


def train(folder, corpus, processes, *flags):
    """Runs train.py in `processes` processes of 4 / `processes` devices each; its training losses."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    command = [sys.executable, 'train.py', *FLAGS, f'--config.data.task.path={corpus}', f'--config.run_dir={folder}']
    command += [f'--config.distributed={processes > 1}', *flags]
    env = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': str(4 // processes),
        'XLA_FLAGS': '--xla_backend_optimization_level=0',
        'JAX_COMPILATION_CACHE_DIR': os.environ.get('TEST_CACHE', str(ROOT / '.jax_cache')),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
        'JAX_NUM_PROCESSES': str(processes),
    }
    options = {'cwd': ROOT, 'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    started = [subprocess.Popen(command, env=env | {'JAX_PROCESS_ID': str(rank)}, **options) for rank in range(processes)]
    try:
        said = [process.communicate(timeout=500)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, '\n'.join(said)[-4000:]
    entries = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [e['loss'] for e in entries if e['split'] == 'train']


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    corpus = tmp_path / 'corpus'
    corpus.mkdir()
    for i in range(12):
        (corpus / f'file_{i}.py').write_text(f'def add_{i}(a, b):\n    return a + b + {i}\n\n\n' * 8)
    one = train(tmp_path / 'one', corpus, 1)
    assert len(one) == 3
    ways = {
        'rows': ('mesh.data=1', 'mesh.fsdp=2', 'mesh.expert=2', 'sharding=fsdp'),
        # the sequence is cut across the processes: both hold all rows
        'tokens': ('mesh.data=1', 'mesh.context=4', 'sharding=fsdp_context', 'context=ring'),
    }
    for name, settings in ways.items():
        flags = [f'--config.{setting}' for setting in settings]
        np.testing.assert_allclose(train(tmp_path / name, corpus, 2, *flags), one, rtol=2e-5, err_msg=name)


def test_processes_that_nobody_counts(monkeypatch):
    def initialize(**known):
        raise ValueError('coordinator_address should be defined.')  # jax's own words

    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    with pytest.raises(ValueError, match=r'coordinator_address .* or set JAX_COORDINATOR_ADDRESS, .* and JAX_PROCESS_ID'):
        loop.run(loop.Config(distributed=True))


CLUSTERS = {  # what srun and mpirun tell their processes
    'slurm': {
        'SLURM_JOB_ID': '{port}', 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_STEP_NUM_NODES': '1', 'SLURM_NTASKS': '2',
        'SLURM_PROCID': '{rank}', 'SLURM_LOCALID': '{rank}',
    },
    'open mpi': {
        'OMPI_MCA_orte_hnp_uri': '{port}.0;tcp://127.0.0.1:1', 'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': '{rank}',
        'OMPI_COMM_WORLD_LOCAL_RANK': '{rank}',
    },
}  # fmt: skip
SAY = """
import jax
from attnx.train import loop
def check(config):
    print('process', jax.process_index(), 'of', jax.process_count())
    raise SystemExit
loop.check = check
loop.run(loop.Config(distributed=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize('cluster', CLUSTERS)
def test_clusters_need_no_settings(cluster):
    started = []
    for rank in range(2):
        told = {name: value.format(port=os.getpid(), rank=rank) for name, value in CLUSTERS[cluster].items()}
        env = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''} | told
        started.append(subprocess.Popen([sys.executable, '-c', SAY], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    try:
        assert [p.communicate(timeout=300)[0] for p in started] == [f'process {rank} of 2\n' for rank in range(2)]
    finally:
        for process in started:
            process.kill()
