"""Cross-attention: the memory is read once, masked, and kept."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnx.spec import Context
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close

REAL = np.array([[1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 1, 1]], bool)


def make(**options):
    mixer = oracle.build('cross_attention', num_heads=4, num_kv_heads=2, memory_width=12, max_length=10, **options)
    return mixer, oracle.inputs(), oracle.inputs(width=12, length=7)


def test_is_its_definition():
    mixer, x, memory = make()
    q = oracle.heads(x, mixer.query, 4)
    k, v = (oracle.heads(memory, f, 2) for f in (mixer.key, mixer.value))
    expected = oracle.project(oracle.attend(q, k, v, REAL[:, None, None]), mixer.out)
    ctx = Context(memory=jnp.asarray(memory), memory_mask=jnp.asarray(REAL))
    close(oracle.forward(mixer, x, ctx), expected, tolerances.FLOAT32)
    order = np.random.default_rng(0).permutation(7)
    ctx = Context(memory=jnp.asarray(memory[:, order]), memory_mask=jnp.asarray(REAL[:, order]))
    close(oracle.forward(mixer, x, ctx), expected, tolerances.FLOAT32)


@pytest.mark.parametrize('options', [{}, {'qk_norm': True, 'sinks': True, 'scores': (('softcap', 5.0),)}])
def test_steps_need_no_memory(options):
    mixer, x, memory = make(**options)
    ctx = Context(memory=jnp.asarray(memory), memory_mask=jnp.asarray(REAL))
    first, state = oracle.extend(mixer, x[:, :5], ctx, mixer.init_state(2, 12, jnp.float32))
    second, _ = oracle.extend(mixer, x[:, 5:], Context(), state)
    close(jnp.concatenate([first, second], axis=1), oracle.forward(mixer, x, ctx), tolerances.FLOAT32)


def test_a_shorter_memory_leaves_nothing_of_the_one_before():
    mixer, x, memory = make()
    _, state = oracle.extend(mixer, x, Context(memory=memory), mixer.init_state(2, 12, jnp.float32))
    _, state = oracle.extend(mixer, x, Context(memory=memory[:, :3]), state)
    y, _ = oracle.extend(mixer, x, Context(), state)
    close(y, oracle.run(mixer, x, memory=memory[:, :3]), tolerances.FLOAT32)


def test_padding_reads_nothing_and_no_memory_gives_nothing():
    mixer, x, memory = make()
    ids = np.ones((2, 12), np.int32)
    ids[:, :4] = 0
    real = np.ones((2, 7), bool)
    y = oracle.run(mixer, x, memory=memory, memory_mask=real, segment_ids=ids)
    assert np.abs(y[:, :4]).max() == 0 and np.abs(y[:, 4:]).min() > 0
    assert np.abs(oracle.run(mixer, x, memory=memory, memory_mask=~real, segment_ids=ids)).max() == 0


def test_errors_name_the_way_out():
    mixer, x, _ = make()
    with pytest.raises(ValueError, match='give Context'):
        mixer(x, Context())
    with pytest.raises(ValueError, match='memory_length'):
        long = jnp.zeros((2, 11, 12))
        mixer(x, Context(memory=long), mixer.init_state(2, 12))
    with pytest.raises(ValueError, match=r'\[B, S, 12\]'):
        mixer(x, Context(memory=jnp.zeros((2, 7, 13))))
    with pytest.raises(ValueError, match='distance'):
        make(position='rope')
