"""Runs a study: what is finished is never run again, what was cut short is resumed, any number of workers share it.

A study's folder holds `study.json` (what it is), `runs/<cell>/` (an ordinary run each) and `results/<cell>.json` (its
outcome, written last and at once). A worker takes the next cell that nobody holds; so further processes, hosts of a
shared file system or a SLURM array are just more workers.
"""

import contextlib
import datetime
import fcntl
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from attnx import config as config_lib
from attnx.ablate.study import METRICS, Cell, Study
from attnx.train.checkpoint import differing

PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


class Stopped(RuntimeError):
    """A signal ended a run; the study goes on where it was."""


def folder(study: Study) -> pathlib.Path:
    return pathlib.Path(study.run_dir)


def claim(study: Study) -> None:
    """Writes what the study is, or compares with what was written.

    Raises:
      ValueError: the folder holds another study; the differences are named.
    """
    path, now = folder(study) / 'study.json', study.description()
    if path.exists():
        saved = json.loads(path.read_text())
        new = [name for name in now if name not in saved and name.startswith('base.')]
        if study.says_the_same_without([name.removeprefix('base.') for name in new]):
            now = {name: value for name, value in now.items() if name not in new}
        lines = differing(saved, now)
        if lines:
            shown = '; '.join(lines[:5]) + (f'; and {len(lines) - 5} more' if len(lines) > 5 else '')
            raise ValueError(f'{path.parent} holds another form of this study: {shown}. Fork it: give another run_dir')
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, now)


def _write(path: pathlib.Path, value: Any) -> None:
    draft = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    draft.write_text(json.dumps(value, indent=1) + '\n')
    os.replace(draft, path)


def outcome(study: Study, cell: Cell) -> dict | None:
    path = folder(study) / 'results' / f'{cell.name}.json'
    return json.loads(path.read_text()) if path.exists() else None


def finished(study: Study, cells: list[Cell] | None = None) -> list[dict]:
    """The outcomes of all cells that have one, in the study's order."""
    found = (outcome(study, cell) for cell in (study.cells() if cells is None else cells))
    return [entry for entry in found if entry is not None]


def table(entries: list[dict]) -> dict[str, list]:
    """Column -> values: one row an outcome, None where an entry lacks a column."""
    rows = [config_lib.flatten({k: v for k, v in e.items() if k != 'config'}) for e in entries]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


@contextlib.contextmanager
def held(path: pathlib.Path):
    """Whether this process got the lock; a lock ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def run(study: Study, *, workers: int = 1, say=lambda text: print(text, file=sys.stderr, flush=True)) -> None:
    """Trains every cell that has no outcome yet.

    workers: processes on this machine; more than one need a study that came from a file.

    Raises:
      ValueError: an arm that is refused, another study in the folder: all before the first step.
      Stopped: a signal ended the run.
    """
    started, trained = time.monotonic(), 0.0
    cells = study.cells()
    claim(study)
    _compile_cache(folder(study) / 'compiled')
    left = [cell for cell in cells if outcome(study, cell) is None]
    say(f'{study.question}\n{len(cells)} runs in {study.run_dir}, {len(cells) - len(left)} of them finished')
    rungs = [round(share * left[0].config.steps) for share in study.halving.rungs] if left else []
    began, done = time.monotonic(), 0
    for until in (*rungs, None):
        for group in groups(study, cells):
            if all(outcome(study, cell) is not None for cell in group):
                continue
            with held(folder(study) / 'locks' / group[0].name) as mine:
                entries = execute(study, group, until) if mine else []
            done += len(entries)
            trained += sum(entry['seconds'] for entry in entries)
            for entry in entries:
                rest = sum(outcome(study, other) is None for other in cells)
                ahead = (time.monotonic() - began) / done * rest
                place = f'{entry["arm"]}{f" on {entry['task']}" if entry["task"] else ""}, seed {entry["seed"]}'
                say(
                    f'[{len(cells) - rest}/{len(cells)}] {place}: {_shown(study, entry)} ({entry["seconds"]:.0f} s)  '
                    f'ETA {int(ahead) // 60}:{int(ahead) % 60:02d}'
                )
        if until is not None:
            for cell in hopeless(study, cells, until):
                say(f'{cell.name}: behind at step {until}, not trained further')
                _write_outcome(study, cell, {'status': f'dropped at step {until}', 'seconds': 0.0})
    if done:
        own = time.monotonic() - started - trained
        say(f'{done} runs took {trained:.1f} s, the study around them {own:.1f} s ({own / trained:.1%})')


def _shown(study: Study, entry: dict) -> str:
    value = entry.get('values', {}).get(study.metric)
    return entry['status'] if value is None else f'{study.metric} {value:.4f}'


def _compile_cache(path: pathlib.Path) -> None:
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update('jax_compilation_cache_dir', str(path.absolute()))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


def groups(study: Study, cells: list[Cell]) -> list[list[Cell]]:
    """The cells that are trained at once."""
    alike = (lambda c: (c.arm, c.task, c.rate)) if study.batch_seeds else (lambda c: c.name)
    return [list(group) for _, group in itertools.groupby(cells, alike)]


def execute(study: Study, group: list[Cell], until: int | None = None) -> list[dict]:
    """Cells that are trained at once, from where they stand to `until` or their end; the outcomes of those that ended."""
    from attnx.train import together

    left, began = [cell for cell in group if outcome(study, cell) is None], time.monotonic()
    known: dict[str, dict] = {}
    if left and len(group) > 1:
        with _log(left[0]):
            evaluations = together.run_together([cell.config for cell in group])
        if evaluations is None:
            raise Stopped('stopped by a signal: this arm begins again. Run the same command again.')
        known = {cell.name: evaluation for cell, evaluation in zip(group, evaluations) if evaluation}
    spent = (time.monotonic() - began) / max(1, len(left))
    entries = [_single(study, cell, until, spent, known.get(cell.name)) for cell in left]
    return [entry for entry in entries if entry is not None]


@contextlib.contextmanager
def _log(cell: Cell):
    """What a run says goes to its folder."""
    pathlib.Path(cell.config.run_dir).mkdir(parents=True, exist_ok=True)
    with (pathlib.Path(cell.config.run_dir) / 'log.txt').open('a') as log, contextlib.redirect_stderr(log):
        yield


def _single(study: Study, cell: Cell, until: int | None, spent: float, evaluation: dict | None) -> dict | None:
    """One cell; its outcome, None if it only reached `until`. A batch trained it in `spent` seconds to its `evaluation`."""
    from attnx.train import loop, metrics, report
    from attnx.train.evaluation import evaluate

    began = time.monotonic() - spent
    with _log(cell):
        try:
            if evaluation is None:
                result = loop.run(cell.config, until=until)
                if result.status == 'stopped':
                    if until is not None and result.step >= until:
                        return None
                    raise Stopped(result.message)
                evaluation = result.evaluation
            values = {k: v for k, v in evaluation.items() if k in METRICS}
            for name, change in study.evals.items():
                other = _other(cell, change)
                values |= {f'{name}/{k}': v for k, v in evaluate(cell.config, other).items()}
            status = 'finished'
        except report.TrainingFailure as failure:
            values, status = {}, f'failed: {failure}'
    entry = {'status': status, 'values': values, 'seconds': time.monotonic() - began}
    speeds = [e['tokens_per_second'] for e in metrics.read(cell.config.run_dir) if e.get('tokens_per_second')]
    if speeds[1:]:
        entry['tokens_per_second'] = statistics.median(speeds[1:])
    return _write_outcome(study, cell, entry)


def _other(cell: Cell, change: Mapping | str):
    from attnx.ablate.study import build, other_data

    return build(other_data(config_lib.to_dict(cell.config), change)).data


@functools.cache
def circumstances() -> dict[str, str]:
    """Of this process: device, versions, commit (of the checkout; GIT_COMMIT where there is none)."""
    import jax

    git = lambda *a: subprocess.run(['git', *a], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent)
    found, edited = git('rev-parse', 'HEAD'), git('status', '--porcelain', '--untracked-files=no').stdout.strip()
    commit = found.stdout.strip() + (' with local changes' if edited else '')
    versions = [f'Python {platform.python_version()}', *(f'{p} {importlib.metadata.version(p)}' for p in PACKAGES)]
    return {
        'device': f'{jax.device_count()} × {jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} CPU cores',
        'versions': ', '.join(versions),
        'commit': commit if found.returncode == 0 else os.environ.get('GIT_COMMIT', 'not a checkout'),
    }


def _write_outcome(study: Study, cell: Cell, entry: dict) -> dict:
    entry = {'arm': cell.arm, 'task': cell.task, 'seed': cell.seed, 'rate': cell.rate, **entry, **circumstances()}
    entry['ended'] = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    path = folder(study) / 'results' / f'{cell.name}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, entry)
    return entry


def hopeless(study: Study, cells: list[Cell], step: int) -> list[Cell]:
    """Cells of the arms that are behind at a rung, task by task; the baseline is never among them."""
    from attnx.train import metrics

    name = study.metric.rpartition('/')[2]
    sign = -1 if METRICS[name] else 1
    dropped = []
    for task in dict.fromkeys(c.task for c in cells):
        here = [c for c in cells if c.task == task and outcome(study, c) is None]
        standing: dict[str, list[float]] = {}
        for cell in here:
            at = [e[name] for e in metrics.read(cell.config.run_dir) if e['split'] == 'eval' and e['step'] == step]
            standing.setdefault(cell.arm, []).extend(sign * v if isinstance(v, float) else float('inf') for v in at)
        order = sorted(standing, key=lambda arm: statistics.fmean(standing[arm]) if standing[arm] else float('inf'))
        kept = {*order[: max(1, round(study.halving.keep * len(order)))], study.reference}
        dropped += [c for c in here if c.arm not in kept]
    return dropped


def worker(arguments: list[str]) -> list[str]:
    """The command of one worker: of a flag given twice the last counts."""
    return [sys.executable, '-m', 'attnx.ablate', *arguments, '--workers=1', '--slurm=0', '--noreport']


def gpus() -> list[str]:
    """The NVIDIA GPUs that a process here may use, as CUDA_VISIBLE_DEVICES names them."""
    if 'cuda' not in os.environ.get('JAX_PLATFORMS', 'cuda') or shutil.which('nvidia-smi') is None:
        return []
    if 'CUDA_VISIBLE_DEVICES' in os.environ:
        return [name for name in os.environ['CUDA_VISIBLE_DEVICES'].split(',') if name]
    listed = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True).stdout.splitlines()
    return [str(i) for i, line in enumerate(listed) if line.startswith('GPU')]


def workers_of(arguments: list[str], count: int) -> int:
    """Starts `count` processes of the same command, waits, and returns the worst exit code.

    Each has a GPU of its own where there are as many, else they share GPUs and their memory evenly; likewise CPU cores.
    """
    devices, cores, processes = gpus(), sorted(os.sched_getaffinity(0)), []
    sharing = -(-count // len(devices)) if devices else 1
    for i in range(count):
        own = {'CUDA_VISIBLE_DEVICES': devices[i % len(devices)]} if devices else {}
        own |= {'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{0.9 / sharing:.2f}'} if sharing > 1 else {}
        processes.append(subprocess.Popen(worker(arguments), env={**os.environ, **own}))
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(processes[-1].pid, cores[i::count] or cores)
    try:
        return max(process.wait() for process in processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()


def slurm_options(given: list[str]) -> dict[str, int | str]:
    """['timeout_min=240', 'slurm_partition=gpu'] -> name to value, numbers as such."""
    options = {}
    for entry in given:
        name, equals, value = entry.partition('=')
        if not name or not equals:
            raise ValueError(f'slurm_options: {entry!r} is not name=value, as in timeout_min=240,slurm_partition=gpu')
        options[name] = int(value) if value.isdecimal() else value
    return options


def submit(arguments: list[str], count: int, out: pathlib.Path, options: Mapping[str, Any]):
    """Submits `count` workers as a SLURM array through submitit; `options` are submitit's: timeout_min, slurm_partition …

    Raises:
      ValueError: submitit is not installed, there is no SLURM here, or it knows no such option.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError('--slurm needs submitit: pip install submitit') from None
    for program in ('sbatch', 'srun'):
        if shutil.which(program) is None:
            raise ValueError(f'--slurm needs {program}, which is not in PATH: run this where SLURM jobs are submitted')
    executor = submitit.AutoExecutor(folder=str(out.absolute() / 'slurm'), cluster='slurm')
    try:
        executor.update_parameters(name='ablate', slurm_array_parallelism=count, **options)
    except (NameError, TypeError, ValueError) as error:
        raise ValueError(f'slurm_options {dict(options)}: {error}') from None
    with executor.batch():
        return [executor.submit(subprocess.run, worker(arguments), check=True) for _ in range(count)]
