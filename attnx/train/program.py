"""What a config compiles to: a model's functions over the flat view of its parameters, and a run's training step on a mesh."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnx import models, sharding, tasks
from attnx.nn import params as params_lib
from attnx.train import clip as clip_lib
from attnx.train import heads as heads_lib
from attnx.train import optim as optim_lib
from attnx.train import step as step_lib
from attnx.train.config import Config


class Program(NamedTuple):
    """What a config compiles to; functions over the flat parameters."""

    axes: Mapping[str, tuple]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    init: Any  # key -> parameters
    forward: Any  # (params, batch, key, step=None) -> (logits, aux)
    trace: Any  # (params, batch, key, step=None) -> yields (name, activation)
    model: Any  # params -> the module
    apply: Any  # (module, batch) -> its output, deterministic
    checked: Any  # a module of this config, or flat parameters -> flat parameters


def program(config: models.ModelConfig, *, packed: bool) -> Program:
    """The model behind `forward`; builds it abstractly only."""
    build = lambda key: models.build(config, rngs=nnx.Rngs(key))
    abstract = jax.eval_shape(build, jax.random.key(0))

    def call(model, batch, key=None, step=None, method='__call__'):
        given = {'positions': batch.get('positions'), 'segment_ids': batch.get('segment_ids') if packed else None}
        given |= {name: batch[name] for name in ('source', 'source_mask') if name in batch}
        inputs = batch['tokens'] if 'tokens' in batch else batch['inputs']
        side = {name: batch[name] for name in batch if name not in tasks.FIELDS}
        return getattr(model, method)(inputs, key=key, step=step, inputs=side, **given)

    def forward(params, batch, key, step=None):
        out = call(params_lib.from_flat(abstract, params), batch, key, step)
        return out.logits, out.aux

    def checked(given):
        flat = params_lib.to_flat(given) if isinstance(given, nnx.Module) else dict(given)
        params_lib.from_flat(abstract, flat)  # refuses other names
        for name, wanted in params_lib.to_flat(abstract).items():
            if flat[name].shape != wanted.shape:
                raise ValueError(f'initial parameter {name} has shape {flat[name].shape}, the model {wanted.shape}')
        return flat

    return Program(
        axes=params_lib.flat_axes(abstract),
        shapes=params_lib.to_flat(abstract),
        init=lambda key: params_lib.to_flat(build(key)),
        forward=forward,
        trace=lambda params, batch, key, step=None: call(params_lib.from_flat(abstract, params), batch, key, step, 'trace'),
        model=lambda params: params_lib.from_flat(abstract, params),
        apply=call,
        checked=checked,
    )


class Training(NamedTuple):
    """The training step of a run on a mesh."""

    where: Any  # NamedSharding of each leaf of the state
    init: Any  # (key, flat parameters or None: random ones) -> state
    update: Any  # jitted: (state, batch, key) -> (state, metrics); the state is donated


def training(config: Config, made: Program, mesh: jax.sharding.Mesh) -> Training:
    """What `config` trains the model `made` by on the devices of `mesh`; to be traced within `attnx.sharding.use`.

    Raises:
      ValueError: an optimizer that does not suit the model; parameters that the mesh does not divide.
    """
    transform, rate = optim_lib.build(config.optim, config.steps, made.axes)
    shapes = {name: shape.shape for name, shape in made.shapes.items()}
    where = sharding.param_shardings(mesh, config.sharding, made.axes, shapes)
    single = NamedSharding(mesh, P())
    opt = optim_lib.state_shardings(transform, made.shapes, where, mesh)
    state = {'params': where, 'opt': opt, 'step': single, 'bad': single}
    heads = heads_lib.projections(config.model, made.shapes)
    clip = clip_lib.hook(config.model, made.shapes, made.trace, config.step.qk_clip) if config.step.qk_clip else None
    update = step_lib.train_step(made.forward, transform, rate, config.step, heads, clip)
    options = dict(config.compiler) or None
    return Training(
        where=state,
        init=lambda key, given: step_lib.init_state(made.init(key) if given is None else given, transform),
        update=jax.jit(update, donate_argnums=0, out_shardings=(state, single), compiler_options=options),
    )


def placed(mesh: jax.sharding.Mesh, preset: str, ndim: int) -> NamedSharding:
    """Where an array of a batch lies: rows, tokens, features."""
    return NamedSharding(mesh, sharding.partition(('batch', 'length', 'features')[:ndim], sharding.rules(preset)))


def check_rows(config: Config, sizes: Mapping[str, int]) -> None:
    """Raises ValueError unless every device has whole rows of every micro-batch."""
    rows = sharding.parts(sizes, sharding.axes_of(sharding.rules(config.sharding), 'batch'))
    if config.data.batch_size % (rows * config.step.accumulate):
        raise ValueError(
            f'data.batch_size {config.data.batch_size} must be a multiple of {rows} (devices over which the mesh '
            f'spreads rows) times {config.step.accumulate} (step.accumulate)'
        )


def check_compiler(options: Mapping[str, Any]) -> None:
    """Raises ValueError for options that XLA does not have, or of another type, before the step is compiled."""
    for name, value in options.items():
        try:
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
        except (jax.errors.JaxRuntimeError, TypeError, ValueError) as error:
            raise ValueError(f'config.compiler: {name}={value!r}: {str(error).splitlines()[0]}') from None
