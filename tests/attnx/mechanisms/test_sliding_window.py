"""The window and its ring: any split of any prompt around the window's length."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnx.spec import Context
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close

LENGTH = 14


def expected(mixer, x, ahead=0):
    n, k, w = mixer.config.num_heads, mixer.num_kv_heads, mixer.config.window
    q, key = oracle.turn(oracle.heads(x, mixer.query, n)), oracle.turn(oracle.heads(x, mixer.key, k))
    away = np.arange(x.shape[1])[:, None] - np.arange(x.shape[1])
    return oracle.project(
        oracle.attend(q, key, oracle.heads(x, mixer.value, k), (away < w) & (away >= -ahead)), mixer.out
    )


@pytest.mark.parametrize('window', [1, 3, 99])
def test_is_its_definition(window):
    x = oracle.inputs(length=LENGTH)
    mixer = oracle.build('sliding_window', num_kv_heads=2, window=window)
    close(oracle.run(mixer, x), expected(mixer, x), tolerances.FLOAT32)
    both = oracle.build('sliding_window', causal=False, num_kv_heads=2, window=window)
    close(oracle.run(both, x), expected(both, x, ahead=window - 1), tolerances.FLOAT32)


@functools.cache
def case(window):
    mixer, x = oracle.build('sliding_window', num_heads=2, window=window), oracle.inputs(length=LENGTH)
    return mixer, x, expected(mixer, x)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([1, 4, 40]), st.lists(st.sampled_from([1, 3, 6]), max_size=6))
def test_any_split_of_the_prompt(window, split):
    mixer, x, want = case(window)
    state, found, at = mixer.init_state(2, LENGTH, jnp.float32), [], 0
    assert state.arrays[0].shape[1] == min(window, LENGTH)
    for n in [*split, *[1] * LENGTH]:
        if at + n <= LENGTH:
            y, state = oracle.extend(mixer, x[:, at : at + n], Context(), state)
            found, at = [*found, y], at + n
    close(jnp.concatenate(found, axis=1), want, tolerances.FLOAT32)


def test_masks_of_positions_are_refused():
    with pytest.raises(ValueError, match='global_window'):
        oracle.build('sliding_window', masks=(('global_window', 4, 1),))
