"""Sampling equals the training path, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import config as config_lib
from attnx.models import ModelConfig, build
from attnx.models.generate import Sampling, filter_logits
from tests import tolerances
from tests.laws import close

PATTERN = ('retnet', 'gqa', 'sliding_window')


@pytest.fixture(scope='module')
def model():
    config = config_lib.build(
        ModelConfig,
        {
            'vocab_size': 31,
            'width': 32,
            'num_layers': 3,
            'pattern': PATTERN,
            'conv_taps': 3,
            'mixers': {'sliding_window': {'kind': 'sliding_window', 'window': 4}},
        },
    )
    rng, fresh = np.random.default_rng(0), jax.jit(lambda: build(config, rngs=nnx.Rngs(0)))()
    return jax.tree.map(lambda v: v + 0.05 * rng.standard_normal(v.shape).astype(v.dtype), fresh)


def test_logits_equal_the_training_path(model):
    """Ragged prompts, greedy: every token's logits are those of one full pass over prompt and continuation."""
    prompts = [[5], [3, 9, 27, 1, 4, 4], [30, 2, 17]]
    rows, logits = attnx.generate(model, prompts, max_new_tokens=7, temperature=0, return_logits=True)
    forward = jax.jit(lambda m, t: m(t).logits)
    for prompt, row, trail in zip(prompts, rows, logits):
        full = np.zeros((1, 13), np.int32)
        full[0, : len(prompt) + 7] = prompt + row
        expected = np.asarray(forward(model, full))[0, len(prompt) - 1 : len(prompt) + 6]
        close(trail, expected, tolerances.FLOAT32)
        assert row == expected.argmax(-1).tolist()


def test_stop_tokens_end_a_row_alone(model):
    free = attnx.generate(model, [[1], [2]], max_new_tokens=6, temperature=0)
    stop = free[0][2]
    rows = attnx.generate(model, [[1], [2]], max_new_tokens=6, temperature=0, stop=[stop])
    assert rows[0] == free[0][: free[0].index(stop) + 1]
    assert rows[1] == (free[1][: free[1].index(stop) + 1] if stop in free[1] else free[1])


def test_sampling_repeats_with_its_key(model):
    draw = lambda seed: attnx.generate(model, [[1, 2]], max_new_tokens=8, temperature=2.0, key=jax.random.key(seed))
    assert draw(0) == draw(0) != draw(1)


def test_filters():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    kept = lambda **how: np.isfinite(filter_logits(logits, Sampling(**how))).tolist()
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.74) == [True, True, False, False]
    assert kept(top_p=0.76) == [True, True, True, False]
    assert kept(min_p=0.25) == [True, True, True, False]
    assert kept(top_k=3, min_p=0.4) == [True, True, False, False]


@pytest.mark.parametrize(
    'given, expected',
    [
        ({'prompts': [[]]}, 'at least one token'),
        ({'prompts': [1, 2]}, 'a sequence of token ids for each row'),
        ({'prompts': ['text']}, 'a sequence of token ids for each row'),
        ({'prompts': [[31]]}, 'the vocabulary is 0…30'),
        ({'top_p': 0.0}, 'top_p 0.0 is not in'),
        ({'top_k': 99}, 'top_k 99'),
        ({'temperature': 1.0}, 'needs a PRNG key'),
        ({'max_new_tokens': 0}, 'max_new_tokens 0'),
    ],
)
def test_bad_input(model, given, expected):
    options = {'prompts': [[1]], 'max_new_tokens': 2, 'temperature': 0, **given}
    with pytest.raises(ValueError, match=expected):
        attnx.generate(model, **options)
