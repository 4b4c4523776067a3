import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tolerances
from tests.attnx.ops.recurrences import (
    DECAYS,
    assert_close,
    assert_documents_keep_their_poison,
    assert_finite_differences,
    compare,
    forward,
    gradients,
    inputs,
    module,
    op,
    over_rows,
    second_derivatives,
    segments,
    split_and_carry,
    temporaries,
)

NAME = 'gated_linear'
gated_linear = op(NAME)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.quick('head', 'channel')
@pytest.mark.parametrize('decay', DECAYS)
def test_chunked_equals_token_by_token(decay):
    """Outputs, final state and all gradients, with resets, shared key heads, and decays from 0 to -50 nats a token."""
    for seed, nats in enumerate((0.0, 1.0, 50.0)):
        compare(NAME, inputs(NAME, seed, decay=decay, nats=nats), segments(seed), tolerances.FLOAT64)


@pytest.mark.quick('17-channel')
@pytest.mark.parametrize(('T', 'decay'), [(1, 'channel'), (17, 'channel'), (63, 'token')])
def test_lengths(T, decay):
    compare(NAME, inputs(NAME, T, T=T, decay=decay, nats=5.0), segments(T, T=T), tolerances.FLOAT64)


@pytest.mark.quick('channel')
@pytest.mark.parametrize('decay', ['head', 'channel'])
def test_a_thousand_tokens(decay):
    arrays, ids = inputs(NAME, 3, B=1, T=1000, decay=decay), segments(3, 1, 1000, 0.005)
    found, expected = (forward(NAME, impl)(arrays, ids) for impl in ('xla', 'reference'))
    assert_close(found, expected, tolerances.FLOAT64)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=34, max_size=34), st.floats(0, 60))
def test_any_segments(flat, nats):
    with jax.enable_x64(True):
        arrays, ids = inputs(NAME, T=17, decay='channel', nats=nats), jnp.asarray(flat, jnp.int32).reshape(2, 17)
        compare(NAME, arrays, ids, tolerances.FLOAT64)


@pytest.mark.quick('token')
@pytest.mark.parametrize('decay', ['token', 'channel'])
def test_float32_is_exact_to_rounding_through_large_decays(decay):
    """Decays of 50 nats beside none at all: cumulative sums that are subtracted would lose five digits here."""
    arrays, ids = inputs(NAME, decay=decay), segments(0, rate=0.0)
    wild = np.random.default_rng(1).uniform(size=arrays['log_decay'].shape)
    arrays['log_decay'] = jnp.where(wild < 0.4, -50.0, jnp.where(wild < 0.8, -1e-3, -1.0) * wild)
    single = {k: v.astype(jnp.float32) for k, v in arrays.items()}
    exact = {k: v.astype(jnp.float64) for k, v in single.items()}
    found, expected = gradients(NAME, 'xla')(single, ids), gradients(NAME, 'reference')(exact, ids)
    assert found[0][1].dtype == jnp.float32
    assert_close(found[0], expected[0], tolerances.FLOAT32)
    assert_close(found[1], expected[1], tolerances.FLOAT32_GRAD)
    again = gradients(NAME, 'xla')(single, ids)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (found, again)))), 'not bit-equal'


@pytest.mark.parametrize('decay', ['token', 'channel'])
def test_erasing_is_a_reset(decay):
    """A log-decay of -inf gives what a new segment gives, with finite gradients."""
    arrays, ids = inputs(NAME, decay=decay), segments(0)
    fresh = np.pad(np.asarray(ids[:, 1:] != ids[:, :-1]), [(0, 0), (1, 0)])
    fresh = fresh.reshape(fresh.shape + (1,) * (arrays['log_decay'].ndim - 2))
    erasing = arrays | {'log_decay': jnp.where(fresh, -jnp.inf, arrays['log_decay'])}
    found, expected = (gradients(NAME, 'xla')(*a) for a in ((erasing, jnp.zeros_like(ids)), (arrays, ids)))
    assert_close(found, expected, tolerances.FLOAT64)


def test_split_sequence_carries_on():
    arrays, ids = inputs(NAME, decay='channel'), segments(0)
    expected = forward(NAME, 'reference')(arrays, ids)
    assert_close(split_and_carry(NAME, arrays, ids, (17, 17, 17, 17, 1, 61)), expected, tolerances.FLOAT64)


@pytest.mark.quick('channel-16')
@pytest.mark.parametrize(('decay', 'chunk'), [('token', 1), ('token', 256), ('channel', 4), ('channel', 16)])
def test_chunk_size_does_not_matter(decay, chunk):
    arrays, ids = inputs(NAME, decay=decay, nats=3.0), segments(1)
    expected = forward(NAME, 'reference')(arrays, ids)
    assert_close(forward(NAME, 'xla', chunk=chunk)(arrays, ids), expected, tolerances.FLOAT64)


@pytest.mark.quick('token')
@pytest.mark.parametrize('decay', ['token', 'channel'])
def test_forward_mode_and_second_order(decay):
    arrays = inputs(NAME, T=10, decay=decay)
    found, expected = (second_derivatives(NAME, arrays, impl, chunk=8) for impl in ('xla', 'reference'))
    assert_close(found, expected, tolerances.FLOAT64)


def test_gradients_equal_finite_differences():
    arrays, ids = inputs(NAME, T=17, decay='channel'), segments(0, T=17)
    assert_finite_differences(NAME, arrays, ids, tolerances.FINITE_DIFFERENCE)


def test_vmap_and_scale():
    arrays, ids = inputs(NAME, T=17, decay='channel'), segments(0, T=17)
    add = lambda tree: jax.tree.map(lambda x: x[:, None], tree)
    run = jax.jit(jax.vmap(lambda a, i: gated_linear(**a, segment_ids=i, scale=0.5, impl='xla')))
    found = jax.tree.map(lambda x: x[:, 0], run(add(arrays), add(ids)))
    halved = arrays | {'query': arrays['query'] / 2}
    assert_close(found, forward(NAME, 'xla')(halved, ids), tolerances.FLOAT64)


def test_bfloat16_keeps_the_state_in_float32():
    half = inputs(NAME, decay='token', dtype=jnp.bfloat16) | {'initial_state': None}
    exact = {k: v if v is None else v.astype(jnp.float64) for k, v in half.items()}
    out, state = forward(NAME, 'xla')(half, None)
    expected, last = forward(NAME, 'reference')(exact, None)
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(out, expected, 2.0**-8)  # one rounding, of the output
    assert_close(state, last, tolerances.FLOAT32)


def test_memory_grows_linearly():
    """No state per token: temporaries of forward and backward stay below a third of one [T, H, Hv]."""
    small, large = temporaries(NAME, 2048), temporaries(NAME, 4096)
    assert large < 2.1 * small
    assert large < 4096 * 64 * 64 * 4 / 3


# Identities of the sheets


def test_without_decay_it_is_causal_linear_attention():
    a = inputs(NAME, T=17, K=2, decay='none', state=False)
    out, state = forward(NAME, 'xla')(a, None)
    weights = jnp.tril(jnp.einsum('btnh,bsnh->bnts', a['query'], a['key']))
    assert_close(out, jnp.einsum('bnts,bsnv->btnv', weights, a['value']), tolerances.FLOAT64)
    assert_close(state, jnp.einsum('btnh,btnv->bnhv', a['key'], a['value']), tolerances.FLOAT64)


def test_constant_decay_is_retention():
    """GLA with one decay for all channels, Mamba-2 with one for all tokens, and RetNet's matrix are the same."""
    a = inputs(NAME, T=17, K=2, decay='head', state=False)
    (B, T, N, H), g = a['query'].shape, a['log_decay']
    gap = jnp.arange(T)[:, None] - jnp.arange(T)
    decay = jnp.where(gap >= 0, jnp.exp(g[:, None, None] * gap), 0)
    weights = jnp.einsum('btnh,bsnh->bnts', a['query'], a['key']) * decay
    expected = jnp.einsum('bnts,bsnv->btnv', weights, a['value'])
    for shape in ((N,), (B, T, N), (B, T, N, H)):
        spread = g[:, None] if len(shape) == 4 else g
        out, _ = forward(NAME, 'xla')(a | {'log_decay': jnp.broadcast_to(spread, shape)}, None)
        assert_close(out, expected, tolerances.FLOAT64)


def test_key_heads_are_shared_by_groups():
    a = inputs(NAME, T=17, K=2, N=6, decay='channel')
    wide = a | {k: jnp.repeat(a[k], 3, axis=2) for k in ('query', 'key')}
    assert_close(forward(NAME, 'xla')(a, None), forward(NAME, 'xla')(wide, None), tolerances.FLOAT64)


@pytest.mark.slow
def test_normalized_rows_sum_to_one():
    a = inputs(NAME, T=17, decay='token', state=False)
    a |= {k: jnp.exp(a[k]) for k in ('query', 'key')} | {'value': jnp.ones_like(a['value'])}
    out, state = module(NAME).normalized_gated_linear(**a, eps=0.0, segment_ids=segments(0, T=17))
    assert_close(out, jnp.ones_like(out), tolerances.FLOAT64)
    assert state.shape == (2, 2, 4, 6)


# Bad input


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'query': np.ones((2, 5, 2, 3))}, r'query has shape \(2, 5, 2, 3\), expected \[B, T, K, H\] = \(2, 6, 2, 3\)'),
        ({'key': np.ones((2, 6, 3))}, r'key has shape \(2, 6, 3\), expected 4 dimensions \[B, T, K, H\]'),
        ({'key': np.ones((2, 6, 2, 3), np.int32)}, 'key has dtype int32, expected a floating one'),
        ({'query': np.ones((2, 6, 3, 3)), 'key': np.ones((2, 6, 3, 3))}, '3 heads, expected a divisor of the 4 heads'),
        (
            {'log_decay': np.zeros((2, 6))},
            r'log_decay has shape \(2, 6\), expected \[N\], \[B, T, N\] or',
        ),
        ({'log_decay': np.zeros((2, 6, 4, 2))}, r'log_decay has shape .* = \(2, 6, 4, 3\)'),
        ({'log_decay': np.full((4,), 0.1)}, r'log_decay holds 0.1, expected values in \[-inf, 0.001\]'),
        ({'initial_state': np.zeros((2, 4, 5, 3))}, r'initial_state has shape .* \[B, N, H, Hv\] = \(2, 4, 3, 5\)'),
        ({'segment_ids': np.zeros((2, 5), np.int32)}, r'segment_ids has shape \(2, 5\)'),
        ({'segment_ids': np.zeros((2, 6))}, 'segment_ids has dtype float64, expected a integer one'),
        ({'chunk': 0}, 'chunk is 0, expected a power of two, such as 64'),
        ({'scale': np.ones(3)}, 'scale must be one number'),
        ({'scale': 'a'}, 'scale must be one number'),
        ({'query': [[1.0]]}, 'query must be an array, given list'),
        ({name: np.ones((0, 6, 2, 3)) for name in ('query', 'key', 'value')}, 'a dimension is 0'),
        ({'precision': 'high'}, "precision is 'high', expected None or 'highest'"),
        ({'chunk': 100}, 'chunk is 100, expected a power of two, such as 128'),
        ({'impl': 'xlaa'}, "did you mean 'xla'"),
    ],
)
def test_bad_input(change, message):
    good = {'query': np.ones((2, 6, 2, 3)), 'key': np.ones((2, 6, 2, 3)), 'value': np.ones((2, 6, 4, 5))}
    with pytest.raises(ValueError, match=message):
        gated_linear(**(good | change))


@pytest.mark.quick('channel')
@pytest.mark.parametrize('decay', ['token', 'channel'])
def test_documents_keep_their_poison(decay):
    run = over_rows(functools.partial(op(NAME), impl='xla'))
    assert_documents_keep_their_poison(NAME, decay, run, tolerances.FLOAT32_GRAD)
