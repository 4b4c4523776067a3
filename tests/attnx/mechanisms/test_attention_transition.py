"""The edit of weights against loops, and where it is none."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from attnx import catalog
from tests import tolerances
from tests.laws import close

transition = catalog.module('attention_transition')
N, LAYERS = 40, 6
CONFIG = transition.Config(begin=2, tail=6, inner=0.5, outer=0.4)


def weights():
    w = np.exp(3 * np.random.default_rng(0).standard_normal((1, 2, N, N))) * np.tril(np.ones((N, N)))
    return (w / w.sum(-1, keepdims=True)).astype(np.float32)


def edit(w, layer, config=CONFIG):
    at = jnp.arange(N)[None]
    seen, size = jnp.tril(jnp.ones((N, N), bool))[None, None], jnp.full((1, N), N)
    return np.asarray(transition.edit(jnp.asarray(w), seen, at, at, size, layer, LAYERS, config))


def definition(w, layer, config):
    out, b, t = w.astype(np.float64), config.begin, config.tail
    spans = []
    if layer <= LAYERS - 2:
        c = -(-(N - b - t - 3) // (LAYERS + 3))
        s = (layer + 3) * c + b + 3
        e = min(s + c, N - t)
        spans.append((range(s, e), range(s - 3 * (e - s), s - 2 * (e - s)), config.inner / (s - b)))
    if 1 <= layer <= LAYERS - 2:
        c = -(-(N - t - 3) // (LAYERS + 3))
        spans.append((range(N - t, N), range((layer + 2) * c + 3, (layer + 3) * c + 3), config.outer / (N - t)))
    for rows, columns, threshold in spans:
        for h, i in ((h, i) for h in range(2) for i in rows):
            row = out[0, h, i]
            if not any(row[j] > threshold for j in columns):
                continue
            row[row < threshold] = 0
            lost = 1 - row.sum()
            part = np.array([100 if row[j] >= threshold else 5 for j in columns])
            row[list(columns)] += config.strength * lost * part / part.sum()
    return out


@pytest.mark.parametrize('layer', [0, 1, 4, 5])
def test_edit(layer):
    w = weights()
    found = edit(w, layer)
    close(found, definition(w, layer, CONFIG), tolerances.FLOAT32)
    assert (found != w).any() == (layer <= LAYERS - 2)
    assert not np.triu(found[0, 0], 1).any()  # never a later token


def test_limits():
    w = weights()
    change = lambda **fields: dataclasses.replace(CONFIG, **fields)
    close(edit(w, 2, change(strength=1.0)).sum(-1), np.ones((1, 2, N)), tolerances.FLOAT32)
    close(edit(w, 2, change(renormalize=True)).sum(-1), np.ones((1, 2, N)), tolerances.FLOAT32)
    close(edit(w, 2, change(inner=0.0, outer=0.0)), w, tolerances.FLOAT32)
    np.testing.assert_array_equal(edit(w, 2, change(tail=N)), w)
