"""Disentangled scores against loops; a marker touches its row and its column alone."""

import jax.numpy as jnp
import numpy as np

from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


def test_scores_are_their_definition():
    span, length = 3, 9
    mixer = oracle.build('knowledge_markers', num_heads=2, span=span)
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, length, 2, 8)).astype(np.float32) for _ in range(2))
    for p in (mixer.known_key, mixer.known_query):
        p[...] = jnp.asarray(rng.standard_normal((2, 8)), jnp.float32)
    at = jnp.arange(length)
    run = lambda known: np.asarray(mixer.compare(*(jnp.asarray(a) for a in (q, known, k, known)), at, at))
    none, one = np.zeros((1, length), np.float32), np.eye(length, dtype=np.float32)[None, 4]
    far_keys, far_queries = np.asarray(mixer.far_keys[...]), np.asarray(mixer.far_queries[...])
    expected = np.zeros((1, 2, length, length))
    for h, i, j in np.ndindex(2, length, length):
        d = lambda a, b: int(np.clip(a - b + span, 0, 2 * span - 1))
        expected[0, h, i, j] = q[0, i, h] @ (k[0, j, h] + far_keys[d(i, j), h]) + k[0, j, h] @ far_queries[d(j, i), h]
    close(run(none), expected, tolerances.FLOAT32)
    changed = (run(one) != run(none)).any((0, 1))
    changed[4] = changed[:, 4] = False
    assert not changed.any()
    assert mixer.scale == (8 * 5) ** -0.5


def test_unmarked_text_with_its_scale_kept_is_scored_as_without_markers():
    marked = oracle.build('knowledge_markers', num_heads=2, span=4, keep_scale=True)
    plain, x = oracle.build('knowledge_markers', num_heads=2, span=4, markers=False), oracle.inputs()
    for name in ('query', 'key', 'value', 'out'):
        getattr(plain, name).kernel[...] = getattr(marked, name).kernel[...]
    plain.far_keys[...], plain.far_queries[...] = marked.far_keys[...], marked.far_queries[...]
    markers = {'markers': np.zeros((2, 12), np.int32)}
    close(oracle.run(marked, x, inputs=markers), oracle.run(plain, x), tolerances.FLOAT32)
