"""The runner under kills, on several devices, as a SLURM array."""

import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from attnx import config as config_lib
from attnx.ablate import Study, runner
from tests.studies import ARMS, SMALL, STUDY, load, numbers

LONGEST = 600  # seconds that one command may take


def _run_study(file, begins):
    """What a killed process does; `begins` is set when the imports are done."""
    begins.set()
    config_lib.build(Study, config_lib.as_dict(load(file), 'study')).run()


@pytest.mark.slow
def test_killed_and_parallel_studies_find_the_same_numbers(tmp_path, monkeypatch):
    """Twenty SIGKILLs at random times after the imports; then two workers finish the study.

    The times are drawn from how long the whole takes. Processes are forked from one that has imported everything.
    """
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'compiled'))
    forks = multiprocessing.get_context('forkserver')
    forks.set_forkserver_preload([__name__, 'attnx.train.loop', 'orbax.checkpoint'])
    files = {name: tmp_path / f'{name}.py' for name in ('whole', 'parts')}
    for name, file in files.items():
        often = {**SMALL, 'checkpoint': {'every': 1}}
        file.write_text(STUDY.format(base=often, arms=ARMS, run_dir=str(tmp_path / name)))

    def start(name):
        begins = forks.Event()
        process = forks.Process(target=_run_study, args=(files[name], begins))
        process.start()
        assert begins.wait(120)
        return process, time.monotonic()

    process, began = start('whole')
    process.join(LONGEST)
    assert process.exitcode == 0
    whole, kills, done, rng = time.monotonic() - began, 0, [], np.random.default_rng(0)
    for _ in range(40):  # some end before they are killed
        if kills == 20:
            break
        process, _ = start('parts')
        process.join(whole * rng.uniform(0.02, 0.4))
        kills += process.is_alive()
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        done.append(len(list((tmp_path / 'parts' / 'results').glob('*.json'))))
        if process.exitcode == 0:  # finished: another such study begins
            shutil.rmtree(tmp_path / 'parts')
    assert kills == 20
    print(f'20 kills in runs of at most {0.4 * whole:.1f} s; runs finished after each: {done}')
    command = [sys.executable, '-m', 'attnx.ablate', f'--config={files["parts"]}', '--workers=2']
    assert subprocess.run(command, cwd=pathlib.Path(__file__).parents[3], timeout=LONGEST).returncode == 0
    made = {n: config_lib.build(Study, config_lib.as_dict(load(file), 'study')) for n, file in files.items()}
    assert numbers(made['whole']) == numbers(made['parts']) and len(numbers(made['whole'])[2]) == 6


@pytest.mark.parametrize(('visible', 'given'), [('4,7', ['4', '7', '4']), (None, ['0', '1', '0'])])
def test_workers_share_devices_out(tmp_path, monkeypatch, visible, given):
    """With a `nvidia-smi` that lists two GPUs, and a Python that says what it was given."""
    for name, text in {'nvidia-smi': 'echo GPU 0: x; echo GPU 1: y', 'python': f'env > {tmp_path}/$$'}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\n{text}\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys, 'executable', str(tmp_path / 'python'))
    monkeypatch.delenv('JAX_PLATFORMS')
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if visible:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    assert runner.workers_of([], 3) == 0
    said = [path.read_text() for path in tmp_path.iterdir() if path.name.isdecimal()]
    assert sorted(re.search('CUDA_VISIBLE_DEVICES=(.*)', text)[1] for text in said) == sorted(given)
    assert all('MEM_FRACTION=0.45' in text for text in said)  # two of three share a GPU
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    assert runner.gpus() == []


SBATCH = """#!/bin/sh
cp "$1" {folder}/script.sh
echo Submitted batch job 7
"""
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do case $1 in *=*) shift ;; --output|--error) shift 2 ;; *) shift ;; esac; done
exec "$@"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A `sbatch` that keeps the script it is given, and a `srun` that runs its command here."""
    pytest.importorskip('submitit')
    folder = tmp_path / 'bin'
    folder.mkdir()
    for name, text in {'sbatch': SBATCH.replace('{folder}', str(folder)), 'srun': SRUN}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv('PATH', str(folder), prepend=os.pathsep)
    return folder / 'script.sh'


def test_workers_are_submitted_as_a_slurm_array(tmp_path, slurm):
    options = runner.slurm_options(['timeout_min=240', 'slurm_partition=gpu'])
    jobs = runner.submit(['--config=a study.py', '--workers', '8'], 3, tmp_path / 'study', options)
    script = slurm.read_text()
    for line in ('--array=0-2%3', '--partition=gpu', '--time=240', '--job-name=ablate'):
        assert f'#SBATCH {line}\n' in script, script
    assert [job.job_id for job in jobs] == ['7_0', '7_1', '7_2']
    call = jobs[2].submission()
    command = [sys.executable, '-m', 'attnx.ablate', '--config=a study.py', '--workers', '8']
    assert call.function is subprocess.run and call.args[0][:6] == command and '--workers=1' in call.args[0][6:]


@pytest.mark.parametrize(
    ('options', 'message'),
    [(['time'], "'time' is not name=value"), (['slurm_partitoin=gpu'], 'slurm_options .*partitoin')],
)
def test_bad_slurm_options_are_refused(tmp_path, slurm, options, message):
    with pytest.raises(ValueError, match=message):
        runner.submit([], 2, tmp_path / 'study', runner.slurm_options(options))
    assert not slurm.exists()


def test_without_slurm_nothing_is_submitted(tmp_path, monkeypatch):
    pytest.importorskip('submitit')
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(ValueError, match='--slurm needs sbatch'):
        runner.submit([], 2, tmp_path, {})


@pytest.mark.slow
def test_a_slurm_array_runs_the_study(tmp_path, slurm):
    """Through the command line; what SLURM would start is started here, both tasks of the array at once."""
    root, file = pathlib.Path(__file__).parents[3], tmp_path / 'study.py'
    file.write_text(STUDY.format(base=SMALL, arms=ARMS, run_dir=str(tmp_path / 'study')))
    command = [sys.executable, '-m', 'attnx.ablate', '--config', str(file)]
    assert subprocess.run([*command, '--slurm', '2'], cwd=root, timeout=LONGEST).returncode == 0
    task = {f'SLURM_{name}': '7' for name in ('JOB_ID', 'ARRAY_JOB_ID')} | {'SLURM_JOB_NODELIST': 'here'}
    task |= {f'SLURM_{name}': '1' for name in ('NTASKS', 'JOB_NUM_NODES')}
    task |= {f'SLURM_{name}': '0' for name in ('NODEID', 'PROCID', 'LOCALID')} | {'SLURMD_NODENAME': 'here'}
    started = [
        subprocess.Popen(['bash', str(slurm)], cwd=root, env={**os.environ, **task, 'SLURM_ARRAY_TASK_ID': str(i)})
        for i in range(2)
    ]
    assert [process.wait(LONGEST) for process in started] == [0, 0]
    made = config_lib.build(Study, config_lib.as_dict(load(file), 'study'))
    assert made.results['status'] == ['finished'] * 6
