"""A trained model with other mechanisms: `convert(model, config, target)`, layer by layer.

    target = dataclasses.replace(config, pattern=('latent',), mixers={'latent': {'kind': 'mla', 'kv_rank': 64, …}})
    student = convert(model, config, target)

What a layer keeps is copied. Where its mechanism changes, a function of `CONVERSIONS` makes the new parameters of the old:

    mha, gqa -> gqa      fewer key/value heads, each the mean of those it stands for (arXiv 2305.13245)
    mha, gqa -> moh      the same heads; routers begin at zero, so that all routed heads weigh the same (2410.11842)
    mha, gqa -> mla      latents by SVD (X-EcoMLA, 2503.11132); train on with the source as teacher
    mha, gqa -> cla      keys and values of layers that read another's are dropped (2405.12981)
    mha, gqa -> echo     queries and keys of layers that copy another's weights are dropped (2409.14595)
    any      -> skip     no token mixing (attention-layer drop, 2406.15786)

All are pure functions of flat dicts of arrays, and usable alone.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnx.models import ModelConfig, Transformer, build
from attnx.models.config import Layer, units
from attnx.nn import from_flat, to_flat

Flat = dict[str, jax.Array]


def convert(model: Transformer, config: ModelConfig, target: ModelConfig) -> Transformer:
    """The model of `target` with the parameters of `model`, which is of `config`.

    Raises:
      ValueError: a layer whose mechanism can not be made of the old one's; other parts of the models that differ.
    """
    rest, layers = by_layer(config, to_flat(model))
    old, new = config.layers(), target.layers()
    if len(old) != len(new) or config.width != target.width:
        raise ValueError(
            f'a conversion keeps width and number of layers: {config.width} and {len(old)}, target has '
            f'{target.width} and {len(new)}'
        )
    abstract = jax.eval_shape(lambda: build(target, rngs=nnx.Rngs(0)))
    found = [_layer(i, *pair, part, config.width) for i, (*pair, part) in enumerate(zip(old, new, layers))]
    return from_flat(abstract, from_layers(target, rest, found))


def _layer(index: int, old: Layer, new: Layer, parameters: Flat, width: int) -> Flat:
    mixer = {k.removeprefix('mixer/'): v for k, v in parameters.items() if k.startswith('mixer/')}
    kinds = kind(old), kind(new)
    if old.spec.module is not new.spec.module or old.config != new.config:
        function = CONVERSIONS.get(kinds) or CONVERSIONS.get(('any', kinds[1]))
        if function is None:
            known = sorted(f'{a} -> {b}' for a, b in CONVERSIONS)
            raise ValueError(f'layer {index}: {kinds[0]} can not become {kinds[1]}; there is: {", ".join(known)}')
        try:
            mixer = function(mixer, old.config, new.config, width)
        except ValueError as error:
            raise ValueError(f'layer {index}: {kinds[0]} -> {kinds[1]}: {error}') from None
    others = {k: v for k, v in parameters.items() if not k.startswith('mixer/')}
    return {**others, **{f'mixer/{k}': v for k, v in mixer.items()}}


def kind(layer: Layer) -> str:
    """The name of a layer's mechanism."""
    return layer.spec.module.__module__.rsplit('.', 1)[-1]


def by_layer(config: ModelConfig, flat: Mapping[str, jax.Array]) -> tuple[Flat, list[Flat]]:
    """(parameters outside of the layers, those of each layer of the body: {'mixer/query/kernel': …})."""
    rest, layers, first = dict(flat), [{} for _ in range(config.num_layers)], 0
    for number, (unit, repeats) in enumerate(units(config.layers(), len(config.pattern))):
        for name in [n for n in rest if n.startswith(f'body/stacks/{number}/layers/')]:
            place, inner = name.split('/layers/', 1)[1].split('/', 1)
            stacked = rest.pop(name)
            for repeat in range(repeats):
                layers[first + repeat * len(unit) + int(place)][inner] = stacked[repeat]
        first += repeats * len(unit)
    return rest, layers


def from_layers(config: ModelConfig, rest: Mapping[str, jax.Array], layers: list[Flat]) -> Flat:
    """The inverse of `by_layer`."""
    flat, first = dict(rest), 0
    for number, (unit, repeats) in enumerate(units(config.layers(), len(config.pattern))):
        for place in range(len(unit)):
            same = layers[first + place : first + repeats * len(unit) : len(unit)]
            for inner in same[0]:
                flat[f'body/stacks/{number}/layers/{place}/{inner}'] = jnp.stack([layer[inner] for layer in same])
        first += repeats * len(unit)
    return flat


# Conversions of one layer: (parameters of the mixer, its config, the new config, model width) -> new parameters.


def heads(config: Any) -> tuple[int, int]:
    """(query heads, key/value heads) of mha, gqa and what is like them."""
    return config.num_heads, getattr(config, 'num_kv_heads', 0) or config.num_heads


def mean_pool(parameters: Flat, old, new, width: int) -> Flat:
    """Key/value heads become means of neighbours: K of them -> K', which divides K."""
    (n, k), (new_n, new_k) = heads(old), heads(new)
    h, new_h = old.head_dim or width // n, new.head_dim or width // new_n
    if n != new_n or h != new_h or k % new_k:
        raise ValueError(f'{n} heads over {k} of width {h} can not become {new_n} over {new_k} of width {new_h}')
    pool = lambda w: w.reshape(*w.shape[:-1], new_k, k // new_k, h).mean(axis=-2).reshape(*w.shape[:-1], new_k * h)
    pooled = 'key/kernel', 'key/bias', 'value/kernel', 'value/bias'
    return {name: pool(w) if name in pooled else w for name, w in parameters.items()}


def to_heads(parameters: Flat, old, new, width: int) -> Flat:
    """To MoH: the same heads, and routers of zeros."""
    found = mean_pool(parameters, old, new, width)
    if new.router == 'linear':
        sizes = {'router': new.num_heads - new.shared_heads}
        sizes |= {'shared_router': new.shared_heads, 'share': 2} if new.shared_heads else {}
        found |= {f'{name}/kernel': jnp.zeros((width, size)) for name, size in sizes.items()}
    return found


def without(*names: str) -> Callable[[Flat, Any, Any, int], Flat]:
    """To a mechanism whose layers have no `names` where they take them from another layer."""

    def drop(parameters, old, new, width):
        found = mean_pool(parameters, old, new, width)
        return found if new.source == 'own' else {k: v for k, v in found.items() if k not in names}

    return drop


def factor(kernel: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The best product of rank `rank`: [in, out] ~ down [in, rank] up [rank, out], singular values in `down`; float32.

    The error is the tail of the singular values: |kernel - down up|_F² = sum of their squares from `rank` on.
    """
    left, values, right = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
    missing = max(rank - values.size, 0)
    down, up = left[:, :rank] * values[:rank], right[:rank]
    return jnp.pad(down, ((0, 0), (0, missing))), jnp.pad(up, ((0, missing), (0, 0)))


def energy_rank(kernel: jax.Array, share: float, multiple: int = 8) -> int:
    """The smallest rank that keeps `share` of the sum of squared singular values, rounded up to `multiple`."""
    energy = jnp.cumsum(jnp.square(jnp.linalg.svd(kernel.astype(jnp.float32), compute_uv=False)))
    rank = int(jnp.searchsorted(energy, share * energy[-1] * (1 - 1e-6))) + 1
    return -(-rank // multiple) * multiple


def latent_factors(parameters: Flat, old, width: int, *, rope_dim: int, kv_rank: int, query_rank: int) -> Flat:
    """Parameters of MLA from those of GQA: one joint SVD of keys and values; the last `rope_dim` channels of the keys' mean
    over heads become the shared rotated key; with `query_rank` an SVD of the queries."""
    (n, k), dtype = heads(old), parameters['query/kernel'].dtype
    h = old.head_dim or width // n
    key, value = (jnp.repeat(parameters[f'{name}/kernel'].reshape(width, k, h), n // k, axis=1) for name in ('key', 'value'))
    down, up = factor(jnp.concatenate([key.reshape(width, -1), value.reshape(width, -1)], axis=1), kv_rank)
    up_key, up_value = jnp.split(up.reshape(kv_rank, 2 * n, h), 2, axis=1)
    rotated = parameters['key/kernel'].reshape(width, k, h)[:, :, h - rope_dim :].mean(axis=1)
    found = {
        'down/kernel': jnp.concatenate([down, rotated], axis=1),
        'key/kernel': up_key[:, :, : h - rope_dim].reshape(kv_rank, -1),
        'value/kernel': up_value.reshape(kv_rank, -1),
        'query/kernel': parameters['query/kernel'],
        'out/kernel': parameters['out/kernel'],
    }
    if query_rank:
        found['query_down/kernel'], found['query/kernel'] = factor(parameters['query/kernel'], query_rank)
    return {name: w.astype(dtype) for name, w in found.items()}


def to_latent(parameters: Flat, old, new, width: int) -> Flat:
    """To MLA without norms of the latents; its head_dim + rope_dim and its value_dim are the source's head width."""
    h = old.head_dim or width // old.num_heads
    head, rope, value, rank = new.sizes(width)
    if new.num_heads != old.num_heads or head + rope != h or value != h or new.latent_norm:
        raise ValueError(
            f'needs num_heads={old.num_heads}, head_dim + rope_dim = value_dim = {h} and latent_norm=False; given '
            f'{new.num_heads}, {head} + {rope}, {value}, {new.latent_norm}'
        )
    if extra := set(parameters) - {'query/kernel', 'key/kernel', 'value/kernel', 'out/kernel'}:
        raise ValueError(f'{", ".join(sorted(extra))} of the source has no place in mla')
    return latent_factors(parameters, old, width, rope_dim=rope, kv_rank=rank, query_rank=new.query_rank)


_OF_MAPS = ('core/sink', 'core/buckets', 'core/query_norm/scale', 'core/key_norm/scale')  # what only weights are made with

CONVERSIONS: dict[tuple[str, str], Callable[[Flat, Any, Any, int], Flat]] = {
    **{(old, 'gqa'): mean_pool for old in ('mha', 'gqa')},
    **{(old, 'moh'): to_heads for old in ('mha', 'gqa')},
    **{(old, 'mla'): to_latent for old in ('mha', 'gqa')},
    **{(old, 'cla'): without('key/kernel', 'value/kernel', 'core/key_norm/scale') for old in ('mha', 'gqa')},
    **{(old, 'echo'): without('query/kernel', 'key/kernel', *_OF_MAPS) for old in ('mha', 'gqa')},
    ('any', 'skip'): lambda parameters, old, new, width: {},
}


def drop_layers(model: Transformer, config: ModelConfig, layers) -> tuple[Transformer, ModelConfig]:
    """The model without the token mixers of `layers`, and its config."""
    config_overrides = {**dict(config.overrides or {}), **dict.fromkeys(layers, 'skip')}
    target = dataclasses.replace(config, overrides=config_overrides)
    return convert(model, config, target), target
