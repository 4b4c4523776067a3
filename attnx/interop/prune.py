"""What a trained model can do without: scores of layers and heads on calibration data, and models without them.

    scores = layer_scores(model, tokens)                                   # attention-layer drop, arXiv 2406.15786
    smaller, config = drop_layers(model, config, jnp.argsort(scores)[:4])  # attnx.interop.convert; then measure again
    smaller, config = prune(model, config, tokens, heads=0.3, neurons=0.3) # AMP, arXiv 2504.21174
    who = copying(map_similarity(model, tokens), least=0.8)                # EchoAtt, arXiv 2409.14595: pattern of `echo` layers
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attnx import dispatch
from attnx.interop.convert import Flat, by_layer, drop_layers, from_layers, kind
from attnx.models import ModelConfig, Transformer, build
from attnx.nn import from_flat, positions, to_flat
from attnx.ops import normalizers
from attnx.ops.weighted_attention import evaluate, index_of, products

__all__ = ['copying', 'drop_layers', 'head_scores', 'layer_scores', 'map_similarity', 'neuron_scores', 'prune']


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


def neuron_scores(model: Transformer, tokens, *, segment_ids=None, positions=None, inputs=None):
    """A list with float32 [hidden] for each layer: mean over tokens of |what the MLP's `down` reads|; None: no such MLP."""
    found = []
    for _, block, inner, x, ctx in _walk(model, tokens, segment_ids, positions, inputs):
        if block.mlp is None or block.mlp.down is None:
            found.append(None)
            continue
        x = x + block.mixer(inner, ctx).y.astype(x.dtype)
        hidden = block.mlp.hidden(block.mlp_norm(x) if block.pre else block.mixer_norm(x))
        found.append(_mean(jnp.abs(hidden.astype(jnp.float32)), segment_ids))
    return found


def map_similarity(model: Transformer, tokens, *, segment_ids=None, positions=None, inputs=None) -> jax.Array:
    """float32 [layers, layers]: cosine of two layers' attention maps, head by head, the mean over heads and rows of the batch.

    NaN where a layer has no softmax map of its own, or two differ in heads. Holds the maps of all layers: calibrate on little.
    """
    maps = []
    for _, block, inner, _, ctx in _walk(model, tokens, segment_ids, positions, inputs):
        with dispatch.observe() as seen:
            block.mixer(inner, ctx)
        calls = [call.inputs for call in seen if call.op == 'softmax_attention']
        maps.append(_map(**calls[0]) if len(calls) == 1 else None)

    def cosine(a, b):
        if a is None or b is None or a.shape != b.shape:
            return jnp.nan
        dot = lambda x, y: jnp.sum(x * y, axis=(2, 3))
        return jnp.mean(dot(a, b) / jnp.sqrt(jnp.maximum(dot(a, a) * dot(b, b), 1e-18)))

    return jnp.array([[cosine(a, b) for b in maps] for a in maps], jnp.float32)


def _map(query, key, mask=None, score=None, scale=None, sinks=None, **_):
    """Softmax weights [B, N, T, S] of an op's operands."""
    (batch, length, n, _), size = query.shape, key.shape[1]
    i = index_of(batch, length, length, size, n)
    seen = evaluate(mask, i)
    s = evaluate(score, i, jnp.where(seen, products(query, key, scale), 0))
    weights = normalizers.softmax if sinks is None else normalizers.sinks(sinks)
    return weights(jnp.where(seen, s, 0), seen, i)


def copying(similarity, *, least: float, ends: int = 2) -> tuple[str, ...]:
    """Which layers may reuse an earlier one's attention map: 'own' or 'copy' for each, a pattern for mixers of kind `echo`.

    A layer copies from the last one that does not, where their similarity is `least` or more; the first and last `ends` never
    do. The rule is ours: the paper says that inner layers are alike, not which it shares.
    """
    pattern, source = [], 0
    for layer in range(len(similarity)):
        inner = ends <= layer < len(similarity) - ends
        copies = inner and source >= ends and similarity[source][layer] >= least
        source = source if copies else layer
        pattern.append('copy' if copies else 'own')
    return tuple(pattern)


def keep_heads(parameters: Flat, config, keep: jax.Array, width: int) -> Flat:
    """Parameters of mha or gqa with the key/value heads `keep` and the query heads that read them.

    Raises:
      ValueError: slopes of ALiBi, which go by the number of heads.
    """
    k = getattr(config, 'num_kv_heads', 0) or config.num_heads
    found = dict(parameters)
    for name in ('query/kernel', 'query/bias', 'key/kernel', 'key/bias', 'value/kernel', 'value/bias'):
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


def prune(model: Transformer, config: ModelConfig, tokens, *, heads: float = 0.0, neurons: float = 0.0, **context):
    """The model without those heads and MLP neurons of each layer that score lowest. Train on a little afterwards.

    Args:
      tokens: int [B, T], calibration data; context: segment_ids, positions, inputs that go with them.
      heads: share of each layer's heads that goes, of key/value heads with all that read them; layers of mha and gqa.
      neurons: share of each MLP's hidden units that goes.

    Returns:
      (model, its config)

    Raises:
      ValueError: a share outside [0, 1), or nothing to prune.
    """
    for name, share in (('heads', heads), ('neurons', neurons)):
        if not 0 <= share < 1:
            raise ValueError(f'{name} {share} is not in [0, 1)')
    old, (rest, layers) = config.layers(), by_layer(config, to_flat(model))
    mixers, mlp = dict(config.mixers), config.mlp
    if heads and not any(kind(layer) in ('mha', 'gqa') for layer in old):
        raise ValueError(f'no layer of mha or gqa to prune; there is: {", ".join(sorted({kind(layer) for layer in old}))}')
    if heads:
        for index, scores in enumerate(head_scores(model, config, tokens, **context)):
            layer = old[index]
            if kind(layer) not in ('mha', 'gqa'):
                continue
            given, n = layer.config, layer.config.num_heads
            k = getattr(given, 'num_kv_heads', 0) or n
            left = k - int(heads * k)
            keep = jnp.sort(jnp.argsort(-scores.reshape(k, n // k).sum(axis=1))[:left])
            _change(layers[index], 'mixer/', lambda m, given=given, keep=keep: keep_heads(m, given, keep, config.width))
            fields = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
            fields |= {'num_heads': left * n // k, 'head_dim': given.head_dim or config.width // n}
            fields |= {'num_kv_heads': left} if kind(layer) == 'gqa' else {}
            mixers[layer.name] = {'kind': kind(layer), **fields}
    if neurons:
        for index, scores in enumerate(neuron_scores(model, tokens, **context)):
            if scores is None:
                raise ValueError(f'mlp of kind {config.mlp.kind!r} has no hidden units of its own to prune')
            keep = jnp.sort(jnp.argsort(-scores)[: scores.size - int(neurons * scores.size)])
            _change(layers[index], 'mlp/', lambda m, keep=keep: {
                name: v[keep] if name == 'down/kernel' else v if name == 'down/bias' else v[..., keep] for name, v in m.items()
            })  # fmt: skip
            mlp = dataclasses.replace(config.mlp, hidden=int(keep.size))
    target = dataclasses.replace(config, mixers=mixers, mlp=mlp)
    abstract = jax.eval_shape(lambda: build(target, rngs=nnx.Rngs(0)))
    return from_flat(abstract, from_layers(target, rest, layers)), target


def _change(layer: Flat, prefix: str, function) -> None:
    """Replaces the parameters below `prefix` in place."""
    part = {name.removeprefix(prefix): layer.pop(name) for name in [n for n in layer if n.startswith(prefix)]}
    layer.update({prefix + name: v for name, v in function(part).items()})
