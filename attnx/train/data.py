"""From a task to batches: order, batching, the share of each process, prefetching, and a state to resume from.

Everything is an index computation on random-access rows, done by grain: shuffled anew each epoch, repeated, cut into
global batches of which each process reads its own consecutive rows. So the global batch does not depend on the number
of processes, and the whole state is the number of batches taken: a run resumes exactly, also on another number of
processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from attnx import tasks
from attnx.tasks.base import Task, require

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    task: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {'kind': 'text'})   # and fields of its Config
    length: int = 512               # tokens in a row; 0 is the task's own
    batch_size: int = 16            # rows in a batch, over all processes
    eval_batches: int = 0           # batches of an evaluation, the same ones each time; 0 is all
    seed: int = 0                   # of the order of rows, and of rows that are generated
    threads: int = 2                # that read rows, `prefetch` at most (grain's default of 16 is slower on few cores)
    prefetch: int = 4               # batches read ahead

    def __post_init__(self):
        for name, least in (('length', 0), ('batch_size', 1), ('eval_batches', 0), ('threads', 0), ('prefetch', 0)):
            require(getattr(self, name) >= least, f'{name} must be at least {least}, got {getattr(self, name)}')
        require(0 <= self.seed < 2**32, f'seed must lie in [0, 2**32), got {self.seed}')


class Train:
    """Endless iterator over a process's share of the training batches, each a dict of arrays with leading size
    batch_size / process_count. `step` counts the batches taken."""

    def __init__(self, dataset: grain.MapDataset, options: grain.ReadOptions, fingerprint: dict[str, Any]):
        self._iterator = iter(dataset.to_iter_dataset(options))
        self._fingerprint = fingerprint
        self.step = 0

    def __iter__(self) -> Train:
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self.step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """What to save: a JSON-able dict of the batches taken, and of everything that decides what they hold."""
        return {'step': self.step, 'fingerprint': self._fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
          ValueError: the state belongs to other data, named entry by entry.
        """
        require(isinstance(state, Mapping) and set(state) == {'step', 'fingerprint'} and isinstance(state['step'], int)
                and isinstance(state['fingerprint'], Mapping),
                f"a data state holds an integer 'step' and a 'fingerprint'; got {state!r:.200}")
        saved, now = state['fingerprint'], self._fingerprint
        differ = [f'{name}: saved {saved.get(name, "(absent)")!r}, now {now.get(name, "(absent)")!r}'
                  for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)]
        require(not differ, 'the saved data state is of other data; differing: ' + '; '.join(differ))
        self._iterator.set_state({'next_index': state['step']})
        self.step = state['step']


@dataclasses.dataclass(frozen=True)
class Data:
    """A task and its batches, as one process sees them."""

    task: Task
    train: Train
    num_eval_batches: int
    _order: grain.MapDataset
    _batch_size: int
    _evaluation: grain.MapDataset
    _options: grain.ReadOptions

    def rows(self, step: int) -> list[int]:
        """Which rows of `task.train` make the global batch `step` (0, 1, …)."""
        return [int(self._order[i]) for i in range(step * self._batch_size, (step + 1) * self._batch_size)]

    def evaluation(self) -> Iterator[Batch]:
        """The evaluation batches, from the first, in a fixed order. Where rows run out, the last batch is filled with
        rows of zeros, whose weights are 0 as well."""
        return iter(self._evaluation.to_iter_dataset(self._options))


def open(config: Config, *, task: Task | None = None, run_dir=None, process_index: int = 0, process_count: int = 1) -> Data:
    """Builds the task and its iterators.

    Args:
      config: what to read.
      task: the task of `config`, where it was built before.
      run_dir: where the task keeps what it must find again on resume.
      process_index, process_count: this process yields rows [index, index + 1) * batch_size / count of each batch.

    Raises:
      ValueError: a batch that does not divide, an unknown task or field, no data.
    """
    import grain  # a second: a config that can't be served is refused before

    require(config.batch_size % process_count == 0,
            f'data.batch_size {config.batch_size} must be a multiple of the {process_count} processes')
    require(0 <= process_index < process_count, f'process_index {process_index} is not below {process_count}')
    task = task or tasks.build(config.task, length=config.length, seed=config.seed, run_dir=run_dir)
    local = config.batch_size // process_count

    def batches(source: tasks.Source, order: grain.MapDataset, num_batches: int) -> grain.MapDataset:
        """This process's share of each batch; where `order` ends, blank rows."""
        blank = {name: np.zeros_like(value) for name, value in source[0].items()}

        def batch(step: int) -> Batch:
            first = step * config.batch_size + process_index * local
            rows = [source[order[i]] if i < len(order) else blank for i in range(first, first + local)]
            return {name: np.stack([row[name] for row in rows]) for name in blank}

        return grain.MapDataset.range(num_batches).map(batch)

    # grain orders indices, and maps whole batches: its cost for each element is as large as that of a row
    order = grain.MapDataset.range(len(task.train)).shuffle(seed=config.seed).repeat(None)
    eval_order = grain.MapDataset.range(len(task.evaluation)).shuffle(seed=0)
    num_eval = -(-len(eval_order) // config.batch_size)
    num_eval = min(num_eval, config.eval_batches or num_eval)
    options = grain.ReadOptions(num_threads=min(config.threads, config.prefetch), prefetch_buffer_size=config.prefetch)
    fingerprint = task.fingerprint | {'batch_size': config.batch_size}
    train = Train(batches(task.train, order, len(order) // config.batch_size), options, fingerprint)
    return Data(task, train, num_eval, order, config.batch_size, batches(task.evaluation, eval_order, num_eval), options)
