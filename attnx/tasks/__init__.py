"""Tasks: what a model is trained on. One file is one task, found by its file name; nothing else to edit.

A task file holds a frozen `Config` and `build(config, *, length, seed, run_dir) -> Task`. A `Task` (base.py) is two
random-access sources of rows, so that order, batches, processes and resuming are solved once, in attnx/train/data.py.
`ELSEWHERE` are its splits out of distribution: name -> what differs from the config that was trained on, '×2' being twice.
Nothing here imports jax.
"""

import dataclasses
import functools
import importlib
import json
import pathlib
from collections.abc import Mapping

from attnx.tasks.base import FIELDS, Source, Task, expected

__all__ = ['FIELDS', 'Source', 'Task', 'build', 'check', 'config', 'elsewhere', 'names', 'outline']

_SHARED = {'__init__', 'base', 'documents', 'knowledge'}
_PLACES = {'path', 'validation_path'}       # data may move; what it is stands in the task's own fingerprint


@functools.cache
def names() -> tuple[str, ...]:
    """Names of all tasks, sorted."""
    files = pathlib.Path(__file__).parent.glob('*.py')
    return tuple(sorted(f.stem for f in files if f.stem not in _SHARED))


def _module(kind: str):
    if kind not in names():
        raise ValueError(expected('task', kind, names()))
    return importlib.import_module(f'attnx.tasks.{kind}')


def config(kind: str, **fields):
    """The `Config` of task `kind`, with `fields` set; a field given as None keeps its default.

    Raises:
      ValueError: an unknown task or field (the nearest valid one is named), or a value of another type.
    """
    from attnx.config import build

    return build(_module(kind).Config, {k: v for k, v in fields.items() if v is not None}, f'task[{kind!r}]')


def check(given: Mapping) -> None:
    """Raises ValueError for what shows before any data are read: an unknown task or field, files that are not there."""
    chosen = config(**given)
    getattr(_module(given['kind']), 'check', lambda config: None)(chosen)


def build(config, *, length: int = 0, seed: int = 0, run_dir=None) -> Task:
    """The task that `config` describes.

    Args:
      config: a task's `Config`, or a mapping `{'kind': 'text', **fields}`.
      length: tokens in a row (T); 0 takes the task's own default.
      seed: of everything random in the rows (not of their order, which is the loader's).
      run_dir: folder in which a task keeps what it must find again on resume (a trained tokenizer); None: nowhere.
    """
    config = _resolved(config)
    if length < 0:
        raise ValueError(f'length must be positive, or 0 for the task\'s own; got {length}')
    module = importlib.import_module(type(config).__module__)
    task = module.build(config, length=length, seed=seed, run_dir=run_dir)
    asked = {'kind': task.kind, 'length': task.length, 'seed': seed}
    asked |= {f'{task.kind}.{k}': v for k, v in dataclasses.asdict(config).items() if k not in _PLACES}
    return dataclasses.replace(task, fingerprint=json.loads(json.dumps(asked | task.fingerprint)))


def outline(config, *, length: int = 0, seed: int = 0) -> Task:
    """What `build` makes, with blank rows in place of those of files that are not here: enough to plan a run by."""
    config = _resolved(config)
    module = importlib.import_module(type(config).__module__)
    return module.outline(config, length=length) if hasattr(module, 'outline') else build(config, length=length, seed=seed)


def elsewhere(given: Mapping, length: int) -> dict[str, tuple[dict, int]]:
    """The splits out of distribution of the task `{'kind': …, **fields}` at `length`: name -> (task, length)."""
    module, found = _module(given['kind']), {}
    known = {**dataclasses.asdict(config(**given)), 'length': length}
    for name, change in getattr(module, 'ELSEWHERE', {}).items():
        put = {k: known[k] * int(v[1:]) if isinstance(v, str) else v for k, v in change.items()}
        longer = put.pop('length', length)
        found[name] = ({**given, **put}, longer)
    return found


def _resolved(config):
    """A task's `Config`, of a mapping that names it."""
    if isinstance(config, Mapping):
        fields = dict(config)
        if 'kind' not in fields:
            raise ValueError(f"a task needs a 'kind', one of {', '.join(names())}; got {fields!r}")
        config = globals()['config'](fields.pop('kind'), **fields)
    return config
