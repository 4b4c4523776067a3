"""Attention buckets: one prompt decoded under several rotary bases at once, so that what one base looks past another sees.

Every stream is the model with another base of its rotary positions and a cache of its own; a step's logits are

    sum_b w_b logits_b,   w = softmax_b(max_v logits_b[v]),

and the token drawn from them goes to all streams. Nothing is trained. The paper's bases: 10000, 17500, 18000, 19000, 20000,
25000 for the use of tools; 10000, 13000, … 28000 for reading retrieved documents.

Paper: Fortify the shortest stave in attention: enhancing context awareness of large language models for effective tool use,
2023, arXiv 2312.04455. Cost: streams times the compute and the cache; the parameters are held once.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnx.models.transformer import ModelOutput, Transformer
from attnx.nn import softmax


def with_base(model: Transformer, base: float) -> Transformer:
    """The model with rotary positions of another base, sharing its arrays.

    Raises:
      ValueError: no layer has rotary positions that a base turns.
    """
    found, changed = nnx.merge(*nnx.split(model)), 0
    for _, node in nnx.iter_graph(found):
        if isinstance(node, softmax.Core) and node.options.position == 'rope':
            rope = dataclasses.replace(node.options.rope, base=float(base))
            node.options, changed = dataclasses.replace(node.options, rope=rope), changed + 1
    if not changed:
        raise ValueError('bases: no layer of this model has rotary positions (position = rope) that a base would turn')
    return found


def mix(logits: jax.Array) -> jax.Array:
    """Logits of the streams [streams, …, V] -> [..., V]."""
    weights = jax.nn.softmax(logits.max(axis=-1, keepdims=True), axis=0)
    return (weights * logits).sum(axis=0)


class Buckets(nnx.Module):
    """The streams of a model, called as a model that decodes."""

    def __init__(self, model: Transformer, bases: Sequence[float]):
        self.streams = nnx.List([with_base(model, base) for base in bases])

    def init_state(self, batch: int, capacity: int):
        return tuple(stream.init_state(batch, capacity) for stream in self.streams)

    def __call__(self, tokens, *, state, **given) -> ModelOutput:
        outputs = [stream(tokens, state=old, **given) for stream, old in zip(self.streams, state)]
        return ModelOutput(mix(jnp.stack([out.logits for out in outputs])), tuple(out.state for out in outputs))


def wave(base: float, length: int, width: int) -> np.ndarray:
    """float64 [length]: what rotary positions alone make of a score over distances 0 …: sum_n 2 cos(d base^(-2n / width))."""
    return 2 * np.cos(np.arange(length)[:, None] * base ** (-np.arange(0, width, 2) / width)).sum(axis=1)


def coverage(bases: Sequence[float], length: int, width: int) -> float:
    """The mean over distances of the highest wave: large where each base's troughs lie under another's peaks."""
    return float(np.max([wave(base, length, width) for base in bases], axis=0).mean())


def choose(candidates: Sequence[float], count: int, *, length: int, width: int, first: float = 10_000.0) -> tuple[float, ...]:
    """`count` bases for heads of `width` channels: `first`, then one after another the candidate that covers most.

    The paper searches 10000, 10500, … 30000 greedily for peaks that meet the troughs of those chosen; `coverage` is our
    measure of that.
    """
    chosen = (float(first),)
    while len(chosen) < count:
        left = [c for c in candidates if c not in chosen]
        if not left:
            raise ValueError(f'count {count} is more than the {len(candidates)} candidates and the first base give')
        chosen += (float(max(left, key=lambda c: coverage((*chosen, c), length, width))),)
    return chosen
