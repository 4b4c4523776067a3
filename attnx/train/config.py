"""The config of a whole run, composed of the configs of its parts, and what a task adds to it."""

import dataclasses
import fnmatch
import pathlib
from collections.abc import Mapping
from typing import Any

from attnx import config as config_lib
from attnx import models, sharding, tasks
from attnx.models.generate import Sampling
from attnx.train import checkpoint as checkpoint_lib
from attnx.train import data as data_lib
from attnx.train import metrics
from attnx.train import optim as optim_lib
from attnx.train import step as step_lib

# Settings that may change between one command and the next of the same run: they do not change what was learnt so far.
FREE = (
    'run_dir', 'steps', 'eval_every', 'checkpoint.*', 'log.*', 'sample.*', 'profile.*', 'mesh*', 'sharding', 'context',
    'distributed', 'compiler*', 'data.threads', 'data.prefetch', 'data.eval_batches', 'step.non_finite', 'step.max_non_finite',
    'health.*', 'model.remat', 'model.unroll', 'model.impl',
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """The text drawn from the model at the end of a run."""

    tokens: int = 250  # length of each; 0: no sample
    count: int = 1  # how many
    prompt: str = ''  # what it continues; '': the beginning of a document
    temperature: float = 0.8  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 0.95  # 1: all
    bases: tuple = ()  # rotary bases of as many streams decoded as one (attention buckets: 2312.04455)

    def __post_init__(self):
        if self.tokens < 0 or self.count < 0:
            raise ValueError(f'sample: tokens {self.tokens} and count {self.count} must be >= 0')
        Sampling(self.temperature, self.top_k, self.top_p).validate()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """A window of steps that the profiler records, into run_dir/profile."""

    start: int = 0  # first step; 0: no profile
    steps: int = 5  # how many

    def __post_init__(self):
        if self.start < 0 or self.steps < 1:
            raise ValueError(f'profile: start {self.start} must be >= 0 and steps {self.steps} >= 1')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Health:
    """What layers and heads do, measured on evaluation rows and written as lines of split 'health'."""

    every: int = 0  # steps between measurements; 0: none
    rows: int = 1  # rows of the first evaluation batch that are looked at

    def __post_init__(self):
        if self.every < 0 or self.rows < 1:
            raise ValueError(f'health: every {self.every} must be >= 0 and rows {self.rows} >= 1')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run_dir: str = 'runs/base'  # all that the run writes
    seed: int = 0  # of parameters and dropout; the data have their own
    steps: int = 1000  # updates
    eval_every: int = 100  # steps between evaluations; there is one at the beginning and one at the end; 0: these only
    model: models.ModelConfig = dataclasses.field(default_factory=models.ModelConfig)
    data: data_lib.Config = dataclasses.field(default_factory=data_lib.Config)
    optim: optim_lib.Config = dataclasses.field(default_factory=optim_lib.Config)
    step: step_lib.Config = dataclasses.field(default_factory=step_lib.Config)
    checkpoint: checkpoint_lib.Config = dataclasses.field(default_factory=checkpoint_lib.Config)
    log: metrics.Config = dataclasses.field(default_factory=metrics.Config)
    sample: Sample = dataclasses.field(default_factory=Sample)
    profile: Profile = dataclasses.field(default_factory=Profile)
    health: Health = dataclasses.field(default_factory=Health)
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)  # mesh axis -> size; empty: all devices on 'data'
    sharding: str = 'ddp'  # preset of attnx.sharding: ddp, fsdp, fsdp_tp, context, fsdp_context
    context: str = 'auto'  # softmax attention over the context axis: auto, gather, ring, heads
    compiler: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # options of XLA for the training step, by name
    distributed: bool = False  # several hosts: jax.distributed.initialize() first
    tune: bool = False  # time the tiles of softmax attention's Hopper kernel first; run_dir/tiles.json keeps the choice

    def __post_init__(self):
        if self.steps < 1 or self.eval_every < 0:
            raise ValueError(f'steps {self.steps} must be >= 1 and eval_every {self.eval_every} >= 0')
        if not 0 <= self.seed < 2**32:
            raise ValueError(f'seed {self.seed} must lie in [0, 2**32)')
        if self.profile.start >= self.steps:
            raise ValueError(f'profile.start {self.profile.start} must lie before the last of {self.steps} steps')
        if self.health.rows > self.data.batch_size:
            raise ValueError(f'health.rows {self.health.rows} are more than data.batch_size {self.data.batch_size}')
        if not self.run_dir:
            raise ValueError('run_dir is empty; give a folder')
        # A placeholder left None is as if it were absent: a change of `kind` then leaves no foreign field behind.
        task = _present(self.data.task)
        mixers = {name: _present(mixer) for name, mixer in self.model.mixers.items()}
        object.__setattr__(self, 'data', dataclasses.replace(self.data, task=task))
        object.__setattr__(self, 'model', dataclasses.replace(self.model, mixers=mixers))


def build(given) -> Config:
    """The config of a mapping, or a ValueError; see `attnx.config.build`."""
    return config_lib.build(Config, given)


def resolved(path: str) -> Config:
    """The config that a run has written as JSON; nothing is executed.

    Raises:
      ValueError: it can't be read, or is refused.
    """
    try:
        return config_lib.from_json(Config, pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f'{path}: {error}') from None


def check(config: Config, build=None) -> None:
    """Raises ValueError for what shows before any data are read. build: see `ModelConfig.check`."""
    sharding.check(config.mesh, config.sharding, config.context)
    sharding.check_effect(config.mesh, config.sharding, config.context)
    metrics.check(config.log)
    optim_lib.schedule(config.optim, config.steps)
    config.model.layers()
    config.model.check(config.data.length, build)


def check_batched(config: Config) -> None:
    """Raises ValueError for what `attnx.train.together.run_together` would leave out."""
    alone = {
        'health.every': config.health.every,
        'profile.start': config.profile.start,
        'tune': config.tune,
        'compiler': dict(config.compiler),
        'distributed': config.distributed,
        'step.distill': config.step.distill,
        'step.non_finite': config.step.non_finite == 'rewind' and 'rewind',
    }
    if found := [f'{name}={value!r}' for name, value in alone.items() if value]:
        raise ValueError(f'{", ".join(found)}: runs that are batched have none of these; leave it out, or train them apart')


def _present(given):
    given = config_lib.as_dict(given, 'config') if isinstance(given, Mapping) or hasattr(given, 'to_dict') else given
    return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


def free(name: str) -> bool:
    """Whether a setting may change on resume."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in FREE)


def completed(model: models.ModelConfig, task) -> models.ModelConfig:
    """The model's config with what the task decides filled in.

    Raises:
      ValueError: the model was given other sizes than the task has.
    """
    known = {'vocab_size': task.vocab_size, 'input_dim': task.features, 'num_classes': task.num_classes}
    for name, value in known.items():
        if getattr(model, name) not in (0, value) and not (name == 'vocab_size' and model.vocab_size > value > 0):
            raise ValueError(f'config.model.{name} is {getattr(model, name)}; the task {task.kind!r} has {value}')
    if 0 < model.max_length < task.length:
        raise ValueError(f'config.model.max_length is {model.max_length}; rows of the data are longer: {task.length}')
    known['vocab_size'] = model.vocab_size or task.vocab_size
    return dataclasses.replace(model, **known, max_length=model.max_length or task.length)


def served(config: Config, task) -> Config:
    """The config with what the task decides filled in.

    Raises:
      ValueError: the model was given other sizes, can't keep the task's packed documents apart, or lacks a side input.
    """
    model = completed(config.model, task)
    if task.packed:
        model.check_packing(task.documents)
    names = {*task.train[0]}
    model.check_inputs(names - {*tasks.FIELDS})
    if ('source' in names) != (model.kind == 'encoder_decoder'):
        has = 'has a source for an encoder' if 'source' in names else 'has no source for an encoder'
        raise ValueError(f'task {task.kind!r} {has}, and config.model.kind is {model.kind!r}; only encoder_decoder reads one')
    return dataclasses.replace(config, model=model)
