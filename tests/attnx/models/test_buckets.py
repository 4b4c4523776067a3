"""Attention buckets: streams of several rotary bases, decoded as one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx.models import ModelConfig, buckets, build
from tests import tolerances
from tests.laws import close

PROMPTS = [[3, 9, 27, 1, 4, 4], [30, 2]]


@pytest.fixture(scope='module')
def model():
    config = ModelConfig(vocab_size=31, width=32, num_layers=2, pattern=('gqa', 'retnet'))
    return jax.jit(lambda: build(config, rngs=nnx.Rngs(0)))()


def run(model, **given):
    return attnx.generate(model, PROMPTS, max_new_tokens=5, temperature=0, return_logits=True, **given)


@pytest.mark.slow
def test_equal_bases_are_plain_decoding(model):
    rows, logits = run(model)
    same, trail = run(model, bases=[10_000.0] * 3)
    assert same == rows
    close(trail, logits, tolerances.FLOAT32)


def test_streams_are_mixed_by_their_largest_logits(model):
    """The first token's logits are the mixture of those of models built with each base."""
    bases = [10_000.0, 100.0]
    _, trail = run(model, bases=bases)
    tokens = jnp.asarray([PROMPTS[0]])
    last = jax.jit(lambda model: model(tokens).logits[0, -1])
    alone = np.stack([last(buckets.with_base(model, base)) for base in bases])
    assert not np.allclose(*alone, atol=1e-3)
    weights = np.exp(alone.max(-1)) / np.exp(alone.max(-1)).sum()
    close(trail[0, 0], weights @ alone, tolerances.FLOAT32)


def test_every_base_covers_more():
    candidates = range(10_000, 30_001, 500)
    chosen = buckets.choose(candidates, 4, length=2048, width=32)
    covered = [buckets.coverage(chosen[:n], 2048, 32) for n in (1, 2, 3, 4)]
    assert chosen[0] == 10_000 and len(set(chosen)) == 4 and np.all(np.diff(covered) > 0)


def test_no_rotary_positions_to_turn():
    model = build(ModelConfig(vocab_size=31, width=32, num_layers=1, pattern=('retnet',)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match='no layer of this model has rotary positions'):
        run(model, bases=[10_000.0, 20_000.0])
