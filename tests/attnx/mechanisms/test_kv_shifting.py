"""Shifted keys and values: nothing shifted is grouped-query attention; keys shifted alone make an induction head."""

import jax.numpy as jnp
import numpy as np

from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


def test_without_a_shift_it_is_grouped_query_attention():
    shifted, plain = (oracle.build(n, num_heads=4, num_kv_heads=2) for n in ('kv_shifting', 'gqa'))
    for name in ('query', 'key', 'value', 'out'):
        getattr(plain, name).kernel[...] = getattr(shifted, name).kernel[...]
    shifted.key_mix[...] = shifted.value_mix[...] = jnp.array([[0.0, 0.0], [1.0, 1.0]])
    x = oracle.inputs()
    close(oracle.run(shifted, x), oracle.run(plain, x), tolerances.FLOAT32)


def test_one_layer_finds_what_followed_the_token():
    """Keys of the token before, values of the token itself: repeats of a sequence are predicted."""
    vocab, rng = 16, np.random.default_rng(0)
    once = rng.permutation(vocab)
    tokens = np.concatenate([once, once])
    mixer = oracle.build('kv_shifting', num_heads=1, position='none', max_length=2 * vocab)
    for name in ('key', 'value', 'out'):
        getattr(mixer, name).kernel[...] = jnp.eye(vocab)
    mixer.query.kernel[...] = 100 * jnp.eye(vocab)
    mixer.key_mix[...], mixer.value_mix[...] = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [1.0]])
    y = np.asarray(oracle.run(mixer, np.eye(vocab, dtype=np.float32)[tokens][None]))[0]
    np.testing.assert_array_equal(y[vocab:-1].argmax(-1), tokens[vocab + 1 :])
