"""QK-clip: after an update, heads whose attention logits grew too large get smaller queries and keys (MuonClip, 2507.20534).

With S_h the largest logit of head h over the batch of the update, after it, and a limit c:

    gamma_h = min(1, c / S_h)      eta_k = min over its heads sqrt(gamma_h)      W_q,h *= gamma_h / eta_k      W_k,k *= eta_k

so that products of queries and keys shrink by gamma_h; with a key head of its own each side takes sqrt(gamma_h), as in the
paper. S comes from the op's own pass (`return_stats`), which has it for nothing. Departures: one more forward pass after
the update gives S, so that the limit holds for the parameters as they are; key heads may be shared.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnx.models import ModelConfig
from attnx.models.config import units
from attnx.nn import softmax
from attnx.train import health


class Place(NamedTuple):
    """Where a layer's projections lie: `<prefix>/query/kernel` [repeats, M, N H], row `repeat`."""

    prefix: str
    repeat: int
    heads: int


def places(config: ModelConfig, shapes: Mapping) -> dict[str, Place]:
    """Name of a layer in a trace -> its place, for every layer whose logits are products of a query and a key projection."""
    found = {}
    stacks = [('', 'body', config.layers(), len(config.pattern))]
    if config.kind == 'encoder_decoder':
        stacks.append(('encoder/', 'encoder', config.encoder_layers(), len(config.encoder.pattern)))
    for lead, part, layers, period in stacks:
        index = 0
        for number, (unit, repeats) in enumerate(units(layers, period)):
            for repeat in range(repeats):
                for at, layer in enumerate(unit):
                    prefix = f'{part}/stacks/{number}/layers/{at}/mixer'
                    projected = all(f'{prefix}/{name}/kernel' in shapes for name in ('query', 'key'))
                    heads = getattr(layer.config, 'num_heads', 0)
                    normed = getattr(layer.config, 'qk_norm', True)  # whose logits do not grow with the projections
                    if projected and not normed and isinstance(layer.config, softmax.Options):
                        found[f'{lead}layer_{index}'] = Place(prefix, repeat, heads)
                    index += 1
    return found


def hook(config: ModelConfig, shapes: Mapping[str, Any], trace: Callable, limit: float) -> Callable:
    """clip(params, batch, step) -> (params, how many heads were clipped: int32).

    Raises:
      ValueError: the model has no layer that it could serve.
    """
    where = places(config, shapes)
    if not where:
        raise ValueError(
            f'step.qk_clip {limit}: no layer has logits that are products of a query and a key projection without qk_norm'
        )

    def clip(params, batch, step):
        figures = health.figures(trace(params, batch, None, step), only=('softmax_attention',), names=('max_logit',))
        largest = {name: figures.get(f'{name}/softmax_attention/max_logit') for name in where}
        factors = {}
        for name, place in where.items():
            repeats = params[f'{place.prefix}/query/kernel'].shape[0]
            rows = factors.setdefault(place.prefix, [jnp.ones(place.heads)] * repeats)
            top = largest[name]
            if top is not None and top.shape == (place.heads,):
                rows[place.repeat] = jnp.where(top > limit, limit / top, 1.0)  # NaN: left to the finite check
        found = dict(params)
        for prefix, rows in factors.items():
            scaled(found, prefix, jnp.stack(rows))
        return found, sum((jnp.stack(rows) < 1).sum(dtype=jnp.int32) for rows in factors.values())

    return clip


def scaled(params: dict, prefix: str, gamma: jax.Array) -> None:
    """Multiplies, in `params`, what makes queries and keys. gamma: float32 [repeats, N]."""
    heads = gamma.shape[1]
    width = params[f'{prefix}/query/kernel'].shape[-1] // heads
    shared = params[f'{prefix}/key/kernel'].shape[-1] // width
    eta = jnp.sqrt(gamma.reshape(-1, shared, heads // shared).min(-1))
    both = {'query': gamma / jnp.repeat(eta, heads // shared, axis=1), 'key': eta}
    for name, factor in both.items():
        for kind in ('kernel', 'bias'):
            if (value := params.get(f'{prefix}/{name}/{kind}')) is not None:
                spread = jnp.repeat(factor, width, axis=1).reshape(len(factor), *[1] * (value.ndim - 2), -1)
                params[f'{prefix}/{name}/{kind}'] = (value * spread).astype(value.dtype)
