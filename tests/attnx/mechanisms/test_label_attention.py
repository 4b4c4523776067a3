"""Label attention: its definition, and what its labels may differ in."""

import jax
import jax.numpy as jnp
import numpy as np

from attnx.spec import Context
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close

SIZES = {'num_labels': 3, 'key_dim': 6, 'value_dim': 5, 'label_dim': 4}


def build(**fields):
    return oracle.build('label_attention', causal=False, **SIZES, **fields)


def array(p):
    return np.asarray(p[...], np.float64)


def residuals(mixer, x):
    """[B, T, L, P] before the norm."""
    found = []
    for q, k, v in zip(array(mixer.query), array(mixer.key), array(mixer.value)):
        logits = (x @ k) @ q * x.shape[-1] ** -0.5
        a = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        context = np.einsum('bt,btv->bv', a, x @ v) @ oracle.kernel(mixer.back)
        found.append((x + context[:, None]) @ oracle.kernel(mixer.reduce))
    return np.stack(found, axis=2)


def normed(z):
    z = z - z.mean(-1, keepdims=True)
    return z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-5)


def test_is_its_definition():
    mixer, x = build(), oracle.inputs()
    z = residuals(mixer, x)
    moved = z - z[:, :1]  # tokens differ through the residual alone, alike for all labels
    close(moved, np.broadcast_to(moved[:, :, :1], z.shape), tolerances.FLOAT64)
    labels = jax.jit(lambda m, x: m.labels(x, Context()))(mixer, x)
    close(labels, normed(z), tolerances.FLOAT32)
    close(oracle.run(mixer, x), np.einsum('btlp,lpm->btm', normed(z), array(mixer.out)), tolerances.FLOAT32)
    weights, _ = mixer.weights(jnp.asarray(x), Context())
    close(weights.sum(-1), np.ones((2, 1, 3)), tolerances.FLOAT32)


def test_labels_are_interchangeable_and_equal_without_what_they_read():
    mixer, x, order = build(), jnp.asarray(oracle.inputs()), np.array([2, 0, 1])
    run = jax.jit(lambda m: m.labels(x, Context()))
    before = run(mixer)
    for name in ('query', 'key', 'value'):
        getattr(mixer, name)[...] = getattr(mixer, name)[...][order]
    close(run(mixer), np.asarray(before)[:, :, order], tolerances.FLOAT32)
    mixer.back.kernel[...] = jnp.zeros((5, 16))
    z = run(mixer)
    close(z, np.broadcast_to(z[:, :, :1], z.shape), tolerances.FLOAT32)
