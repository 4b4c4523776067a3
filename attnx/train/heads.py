"""HeadMask: updates without some heads, chosen anew each time over the whole model (arXiv 2009.09672).

A head's output is masked through its rows of the output projection, o_h (xi_h W_o,h) = (xi_h o_h) W_o,h, so that every
mechanism with such a projection can be trained so, and a masked head gets no gradient at all.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnx.models import ModelConfig
from attnx.models.config import units

Keep = dict[str, jax.Array]  # name of an output projection -> float32 [repeats, heads]: 1 or 0


def projections(config: ModelConfig, shapes: Mapping) -> dict[str, int]:
    """Name of every output projection of heads in the flat parameters -> its number of heads."""
    found = {}
    stacks = [('body', config.layers(), len(config.pattern))]
    if config.kind == 'encoder_decoder':
        stacks.append(('encoder', config.encoder_layers(), len(config.encoder.pattern)))
    for prefix, layers, period in stacks:
        for number, (unit, _) in enumerate(units(layers, period)):
            for place, layer in enumerate(unit):
                both = {'mixer': layer}
                both |= {'cross': config.mixer(config.cross)} if len(stacks) > 1 and prefix == 'body' else {}
                for part, mixer in both.items():
                    name = f'{prefix}/stacks/{number}/layers/{place}/{part}/out/kernel'
                    heads = getattr(mixer.config, 'num_heads', 0)
                    if heads and name in shapes and len(shapes[name].shape) == 3 and shapes[name].shape[1] % heads == 0:
                        found[name] = heads
    return found


def importance(params: Mapping, grads: Mapping, heads: Mapping[str, int]) -> Keep:
    """|dL / dxi| of every head at xi = 1: |<W_o,h, dL/dW_o,h>|, float32 [repeats, heads] a projection."""

    def one(name, count):
        product = params[name].astype(jnp.float32) * grads[name].astype(jnp.float32)
        return jnp.abs(product.reshape(product.shape[0], count, -1).sum(axis=2))

    return {name: one(name, count) for name, count in heads.items()}


def noise(params: Mapping, heads: Mapping[str, int], key: jax.Array) -> Keep:
    """Uniform numbers in place of importance."""
    keys = jax.random.split(key, len(heads))
    return {name: jax.random.uniform(k, (params[name].shape[0], n)) for k, (name, n) in zip(keys, heads.items())}


def drop_largest(scores: Keep, count: int) -> Keep:
    """0 for the `count` heads of largest score in the whole model, 1 for the others."""
    flat = jnp.concatenate([v.reshape(-1) for v in scores.values()])
    keep = jnp.ones(flat.size).at[jax.lax.top_k(flat, count)[1]].set(0.0)
    ends = np.cumsum([v.size for v in scores.values()])[:-1]
    return {name: part.reshape(v.shape) for (name, v), part in zip(scores.items(), jnp.split(keep, ends))}


def masked(tree: Mapping, keep: Keep) -> dict:
    """Parameters, or their gradients, with the rows of masked heads at 0."""

    def one(name, value):
        if name not in keep:
            return value
        repeats, count = keep[name].shape
        rows = value.reshape(repeats, count, -1, value.shape[-1]) * keep[name][:, :, None, None].astype(value.dtype)
        return rows.reshape(value.shape)

    return {name: one(name, value) for name, value in tree.items()}
