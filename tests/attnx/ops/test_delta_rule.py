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
    op,
    over_rows,
    second_derivatives,
    segments,
    split_and_carry,
    temporaries,
)

NAME = 'delta_rule'
delta_rule = op(NAME)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.quick('token', 'channel')
@pytest.mark.parametrize('decay', DECAYS)
def test_chunked_equals_token_by_token(decay):
    """Outputs, final state and all gradients, with resets, shared key heads, beta from 0 to 2, decays from 0 to -50."""
    for seed, nats in enumerate((0.0, 1.0, 50.0)):
        arrays = inputs(NAME, seed, decay=decay, nats=nats)
        arrays['beta'] = jnp.round(2 * arrays['beta']) if seed == 1 else arrays['beta']  # exactly 0, 1, 2
        compare(NAME, arrays, segments(seed), tolerances.FLOAT64)


@pytest.mark.quick('17-channel')
@pytest.mark.parametrize(('T', 'decay'), [(1, 'channel'), (17, 'channel'), (63, 'token')])
def test_lengths(T, decay):
    compare(NAME, inputs(NAME, T, T=T, decay=decay, nats=5.0), segments(T, T=T), tolerances.FLOAT64)


@pytest.mark.quick('channel')
@pytest.mark.parametrize('decay', ['none', 'channel'])
def test_a_thousand_tokens(decay):
    arrays, ids = inputs(NAME, 3, B=1, T=1000, decay=decay), segments(3, 1, 1000, 0.005)
    found, expected = (forward(NAME, impl)(arrays, ids) for impl in ('xla', 'reference'))
    assert_close(found, expected, tolerances.FLOAT64)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=34, max_size=34), st.floats(0, 60), st.floats(0, 2))
def test_any_segments(flat, nats, beta):
    with jax.enable_x64(True):
        arrays, ids = inputs(NAME, T=17, decay='channel', nats=nats), jnp.asarray(flat, jnp.int32).reshape(2, 17)
        arrays['beta'] = jnp.full_like(arrays['beta'], beta)
        compare(NAME, arrays, ids, tolerances.FLOAT64)


def nearly_collinear(arrays):
    """All keys within 1e-3 of one direction: the errors' system is as far from the identity as it gets."""
    key = arrays['key'][:, :1] + 1e-3 * arrays['key']
    return arrays | {'key': key / jnp.linalg.norm(key, axis=-1, keepdims=True)}


@pytest.mark.quick('2.0')
@pytest.mark.parametrize('beta', [0.999, 1.0, 2.0])
def test_float32_with_nearly_collinear_keys(beta):
    arrays, ids = nearly_collinear(inputs(NAME, decay='none')), segments(0)
    arrays['beta'] = jnp.full_like(arrays['beta'], beta)
    single = {k: v.astype(jnp.float32) for k, v in arrays.items()}
    exact = {k: v.astype(jnp.float64) for k, v in single.items()}
    found, token = (gradients(NAME, impl)(single, ids) for impl in ('xla', 'reference'))
    expected = gradients(NAME, 'reference')(exact, ids)
    assert found[0][1].dtype == jnp.float32
    for ours, its, exact, least in zip(found, token, expected, (tolerances.FLOAT32, tolerances.FLOAT32_GRAD)):
        for x, y, z in zip(*map(jax.tree.leaves, (ours, its, exact))):
            # Exact to rounding, or no worse than token by token in the same precision, of which no more can be asked.
            error, token_error = (float(np.abs(np.asarray(w, np.float64) - z).max() / np.abs(z).max()) for w in (x, y))
            assert error <= max(least, 2 * token_error), (error, token_error)
    again = gradients(NAME, 'xla')(single, ids)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (found, again)))), 'not bit-equal'


@pytest.mark.quick('channel')
@pytest.mark.parametrize('decay', ['token', 'channel'])
def test_float32_is_exact_to_rounding_through_large_decays(decay):
    arrays, ids = inputs(NAME, decay=decay), segments(0, rate=0.0)
    wild = np.random.default_rng(1).uniform(size=arrays['log_decay'].shape)
    arrays['log_decay'] = jnp.where(wild < 0.4, -50.0, jnp.where(wild < 0.8, -1e-3, -1.0) * wild)
    single = {k: v.astype(jnp.float32) for k, v in arrays.items()}
    exact = {k: v.astype(jnp.float64) for k, v in single.items()}
    found, expected = gradients(NAME, 'xla')(single, ids), gradients(NAME, 'reference')(exact, ids)
    assert_close(found[0], expected[0], tolerances.FLOAT32)
    assert_close(found[1], expected[1], tolerances.FLOAT32_GRAD)


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


@pytest.mark.quick('token-256')
@pytest.mark.parametrize(('decay', 'chunk'), [('token', 1), ('token', 256), ('channel', 16)])
def test_chunk_size_does_not_matter(decay, chunk):
    arrays, ids = inputs(NAME, decay=decay, nats=3.0), segments(1)
    expected = forward(NAME, 'reference')(arrays, ids)
    assert_close(forward(NAME, 'xla', chunk=chunk)(arrays, ids), expected, tolerances.FLOAT64)


def test_forward_mode_and_second_order():
    arrays = inputs(NAME, T=10, decay='channel')
    found, expected = (second_derivatives(NAME, arrays, impl, chunk=8) for impl in ('xla', 'reference'))
    assert_close(found, expected, tolerances.FLOAT64)


def test_gradients_equal_finite_differences():
    arrays, ids = inputs(NAME, T=17, decay='channel'), segments(0, T=17)
    assert_finite_differences(NAME, arrays, ids, tolerances.FINITE_DIFFERENCE)


def test_vmap_and_scale():
    arrays, ids = inputs(NAME, T=17, decay='channel'), segments(0, T=17)
    add = lambda tree: jax.tree.map(lambda x: x[:, None], tree)
    run = jax.jit(jax.vmap(lambda a, i: delta_rule(**a, segment_ids=i, scale=0.5, impl='xla')))
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


def test_memory_holds_no_state_per_token():
    """Temporaries of forward and backward stay below a third of one [T, H, Hv]."""
    assert temporaries(NAME, 4096) < 4096 * 64 * 64 * 4 / 3


# Identities of the sheets


def lookup():
    """Orthonormal keys, each written twice, no decay, beta 1."""
    a = inputs(NAME, B=1, T=8, K=1, N=1, H=4, decay='none', state=False)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    return a | {'key': jnp.tile(basis, (2, 1))[None, :, None], 'beta': jnp.ones((1, 8, 1))}


def test_orthonormal_keys_look_values_up():
    a = lookup()
    a['query'] = a['key']
    out, state = forward(NAME, 'xla')(a, None)
    assert_close(out, a['value'], tolerances.FLOAT64)
    # The second write of a key replaced the first.
    found = jnp.einsum('tnh,nhv->tnv', a['key'][0, 4:], state[0])
    assert_close(found, a['value'][0, 4:], tolerances.FLOAT64)


def test_beta_zero_only_decays():
    a = inputs(NAME, T=17, decay='channel')
    a['beta'] = jnp.zeros_like(a['beta'])
    _, state = forward(NAME, 'xla')(a, None)
    expected = a['initial_state'] * jnp.exp(a['log_decay'].sum(1))[..., None]
    assert_close(state, expected, tolerances.FLOAT64)


def test_beta_two_reflects():
    """(I - 2 k^T k) is a Householder reflection: with values of zero the state keeps its norm."""
    a = inputs(NAME, T=63, decay='none') | {'value': jnp.zeros((2, 63, 2, 5))}
    a['beta'] = jnp.full_like(a['beta'], 2.0)
    _, state = forward(NAME, 'xla')(a, None)
    norm = lambda x: jnp.linalg.norm(x, axis=(-2, -1))
    assert_close(norm(state), norm(a['initial_state']), tolerances.FLOAT64)


def test_small_beta_is_linear_attention():
    a = inputs(NAME, T=17, decay='token', state=False)
    a['beta'] = 1e-6 * a['beta']
    out, _ = forward(NAME, 'xla')(a, None)
    additive = {k: v for k, v in a.items() if k != 'beta'} | {'value': a['value'] * a['beta'][..., None]}
    expected, _ = forward('gated_linear', 'xla')(additive, None)
    assert_close(out, expected, 1e-5)  # the erased part is smaller by beta, summed over 17 tokens


def test_error_is_taken_against_the_decayed_state():
    a = inputs(NAME, B=1, T=2, K=1, N=1, decay='token')
    out, state = forward(NAME, 'xla')(a, None)
    s = np.asarray(a['initial_state'][0, 0])
    for t in range(2):
        q, k, v = (np.asarray(a[name][0, t, 0]) for name in ('query', 'key', 'value'))
        s = np.exp(float(a['log_decay'][0, t, 0])) * s
        s = s + float(a['beta'][0, t, 0]) * np.outer(k, v - k @ s)
        assert_close(out[0, t, 0], q @ s, tolerances.FLOAT64)
    assert_close(state[0, 0], s, tolerances.FLOAT64)


# Bad input


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'beta': np.ones((2, 6, 2))}, r'beta has shape \(2, 6, 2\), expected \[B, T, N\] = \(2, 6, 4\)'),
        ({'beta': np.ones((2, 6, 4), np.int32)}, 'beta has dtype int32, expected a floating one'),
        ({'beta': np.full((2, 6, 4), 2.5)}, r'beta holds 2.5, expected values in \[0, 2'),
        ({'beta': np.full((2, 6, 4), -0.5)}, r'beta holds -0.5, expected values in \[0, 2'),
        ({'value': np.ones((2, 6, 20))}, r'value has shape \(2, 6, 20\), expected 4 dimensions \[B, T, N, Hv\]'),
        ({'log_decay': np.full((4,), 0.1)}, r'log_decay holds 0.1, expected values in \[-inf, 0.001\]'),
        ({'initial_state': np.zeros((2, 4, 5, 3))}, r'initial_state has shape .* \[B, N, H, Hv\] = \(2, 4, 3, 5\)'),
        ({'chunk': -4}, 'chunk is -4, expected a power of two, such as 64'),
        ({'precision': 'high'}, "precision is 'high', expected None or 'highest'"),
        ({'impl': 'refrence'}, "did you mean 'reference'"),
    ],
)
def test_bad_input(change, message):
    good = {'query': np.ones((2, 6, 2, 3)), 'key': np.ones((2, 6, 2, 3)), 'value': np.ones((2, 6, 4, 5))}
    good['beta'] = np.ones((2, 6, 4))
    with pytest.raises(ValueError, match=message):
        delta_rule(**(good | change))


@pytest.mark.quick('token')
@pytest.mark.parametrize('decay', ['token', 'channel'])
def test_documents_keep_their_poison(decay):
    run = over_rows(functools.partial(op(NAME), impl='xla'))
    assert_documents_keep_their_poison(NAME, decay, run, tolerances.FLOAT32_GRAD)
