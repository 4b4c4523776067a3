"""Breaks training runs on purpose: `python tests/chaos.py --faults 100 --seconds 900`.

A fault is a kill (at any time, at a file operation, inside the write of a checkpoint), a SIGTERM, damage to a file of a
checkpoint, a full disk, a lost process of two, a NaN born in a chosen layer, malformed data, or other settings. After each
the same command must continue to what an undisturbed run gives, bit for bit (every array, every line of metrics.jsonl but
its times), or stop with the right message and then, the cause removed, continue so. Prints a table; exit code 1 if anything
was lost.

Trainers are forked from a process that has imported everything, so a start costs no imports.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0'

import jax
import matplotlib.pyplot  # noqa: F401  before the fork, as all imports
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from attnx import config as config_lib
from attnx.train import checkpoint, data, loop, metrics

jax.config.update('jax_compilation_cache_dir', os.environ.get('TEST_CACHE', str(ROOT / '.jax_cache')))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)

STEPS, EVERY = 12, 3  # of a run; between its checkpoints
LIMIT = 300  # seconds for one trainer
STATE = 'state.digest'  # what a finished trainer leaves: a digest of all its arrays


@dataclasses.dataclass
class Places:
    """What all faults share: a corpus, an undisturbed run, and one that was killed after its second checkpoint."""

    root: pathlib.Path

    corpus = property(lambda self: self.root / 'corpus.jsonl')
    whole = property(lambda self: self.root / 'whole')
    half = property(lambda self: self.root / 'half')
    pair = property(lambda self: self.root / 'pair')  # undisturbed, on two devices


def make_config(run_dir, corpus, **change):
    given = {
        'run_dir': str(run_dir),
        'steps': STEPS,
        'eval_every': 4,
        'model': {
            'width': 8, 'num_layers': 2, 'pattern': ('gqa',), 'dropout': 0.1, 'mlp': {'hidden': 16}, 'impl': 'reference',
            'mixers': {'gqa': {'kind': 'gqa', 'num_heads': 2, 'num_kv_heads': 1}},
        },
        'data': {'task': {'kind': 'text', 'path': str(corpus)}, 'length': 16, 'batch_size': 4, 'eval_batches': 1},
        'optim': {'warmup': 2, 'decay': 2},
        'checkpoint': {'every': EVERY},
        'log': {'every': 1},
        'sample': {'tokens': 0},
    }  # fmt: skip
    for name, value in change.items():
        *folders, last = name.split('.')
        inner = given
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = value
    return config_lib.build(loop.Config, given)


# Trainers


class Watched(loop.Run):
    """A run that leaves a digest of its last state, and does `at[step](run, state)` before that step's update."""

    at: dict = {}  # noqa: RUF012

    def __init__(self, *args):
        super().__init__(*args)
        update = self.update
        taken = lambda: self.data.train.step - 1

        def watched(state, *rest):
            action = self.at.pop(taken(), None)
            return update(action(self, state) if action else state, *rest)

        self.update = watched

    def train(self, *args):
        number, state, evaluation = super().train(*args)
        whole = jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(state)
        if number >= self.config.steps and jax.process_index() == 0:
            hasher = hashlib.blake2b(digest_size=16)
            for path, leaf in jax.tree_util.tree_flatten_with_path(whole)[0]:
                hasher.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf.addressable_data(0)).tobytes())
            pathlib.Path(self.run_dir, STATE).write_text(hasher.hexdigest())
        return number, state, evaluation


class Trainer:
    """A forked process that trains; `prepare()` runs in it first."""

    def __init__(self, config, prepare=lambda: None, devices: int = 1, env=None):
        self.log = tempfile.TemporaryFile('w+')  # noqa: SIM115
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            os.dup2(self.log.fileno(), 1)
            os.dup2(self.log.fileno(), 2)
            os.environ.update(env or {})
            logging.set_verbosity(logging.WARNING)
            jax.config.update('jax_num_cpu_devices', devices)
            loop.Run = Watched
            prepare()
            code = loop.command(config)
            if config.distributed:
                jax.distributed.shutdown()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit code (-9: killed), or None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self, limit: float = LIMIT) -> tuple[int, str]:
        """Exit code and output; 'timeout' kills it."""
        end = time.monotonic() + limit
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                os.waitpid(self.pid, 0)
                code = 124
                break
            time.sleep(0.02)
        self.log.seek(0)
        return code, self.log.read()


class Lost(AssertionError):
    """A fault that was not survived."""


def expect(ended: tuple[int, str], code: int, message: str = '') -> str:
    got, text = ended
    if got != code or not re.search(message, text, re.S):
        raise Lost(f'expected exit {code} and {message!r}, got {got}:\n{text[-3000:]}')
    return text


def lines(run_dir) -> list[dict]:
    return [{k: v for k, v in entry.items() if k not in metrics.TIMES} for entry in metrics.read(run_dir)]


def expect_same(run_dir, like) -> None:
    """Every array and every line of the log of a finished run are those of another."""
    read = lambda folder: pathlib.Path(folder, STATE).read_text()
    if read(run_dir) != read(like):
        raise Lost('the last state differs from that of the undisturbed run')
    ours, theirs = lines(run_dir), lines(like)
    if ours != theirs:
        steps = lambda rows: [(row['split'], row['step']) for row in rows]
        raise Lost(f'metrics.jsonl differs: {steps(ours)} for {steps(theirs)}; {[a for a in ours if a not in theirs][:2]}')


def finish(run_dir, places, like=None, **change) -> None:
    change.setdefault('corpus', places.corpus)
    expect(Trainer(make_config(run_dir, **change)).wait(), 0, 'complete')
    expect_same(run_dir, like or places.whole)


def suicide() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# Faults: each is given where to work, what is shared, and a source of randomness; returns what happened


def kill_any_time(run_dir, places, rng):
    trainer = Trainer(make_config(run_dir, places.corpus))
    time.sleep(rng.uniform(0, 1.3 * float((places.root / 'seconds').read_text())))
    done = trainer.poll()
    if done is None:
        trainer.kill()
        trainer.wait()
    finish(run_dir, places)
    return 'killed' if done is None else 'was done'


def kill_at_file_operation(run_dir, places, rng):
    left = rng.randrange(1, int((places.root / 'operations').read_text()))

    def prepare():
        count = left

        def hook(event, args):
            nonlocal count
            if event in ('open', 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir') and str(run_dir) in str(args[0]):
                count -= 1
                if not count:
                    suicide()

        sys.addaudithook(hook)

    code, text = Trainer(make_config(run_dir, places.corpus), prepare).wait()
    if code not in (-9, 0):
        raise Lost(f'exit {code}: {text[-2000:]}')
    finish(run_dir, places)
    return 'killed' if code else 'was done'


def kill_in_checkpoint(run_dir, places, rng):
    which, delay = rng.randrange(1, 5), rng.uniform(0, 0.06)

    def prepare():
        plain = checkpoint.Checkpoints.save

        def save(self, step, *args):
            if step >= which * EVERY:
                threading.Timer(delay, suicide).start()
            return plain(self, step, *args)

        checkpoint.Checkpoints.save = save

    code, text = Trainer(make_config(run_dir, places.corpus), prepare).wait()
    if code not in (-9, 0):
        raise Lost(f'exit {code}: {text[-2000:]}')
    finish(run_dir, places)
    return f'{int(1000 * delay)} ms into checkpoint {which * EVERY}'


def at_batch(number, action):
    """In a trainer: `action()` when batch `number` (1, 2, …) is taken."""

    def prepare():
        plain = data.Train.__next__

        def patched(self):
            batch = plain(self)
            if self.step == number:
                action()
            return batch

        data.Train.__next__ = patched

    return prepare


def sigterm(run_dir, places, rng):
    step = rng.randrange(1, STEPS)
    terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)
    text = expect(Trainer(make_config(run_dir, places.corpus), at_batch(step, terminate)).wait(), 143, 'stopped by SIGTERM')
    if f'at step {step} of' not in text or step not in sealed(run_dir):
        raise Lost(f'SIGTERM in step {step} lost it: {text[-500:]}')
    finish(run_dir, places)
    return f'saved step {step}'


def sealed(run_dir) -> list[int]:
    return [int(seal.parent.name) for seal in pathlib.Path(run_dir, 'checkpoints').glob(f'*/{checkpoint.SEAL}')]


def _flip(path, rng):
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def _zero(path, rng):
    raw = bytearray(path.read_bytes())
    start = rng.randrange(len(raw))
    if not any(raw[start:]):
        start = 0
    raw[start:] = bytes(len(raw) - start)
    path.write_bytes(raw)


DAMAGE = {
    'flip a bit': _flip,
    'truncate': lambda path, rng: os.truncate(path, rng.randrange(path.stat().st_size)),
    'zero a tail': _zero,
    'delete': lambda path, rng: path.unlink(),
    'link': lambda path, rng: (path.rename(path.parents[5] / 'aside'), path.symlink_to(path.parents[5] / 'aside')),
}


def damaged(kind):
    def fault(run_dir, places, rng):
        shutil.copytree(places.half, run_dir)
        newest = run_dir / 'checkpoints' / str(max(sealed(run_dir)))
        files = [path for path in newest.rglob('*') if path.is_file() and path.stat().st_size]
        if kind == 'link':
            files = list((newest / 'state/d').iterdir())
        # by size, so that most hits are in arrays, with some in every other file
        path = rng.choice(files) if rng.random() < 0.5 else rng.choices(files, [f.stat().st_size for f in files])[0]
        DAMAGE[kind](path, rng)
        message = rf'checkpoint {newest.name} .* is corrupt: .*last good checkpoint is step \d+; .* checkpoint.fallback=True'
        refused = expect(Trainer(make_config(run_dir, places.corpus)).wait(), 2, message)
        if path.name != checkpoint.SEAL and path.name not in refused:
            raise Lost(f'{path.name} is not named: {refused[-500:]}')
        finish(run_dir, places, **{'checkpoint.fallback': True})
        return path.name[:24]

    return fault


def full_disk(run_dir, places, rng):
    needed = sum(path.stat().st_size + 4096 for path in places.whole.rglob('*'))
    size = int(needed * rng.uniform(0.02, 0.9)) // 4096 * 4096 + 4096
    run_dir.mkdir()
    mounted = not subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(run_dir)], capture_output=True
    ).returncode  # fmt: skip
    try:
        if mounted:
            code, text = Trainer(make_config(run_dir, places.corpus)).wait()
            if code:
                expect((code, text), 2, 'the disk is full')
            subprocess.run(['mount', '-o', 'remount,size=64m', str(run_dir)], check=True)
        else:  # where nothing can be mounted: files may not grow
            limit = rng.randrange(512, 8192)
            prepare = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            code, _ = expect(Trainer(make_config(run_dir, places.corpus), prepare).wait(), 2, 'could not be written'), ''
        finish(run_dir, places)
    finally:
        if mounted:
            subprocess.run(['umount', '-l', str(run_dir)], check=True)
    how = f'tmpfs of {size // 1024} KiB' if mounted else 'file size limit'
    return how if code else f'{how}: all fitted'


def nan_in_layer(processes):
    def fault(run_dir, places, rng):
        layer, step, value = rng.randrange(2), rng.randrange(2, STEPS - 1), rng.choice((np.nan, np.inf, 3e38))

        def poison(run, state):
            name = next(n for n in state['params'] if n.endswith('mlp/down/kernel'))
            params = state['params'] | {name: state['params'][name].at[layer].set(value)}
            return state | {'params': params}

        def prepare():
            Watched.at = {step: poison}

        message = f'step {step + 1}: loss .*first bad tensor: (parameter|activation) .*layer.* of layer {layer}'
        if processes == 2:
            config = make_config(run_dir, places.corpus, distributed=True, **PAIR)
            trainers = two(config, (prepare, prepare))
        else:
            config = make_config(run_dir, places.corpus)
            trainers = [Trainer(config, prepare)]
        for trainer in trainers:
            expect(trainer.wait(), 1, message)
        first = json.loads((run_dir / 'failure.json').read_text())['first']
        if first['layer'] != layer:
            raise Lost(f'{first}, but it was born in layer {layer}')
        if processes == 2:
            finish_pair(config, places, rng.random() < 0.5)
        else:
            finish(run_dir, places)
        return f'{value} in layer {layer}, step {step + 1}: {first["stage"]}'

    return fault


BAD_DATA = {
    'a cut line': (lambda text: text[:-20], r'line \d+: expected a JSON object'),
    'no such field': (lambda text: text.replace('"text"', '"txet"', 1), r"line 1: .*field 'text'"),
    'a number': (lambda text: '{"text": 5}\n' + text, r"line 1: field 'text' must be a string"),
    'not JSON': (lambda text: 'no \x1b[2Jjson\n' + text, r'line 1: expected a JSON object'),
    'empty': (lambda text: '', r'leaves no training text'),
}


def malformed_data(run_dir, places, rng):
    kind = rng.choice(list(BAD_DATA))
    corpus, (spoil, message) = run_dir.with_name(run_dir.name + '.jsonl'), BAD_DATA[kind]
    good = places.corpus.read_text()
    corpus.write_text(spoil(good))
    text = expect(Trainer(make_config(run_dir, corpus)).wait(), 2, message)
    if '\x1b' in text:
        raise Lost('an escape sequence of the data went to the terminal')
    corpus.write_text(good)
    # the split goes by the names of documents, which hold the file's
    renamed = run_dir.with_name(run_dir.name + '.data')
    renamed.mkdir()
    corpus.rename(renamed / places.corpus.name)
    shutil.rmtree(run_dir)
    finish(run_dir, places, corpus=renamed / places.corpus.name)
    return kind


def changed_data(run_dir, places, rng):
    """The corpus changes between two commands: refused, and continued when it is back."""
    folder = run_dir.with_name(run_dir.name + '.data')
    folder.mkdir()
    corpus = folder / places.corpus.name
    good = places.corpus.read_text()
    corpus.write_text(good)
    code, _ = Trainer(make_config(run_dir, corpus), at_batch(rng.randrange(2 * EVERY + 2, STEPS), suicide)).wait()
    assert code == -9
    corpus.write_text(good.replace('return', 'retrun', 1))
    expect(Trainer(make_config(run_dir, corpus)).wait(), 2, 'other data; differing: .*contents: saved')
    corpus.write_text(good)
    finish(run_dir, places, corpus=corpus)
    return 'one word of the corpus'


def other_config(run_dir, places, rng):
    shutil.copytree(places.half, run_dir)
    name, value = rng.choice((('model.width', 16), ('optim.learning_rate', 0.5), ('data.batch_size', 8), ('seed', 3)))
    ended = Trainer(make_config(run_dir, places.corpus, **{name: value})).wait()
    expect(ended, 2, f'was made with other settings: .*{name}: saved .*, now {value}')
    finish(run_dir, places)
    return name


def other_layout(run_dir, places, rng):
    shutil.copytree(places.half, run_dir)
    expect(Trainer(make_config(run_dir, places.corpus), devices=2).wait(), 2, 'another layout: devices: saved 1, now 2')
    finish(run_dir, places)
    return 'two devices for one'


def two(config, prepares=(lambda: None,) * 2) -> list[Trainer]:
    """Both processes of a run, on one device each."""
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    env = lambda i: {'JAX_COORDINATOR_ADDRESS': f'localhost:{port}', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': str(i)}

    def first(prepare):
        def run():
            plain = jax.distributed.initialize
            jax.distributed.initialize = lambda **given: plain(**given, heartbeat_timeout_seconds=10)
            prepare()

        return run

    return [Trainer(config, first(prepare), env=env(i)) for i, prepare in enumerate(prepares)]


PAIR = {'sharding': 'fsdp', 'mesh': {'data': 1, 'fsdp': 2}}  # each device holds half of everything


def finish_pair(config, places, together: bool) -> None:
    """Continues on two devices, of two processes or of one."""
    if together:
        for trainer in two(config):
            expect(trainer.wait(), 0)
    else:
        expect(Trainer(dataclasses.replace(config, distributed=False), devices=2).wait(), 0, 'complete')
    expect_same(config.run_dir, places.pair)


def sigterm_of_two(run_dir, places, rng):
    """One process is told to stop: both save the same step and leave."""
    config = make_config(run_dir, places.corpus, distributed=True, **PAIR)
    told, step = rng.randrange(2), rng.randrange(2, STEPS - 3)
    terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)
    trainers = two(config, [at_batch(step, terminate) if i == told else lambda: None for i in range(2)])
    outcomes = [trainer.wait() for trainer in trainers]
    if all(code == 0 for code, _ in outcomes):  # processes agree on a step to save, here past the last one
        finish_pair(config, places, rng.random() < 0.5)
        return f'process {told} in step {step}, both were complete first'
    texts = [expect(outcome, 143) for outcome in outcomes]
    stopped = re.search(r'stopped by preemption at step (\d+)', texts[0])
    if not stopped or int(stopped[1]) not in sealed(run_dir) or int(stopped[1]) < step:
        raise Lost(f'SIGTERM in step {step} of process {told} lost it: {texts[0][-500:]}')
    finish_pair(config, places, rng.random() < 0.5)
    return f'process {told} in step {step}, both saved step {stopped[1]}'


def process_count(run_dir, places, rng):
    """Killed as two processes and continued as one, or the other way round."""
    together, when = rng.random() < 0.5, rng.randrange(EVERY + 2, STEPS)
    config = make_config(run_dir, places.corpus, distributed=True, **PAIR)
    die = at_batch(when, suicide)
    trainers = two(config, (die, die)) if together else [
        Trainer(dataclasses.replace(config, distributed=False), die, devices=2)
    ]  # fmt: skip
    codes = [trainer.wait()[0] for trainer in trainers]
    if -9 not in codes:
        raise Lost(f'exit codes {codes}')
    finish_pair(config, places, not together)
    return f'{"two, then one" if together else "one, then two"}, killed at step {when}'


def lost_process(run_dir, places, rng):
    config = make_config(run_dir, places.corpus, distributed=True, **PAIR)
    dead, when = rng.randrange(2), rng.randrange(2, STEPS)
    prepares = [at_batch(when, suicide) if i == dead else lambda: None for i in range(2)]
    trainers = two(config, prepares)
    codes = [trainer.wait()[0] for trainer in trainers]
    if codes[dead] != -9 or codes[1 - dead] == 0:
        raise Lost(f'process {dead} was to die and the other to notice: exit codes {codes}')
    finish_pair(config, places, together := rng.random() < 0.5)
    return f'process {dead} at step {when}, then {"both again" if together else "one with both devices"}'


FAULTS = {  # name -> (share, fault)
    'kill at any time': (16, kill_any_time),
    'kill at a file operation': (16, kill_at_file_operation),
    'kill inside a checkpoint': (16, kill_in_checkpoint),
    'SIGTERM': (6, sigterm),
    **{f'checkpoint file: {kind}': (4 if kind == 'link' else 5, damaged(kind)) for kind in DAMAGE},
    'full disk': (6, full_disk),
    'NaN in a layer': (6, nan_in_layer(1)),
    'malformed data': (3, malformed_data),
    'changed data': (2, changed_data),
    'other settings': (2, other_config),
    'other layout': (1, other_layout),
    'lost process of two': (2, lost_process),
    'SIGTERM to one of two': (2, sigterm_of_two),
    'NaN in a layer of two': (2, nan_in_layer(2)),
    'other number of processes': (2, process_count),
}


def prepare_places(root: pathlib.Path) -> Places:
    places = Places(root)
    rng = random.Random(0)
    words = ['def', 'return', 'x', 'y', '+', '(', ')', ':', '\n    ']
    documents = [' '.join(rng.choices(words, k=rng.randrange(2, 30))) for _ in range(60)]
    places.corpus.write_text(''.join(json.dumps({'text': d}) + '\n' for d in documents))
    expect(Trainer(make_config(root / 'first', places.corpus)).wait(), 0)  # fills the compilation cache
    began, counter = time.monotonic(), root / 'operations'

    def count():
        found = 0

        def hook(event, args):
            nonlocal found
            if event in ('open', 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir') and str(places.whole) in str(args[0]):
                found += 1
                if str(args[0]).endswith('loss.png'):
                    os.write(descriptor, f'{found}\n'.encode())

        descriptor = os.open(counter, os.O_WRONLY | os.O_CREAT)
        sys.addaudithook(hook)

    expect(Trainer(make_config(places.whole, places.corpus), count).wait(), 0)
    (root / 'seconds').write_text(str(time.monotonic() - began))
    counter.write_text(counter.read_text().split()[0])
    expect_same(root / 'first', places.whole)
    ended = Trainer(make_config(places.half, places.corpus), at_batch(3 * EVERY + 2, suicide)).wait()
    assert ended[0] == -9 and len(sealed(places.half)) >= 2, ended
    return places


def prepare_pair(places: Places) -> None:
    expect(Trainer(make_config(places.pair, places.corpus, **PAIR), devices=2).wait(), 0)


def attempt(job):
    """One fault: (kind, what happened, None or what was lost, seconds)."""
    number, kind, seed, root, deadline = job
    if time.monotonic() > deadline:
        return kind, '', 'skipped', 0.0
    began, run_dir = time.monotonic(), pathlib.Path(root, f'fault_{number}')
    try:
        told, lost = FAULTS[kind][1](run_dir, Places(pathlib.Path(root)), random.Random(seed)), None
    except Exception as error:
        told, lost = '', f'{type(error).__name__}: {error}' + ('' if isinstance(error, Lost) else traceback.format_exc())
    if lost is None:
        for path in run_dir.parent.glob(f'{run_dir.name}*'):
            if path.name in (run_dir.name, f'{run_dir.name}.data', f'{run_dir.name}.jsonl'):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return kind, told, lost, time.monotonic() - began


def plan(faults: int, kinds: list[str], rng: random.Random) -> list[str]:
    """`faults` kinds by their shares, each at least once where there is room, in random order."""
    shares = {kind: FAULTS[kind][0] for kind in kinds}
    chosen = kinds[:] if faults >= len(kinds) else []
    while len(chosen) < faults:
        counts = collections.Counter(chosen)
        chosen.append(max(kinds, key=lambda k: (shares[k] / (counts[k] + 1), rng.random())))
    rng.shuffle(chosen)
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--faults', type=int, default=100)
    parser.add_argument('--seconds', type=float, default=900, help='no fault begins after so long')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--workers', type=int, default=2, help='faults at a time')
    parser.add_argument('--kinds', nargs='*', default=list(FAULTS), choices=list(FAULTS), metavar='KIND')
    given = parser.parse_args()
    rng, began = random.Random(given.seed), time.monotonic()
    root = pathlib.Path(tempfile.mkdtemp(prefix='chaos_'))
    places, kinds = prepare_places(root), plan(given.faults, given.kinds, rng)
    if any('of two' in kind or 'processes' in kind for kind in kinds):
        prepare_pair(places)
    jobs = [(n, kind, rng.random(), str(root), began + given.seconds) for n, kind in enumerate(kinds)]
    table = {kind: [0, 0, 0.0] for kind in FAULTS if kind in kinds}
    skipped, losses = 0, []
    with multiprocessing.get_context('fork').Pool(given.workers) as pool:
        for number, (kind, told, lost, seconds) in enumerate(pool.imap_unordered(attempt, jobs)):
            if lost == 'skipped':
                skipped += 1
                continue
            row = table[kind]
            row[0], row[1], row[2] = row[0] + 1, row[1] + (lost is None), row[2] + seconds
            losses += [(kind, lost)] if lost else []
            print(f'{number + 1:4}  {"LOST" if lost else "ok  "}  {seconds:5.1f} s  {kind}: {told or lost}', flush=True)
    print(f'\n{"fault":<32}{"tried":>6}{"survived":>10}{"seconds each":>14}')
    for kind, (tried, survived, seconds) in table.items():
        if tried:
            print(f'{kind:<32}{tried:>6}{survived:>10}{seconds / tried:>14.1f}')
    tried, survived = (sum(row[i] for row in table.values()) for i in (0, 1))
    print(f'{"all":<32}{tried:>6}{survived:>10}{time.monotonic() - began:>12.0f} s in all')
    if skipped:
        print(f'{skipped} faults were not tried: --seconds {given.seconds:g} were over')
    if losses:
        print(f'their folders are kept in {root}')
        return 1
    shutil.rmtree(root)
    return 0 if survived else 1


if __name__ == '__main__':
    sys.exit(main())
