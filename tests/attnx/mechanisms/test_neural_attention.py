"""Scores of a network: against the network on concatenated pairs, and uniform where its last layer is zero."""

import jax
import jax.numpy as jnp
import numpy as np

from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


def test_is_the_network_of_concatenated_pairs():
    mixer, x = oracle.build('neural_attention', num_heads=2, pair_width=4), oracle.inputs()
    mixer.first_bias[...] = mixer.first_bias[...] + 0.1
    get = lambda p: np.asarray(p[...], np.float64)
    q, k, v = (oracle.heads(x, f, 2) for f in (mixer.query, mixer.key, mixer.value))
    q, k = (a @ get(f.kernel) + get(f.bias) for a, f in ((q, mixer.narrow_query), (k, mixer.narrow_key)))
    length = x.shape[1]
    q, k = (np.broadcast_to(a, (2, length, length, 2, 4)) for a in (q[:, :, None], k[:, None]))
    hidden = np.maximum(np.concatenate([q, k], axis=-1) @ get(mixer.first) + get(mixer.first_bias), 0)
    hidden = np.maximum(hidden @ get(mixer.second) + get(mixer.second_bias), 0)
    w = np.where(oracle.causal(length), np.exp(np.moveaxis((hidden @ get(mixer.last))[..., 0], 3, 1)), 0)
    out = np.einsum('bnts,bsnh->btnh', w / w.sum(-1, keepdims=True), v)
    close(oracle.run(mixer, x), oracle.project(out, mixer.out), tolerances.FLOAT32)
    mixer.last[...] = jnp.zeros_like(mixer.last[...])
    mean = np.cumsum(v, axis=1) / np.arange(1, length + 1)[:, None, None]
    close(oracle.run(mixer, x), oracle.project(mean, mixer.out), tolerances.FLOAT32)


def test_no_array_of_all_pairs_times_the_width():
    """Forward and backward hold some rows of [T, S, d] at a time."""
    length, mixer = 2048, oracle.build('neural_attention', num_heads=2, pair_width=8)
    loss = lambda mixer, x: oracle.forward.__wrapped__(mixer, x, oracle.Context()).sum()
    run = jax.jit(jax.grad(loss, argnums=(0, 1)))
    memory = run.lower(mixer, jax.ShapeDtypeStruct((1, length, 16), jnp.float32)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 2 * 8 * length**2 / 2
