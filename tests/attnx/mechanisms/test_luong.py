"""Scores and windows of Luong: general with the identity is dot, a wide window is global, what lies outside weighs nothing."""

import jax.numpy as jnp
import numpy as np

from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close

MEMORY = np.random.default_rng(4).standard_normal((2, 9, 16)).astype(np.float32)


def same(a, b):
    for name in ('match', 'match_memory', 'out'):
        if hasattr(a, name) and hasattr(b, name):
            getattr(b, name).kernel[...] = getattr(a, name).kernel[...]


def test_general_with_the_identity_is_dot_and_dot_is_softmax():
    dot, general, x = oracle.build('luong', score='dot'), oracle.build('luong'), oracle.inputs()
    same(dot, general)
    general.match.kernel[...] = jnp.eye(16)
    y = oracle.run(dot, x, memory=MEMORY)
    close(oracle.run(general, x, memory=MEMORY), y, tolerances.FLOAT32)
    w = np.exp(x @ np.swapaxes(MEMORY, 1, 2))
    read = w / w.sum(-1, keepdims=True) @ MEMORY
    close(y, np.tanh(np.concatenate([read, x], axis=-1) @ oracle.kernel(dot.out)), tolerances.FLOAT32)


def test_windows():
    whole, wide = oracle.build('luong', score='concat'), oracle.build('luong', score='concat', reach='local_m', window=99)
    same(whole, wide)
    wide.vector[...] = whole.vector[...]
    x = oracle.inputs()
    close(oracle.run(wide, x, memory=MEMORY), oracle.run(whole, x, memory=MEMORY), tolerances.FLOAT32)
    narrow = oracle.build('luong', reach='local_m', window=2)
    moved = MEMORY.copy()
    moved[:, 6:] = 50.0
    before, after = (np.asarray(oracle.run(narrow, x, memory=m)) for m in (MEMORY, moved))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])  # token 3 sees memory 1 … 5
    assert (before[:, 4] != after[:, 4]).any()


def test_predicted_windows_are_not_renormalised():
    mixer, x = oracle.build('luong', score='dot', reach='local_p', window=2), oracle.inputs()
    mixer.out.kernel[...] = jnp.concatenate([jnp.eye(16), jnp.zeros((16, 16))])
    read = np.arctanh(np.asarray(oracle.run(mixer, x, memory=0.1 * np.ones_like(MEMORY)), np.float64))
    share = read / 0.1  # the sum of the weights
    assert (share <= 1 + 1e-5).all() and (share > 0.1).all() and share.min() < 0.99
