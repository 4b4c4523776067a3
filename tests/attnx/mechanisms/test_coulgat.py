"""Screened-Coulomb attention: flat and saturated limits, and graphs of any order."""

import jax.numpy as jnp
import numpy as np

from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


def distances(points):
    return np.linalg.norm(points[:, :, None] - points[:, None], axis=-1).astype(np.float32)


def test_shared_form_knows_no_order():
    mixer, x = oracle.build('coulgat', causal=False, num_heads=2), oracle.inputs()
    points = np.random.default_rng(1).standard_normal((2, 12, 3))
    order = np.random.default_rng(2).permutation(12)
    run = lambda x, points: np.asarray(oracle.run(mixer, x, inputs={'distances': distances(points)}))
    close(run(x[:, order], points[:, order]), run(x, points)[:, order], tolerances.FLOAT32)


def test_powers_of_slots():
    mixer, x = oracle.build('coulgat', causal=False, num_heads=2, slots=12), oracle.inputs()
    far = distances(np.random.default_rng(1).standard_normal((2, 12, 3)))
    where = jnp.broadcast_to(jnp.arange(12), (2, 12))
    mixer.power[...] = jnp.zeros_like(mixer.power[...])
    close(mixer.weigh(far, where), np.ones((2, 2, 12, 12)), tolerances.FLOAT32)
    z = np.maximum(oracle.heads(x, mixer.project, 2).mean(axis=1, keepdims=True), 0)
    y = np.broadcast_to(z.reshape(2, 1, 16), x.shape)
    close(oracle.run(mixer, x, inputs={'distances': far}), y, tolerances.FLOAT32)  # every mean is that of all nodes
    mixer.power[...] = jnp.full_like(mixer.power[...], 1.5)
    weights = np.asarray(mixer.weigh(far, where))
    assert (np.einsum('bnii->bni', weights) - np.sort(weights, axis=-1)[..., -2] > 30).all()  # softmax: the identity
