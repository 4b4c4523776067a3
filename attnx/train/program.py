"""What a model's config compiles to: functions over the flat view of its parameters."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from attnx import models, tasks
from attnx.nn import params as params_lib


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
