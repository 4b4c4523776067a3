"""Maps from elsewhere: those of noise do not depend on the input; in the first layer those of embeddings are the input's."""

import numpy as np

from attnx.nn import rms_normalize
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


def test_maps_of_noise_are_the_same_for_all_inputs():
    mixer = oracle.build('static_queries', num_heads=2, source='noise')
    a, b = oracle.inputs(), np.random.default_rng(5).standard_normal((2, 12, 16)).astype(np.float32)
    run = lambda x: np.asarray(oracle.run(mixer, x))
    close(run(a + b), run(a) + run(b), tolerances.FLOAT32)


def test_maps_of_a_fixed_sequence_are_the_same_for_all_rows():
    mixer, x, y = oracle.build('static_queries', num_heads=2, source='fixed'), *(oracle.inputs(batch=4) for _ in range(2))
    y[0] += y[2]
    run = lambda x: oracle.run(mixer, x, shared={'fixed': np.array([1, 1, 1, 1])})  # row 1 is the sequence
    close(run(y)[0], run(x)[0] + run(x)[2], tolerances.FLOAT32)


def test_the_first_layer_is_grouped_query_attention():
    mixer, plain = (oracle.build(n, num_heads=2, num_kv_heads=2) for n in ('static_queries', 'gqa'))
    for name in ('query', 'key', 'value', 'out'):
        getattr(plain, name).kernel[...] = getattr(mixer, name).kernel[...]
    embedding = oracle.inputs()
    x = np.asarray(rms_normalize(embedding))
    close(oracle.run(mixer, x, shared={'embedding': embedding}), oracle.run(plain, x), tolerances.FLOAT32)
