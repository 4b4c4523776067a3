"""Runs of a tiny model on a tiny corpus, for the tests of `attnx.train`: their configs, and what they leave."""

import orbax.checkpoint as ocp

from attnx import config as config_lib
from attnx.train import data, loop, metrics

TEXT = 'def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n    print(add(i, i))\n'


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


def state_of(run_dir, step):
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(f'{run_dir}/checkpoints/{step}/state')


def rows_of(run_dir, split='train'):
    return [{k: v for k, v in e.items() if k not in metrics.TIMES} for e in metrics.read(run_dir) if e['split'] == split]


def at_step(monkeypatch, number, action):
    """Calls `action(batch)` in place of batch `number` (1, 2, …) of training."""
    plain = data.Train.__next__

    def patched(self):
        batch = plain(self)
        return action(batch) if self.step == number else batch

    monkeypatch.setattr(data.Train, '__next__', patched)


def crash(batch):
    raise KeyboardInterrupt
