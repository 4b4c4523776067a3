"""Trained models, out of the directories of their runs."""

import pathlib
from typing import NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

from attnx.models.transformer import Transformer
from attnx.train import seal
from attnx.train.config import Config, resolved
from attnx.train.program import program


class Trained(NamedTuple):
    """A model and where it is from."""

    model: Transformer
    config: Config  # of its run, with what the task decided filled in; config.model is the model's
    step: int  # of the checkpoint


def load(run_dir, step: int | None = None) -> Trained:
    """The model that a run has trained so far, whole on one device, for `attnx.generate` or code of your own.

    Nothing is written and no data are read; the run may be going on. Its task, with `encode` and `decode`, is
    `attnx.tasks.build(config.data.task, length=config.data.length, seed=config.seed, run_dir=run_dir)`.

    Args:
      run_dir: what the run has written; only config.json and the checkpoints are read.
      step: of which checkpoint; None: the newest.

    Raises:
      ValueError: there is no run, or no such checkpoint, or it is damaged; names those that there are.
    """
    import orbax.checkpoint as ocp  # slow: what is not there is refused before

    run_dir = pathlib.Path(run_dir)
    config = resolved(str(run_dir / 'config.json'))
    folder = seal.located(config.checkpoint.folder or run_dir / 'checkpoints')
    there = seal.steps_in(folder, sealed=True) if folder.exists() else []
    if step is None and there:
        step = there[-1]
    if step not in there:
        raise ValueError(f'{folder} has no checkpoint {"" if step is None else step}; there is: {there or "none"}')
    if problem := seal.damage(folder / str(step)):
        raise seal.CheckpointError(f'checkpoint {step} in {folder} is damaged: {problem}; there is: {there}')
    made = program(config.model, packed=False)
    place = SingleDeviceSharding(jax.devices()[0])
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in made.shapes.items()}
    item = {'params': like}
    args = ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.restore(folder / str(step) / 'state', args=args)
    return Trained(made.model(found['params']), config, step)
