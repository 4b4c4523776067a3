"""A run's newest checkpoint on other data. See `evaluate`."""

import contextlib
import dataclasses
import pathlib

from attnx import tasks
from attnx.models import ModelConfig
from attnx.train import data as data_lib
from attnx.train.config import Config
from attnx.train.loop import Run
from attnx.train.process import locked
from attnx.train.program import check_rows


def evaluate(config: Config, data: data_lib.Config) -> dict[str, float]:
    """The newest checkpoint of a run on other data: a longer length, another task of the same vocabulary.

    Raises:
      ValueError: there is no checkpoint; the data do not fit the model, or their batches the devices.
    """
    run_dir = pathlib.Path(config.run_dir).absolute()
    with locked(run_dir), contextlib.ExitStack() as stack:
        run = Run(config, run_dir, stack)
        once = dataclasses.replace(run.config.step, accumulate=1)
        check_rows(dataclasses.replace(run.config, data=data, step=once), run.mesh.shape)
        other = data_lib.open(data, **run.share)
        check_other(run.config.model, run.data.task, other.task)
        _, state = run.restore()
        if state is None:
            raise ValueError(f'{run_dir} has no checkpoint to evaluate')
        return run.evaluate(state['params'], other)


def check_other(model: ModelConfig, mine: tasks.Task, task: tasks.Task) -> None:
    """Raises ValueError if a model that was trained on `mine` can't be evaluated on `task`."""
    for name in ('vocab_size', 'features', 'num_classes'):
        if getattr(task, name) != getattr(mine, name):
            raise ValueError(
                f'{name} of {task.kind!r} is {getattr(task, name)}, the model was trained for {getattr(mine, name)}'
            )
    if task.packed and not mine.packed:
        raise ValueError(f'{task.kind!r} packs documents, the model was trained on one a row')
    if model.positions == 'learned' and task.length > model.max_length:
        raise ValueError(f'length {task.length}: positions were learned up to {model.max_length}')
