"""Runs that are broken on purpose, and what they must come to: trainers in processes of their own, and comparisons.

Trainers are forked from a process that has imported everything, so a start costs no imports.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
import signal
import socket
import sys
import tempfile
import time
import traceback

import jax
import matplotlib.pyplot  # noqa: F401  before the fork, as all imports
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from attnx import config as config_lib
from attnx.train import checkpoint, data, loop, metrics

STEPS, EVERY = 12, 3  # of a run; between its checkpoints
LIMIT = 300  # seconds for one trainer
STATE = 'state.digest'  # what a finished trainer leaves: a digest of all its arrays
PAIR = {'sharding': 'fsdp', 'mesh': {'data': 1, 'fsdp': 2}}  # each device holds half of everything


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
        config_lib.put(given, name, value)
    return config_lib.build(loop.Config, given)


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


def sealed(run_dir) -> list[int]:
    return [int(seal.parent.name) for seal in pathlib.Path(run_dir, 'checkpoints').glob(f'*/{checkpoint.SEAL}')]


# In a trainer


def suicide() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


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


# Two processes


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


def finish_pair(config, places, together: bool) -> None:
    """Continues on two devices, of two processes or of one."""
    if together:
        for trainer in two(config):
            expect(trainer.wait(), 0)
    else:
        expect(Trainer(dataclasses.replace(config, distributed=False), devices=2).wait(), 0, 'complete')
    expect_same(config.run_dir, places.pair)
