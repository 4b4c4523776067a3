"""What a trained model can do without: scores of layers and heads on calibration data, and models without them.

    scores = layer_scores(model, tokens)                                   # attention-layer drop, arXiv 2406.15786
    smaller, config = drop_layers(model, config, jnp.argsort(scores)[:4])  # attnx.interop.convert; then measure again
    smaller, config = prune_heads(model, config, tokens, share=0.3)        # AMP, arXiv 2504.21174
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attnx.interop.convert import VALUE, Flat, by_layer, drop_layers, from_layers, kind
from attnx.models import ModelConfig, Transformer, build
from attnx.nn import from_flat, positions, to_flat

__all__ = ['drop_layers', 'head_scores', 'layer_scores', 'prune_heads']


def _walk(model: Transformer, tokens, segment_ids=None, positions_=None, inputs=None):
    """Yields (index, block, the mixer's input, x, context) of every layer."""
    ctx = model.context(tokens, positions_, segment_ids, None, None, None, None, inputs)
    embedded = model.embed(tokens, positions(ctx, tokens.shape[1]))
    for index, block, x, _, here in model.body.walk(embedded, ctx):
        yield index, block, block.mixer_norm(x) if block.pre else x, x, here


def _mean(x, segment_ids):
    real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids > 0
    real = real.reshape(*x.shape[:2], *[1] * (x.ndim - 2))
    return jnp.where(real, x, 0).sum(axis=(0, 1)) / jnp.maximum(real.sum(), 1)


def layer_scores(model: Transformer, tokens, *, segment_ids=None, positions=None, inputs=None) -> jax.Array:
    """float32 [layers]: 1 - mean over tokens of cos(X, X + mixer(norm X)); the lowest change the least, drop them first."""
    found = []
    for _, block, inner, x, ctx in _walk(model, tokens, segment_ids, positions, inputs):
        x = x.astype(jnp.float32)
        y = x + block.mixer(inner, ctx).y.astype(jnp.float32)
        norm = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
        found.append(1 - _mean(jnp.sum(x * y, axis=-1) / jnp.maximum(norm, 1e-9), segment_ids))
    return jnp.stack(found)


def head_scores(model: Transformer, config: ModelConfig, tokens, *, segment_ids=None, positions=None, inputs=None):
    """A list with float32 [heads] for each layer: mean over tokens of |W_o,h o_h|_1, what each head adds to the output.

    None where a layer has no `num_heads` or no output projection of its heads.
    """
    found = []
    for index, block, inner, _, ctx in _walk(model, tokens, segment_ids, positions, inputs):
        n = getattr(config.layers()[index].config, 'num_heads', 0)
        rows = getattr(getattr(block.mixer, 'out', None), 'kernel', None)
        if not n or rows is None or rows[...].shape[0] % n:
            found.append(None)
            continue

        def alone(weight, mixer=block.mixer, inner=inner, ctx=ctx, n=n):  # the mixer with its heads so weighted
            flat = to_flat(mixer)
            flat['out/kernel'] = flat['out/kernel'] * jnp.repeat(weight, flat['out/kernel'].shape[0] // n)[:, None]
            return from_flat(mixer, flat)(inner, ctx).y.astype(jnp.float32)

        none = alone(jnp.zeros(n))  # biases
        size = jax.vmap(lambda weight, alone=alone, none=none: jnp.abs(alone(weight) - none).sum(axis=-1))(jnp.eye(n))
        found.append(_mean(jnp.moveaxis(size, 0, -1), segment_ids))
    return found


def keep_heads(parameters: Flat, config, keep: jax.Array, width: int) -> Flat:
    """Parameters of mha or gqa with the key/value heads `keep` and the query heads that read them.

    Raises:
      ValueError: slopes of ALiBi, which go by the number of heads.
    """
    k = getattr(config, 'num_kv_heads', 0) or config.num_heads
    found = dict(parameters)
    for name in ('query/kernel', 'query/bias', 'key/kernel', 'key/bias', VALUE, 'bias'):
        if name in found:
            w = found[name]
            found[name] = w.reshape(*w.shape[:-1], k, -1)[..., keep, :].reshape(*w.shape[:-1], -1)
    found['out/kernel'] = found['out/kernel'].reshape(k, -1, width)[keep].reshape(-1, width)
    if any(name == 'alibi' for name, *_ in config.scores):
        raise ValueError('alibi: slopes go by the number of heads, so other heads would get them')
    if 'core/sink' in found:
        found['core/sink'] = found['core/sink'].reshape(k, -1)[keep].reshape(-1)
    if 'core/buckets' in found:
        table = found['core/buckets']
        found['core/buckets'] = table.reshape(len(table), k, -1)[:, keep].reshape(len(table), -1)
    return found


def prune_heads(model: Transformer, config: ModelConfig, tokens, *, share: float, **context):
    """The model without the `share` of each layer's heads that score lowest (of key/value heads with all that read them).

    Layers of mha and gqa are pruned, the others kept. Train on a little afterwards.

    Returns:
      (model, its config)

    Raises:
      ValueError: a share outside [0, 1), or nothing to prune.
    """
    if not 0 <= share < 1:
        raise ValueError(f'share {share} is not in [0, 1)')
    scores, old = head_scores(model, config, tokens, **context), config.layers()
    rest, layers = by_layer(config, to_flat(model))
    mixers, pruned = dict(config.mixers), []
    for index, layer in enumerate(old):
        if kind(layer) not in ('mha', 'gqa'):
            continue
        pruned.append(index)
        given, n = layer.config, layer.config.num_heads
        k = getattr(given, 'num_kv_heads', 0) or n
        left = k - int(share * k)
        keep = jnp.sort(jnp.argsort(-scores[index].reshape(k, n // k).sum(axis=1))[:left])
        mixer = {name[6:]: v for name, v in layers[index].items() if name.startswith('mixer/')}
        new = keep_heads(mixer, given, keep, config.width)
        layers[index] = {**{m: v for m, v in layers[index].items() if not m.startswith('mixer/')},
                         **{f'mixer/{name}': v for name, v in new.items()}}  # fmt: skip
        fields = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
        fields |= {'num_heads': left * n // k, 'head_dim': given.head_dim or config.width // n}
        fields |= {'num_kv_heads': left} if kind(layer) == 'gqa' else {}
        mixers[layer.name] = {'kind': kind(layer), **fields}
    if not pruned:
        raise ValueError(f'no layer of mha or gqa to prune; there is: {", ".join(sorted({kind(layer) for layer in old}))}')
    target = dataclasses.replace(config, mixers=mixers)
    abstract = jax.eval_shape(lambda: build(target, rngs=nnx.Rngs(0)))
    return from_flat(abstract, from_layers(target, rest, layers)), target
