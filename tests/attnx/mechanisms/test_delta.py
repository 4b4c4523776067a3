"""What is special to the delta-rule mechanisms: lookup, overwriting, and each as a case of the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx.spec import Context, Dims
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


def build(name, width=16, **options):
    spec = attnx.get(name)
    return jax.jit(lambda: spec.build(spec.config(**options), Dims(width=width, num_layers=2), rngs=nnx.Rngs(0)))()


def inputs(width=16, length=12):
    return np.random.default_rng(0).standard_normal((2, length, width)).astype(np.float32)


def kernel(linear):
    return np.asarray(linear.kernel[...], np.float64)


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def unit(x):
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def rms(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def delta(mixer, x, n, decay=1.0, strength=1.0):
    """The normed output [B, T, N * Hv] of the step recurrence in float64, without convolutions."""
    x = np.asarray(x, np.float64)
    q, k, v = (silu(x @ kernel(f.linear)).reshape(*x.shape[:2], n, -1) for f in (mixer.query, mixer.key, mixer.value))
    q, k = unit(q), unit(k)
    beta = strength * sigmoid(x @ kernel(mixer.beta))
    decay = np.broadcast_to(decay, beta.shape)
    state, out = np.zeros((len(x), n, q.shape[-1], v.shape[-1])), np.zeros_like(v)
    for t in range(x.shape[1]):
        state = decay[:, t, :, None, None] * state
        error = v[:, t] - np.einsum('bnh,bnhv->bnv', k[:, t], state)
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None]
        out[:, t] = np.einsum('bnh,bnhv->bnv', q[:, t], state) * q.shape[-1] ** -0.5
    return rms(out).reshape(*x.shape[:2], -1)


@pytest.mark.parametrize('strength', [1.0, 2.0])
def test_deltanet_is_its_step_recurrence(strength):
    mixer = build('deltanet', num_heads=2, conv_taps=0, negative_eigenvalues=strength == 2.0)
    x = inputs()
    close(oracle.run(mixer, x), delta(mixer, x, 2, strength=strength) @ kernel(mixer.out), tolerances.FLOAT32)


def test_gated_deltanet_is_its_step_recurrence():
    mixer = build('gated_deltanet', num_heads=2, key_expansion=1.0, conv_taps=0)
    x = inputs()
    step = np.logaddexp(0, x @ kernel(mixer.decay) + np.asarray(mixer.dt_bias[...], np.float64))
    decay = np.exp(-np.exp(np.asarray(mixer.log_rate[...], np.float64)) * step)
    out = delta(mixer, x, 2, decay) * silu(x @ kernel(mixer.gate))
    close(oracle.run(mixer, x), out @ kernel(mixer.out), tolerances.FLOAT32)


def test_gated_deltanet_without_decay_is_deltanet():
    plain = build('deltanet', num_heads=2, gate=True)
    gated = build('gated_deltanet', num_heads=2, key_expansion=1.0, value_expansion=1.0)
    for name in ('query', 'key', 'value'):
        getattr(gated, name).linear.kernel[...] = getattr(plain, name).linear.kernel[...]
        getattr(gated, name).conv.kernel[...] = getattr(plain, name).conv.kernel[...]
    for name in ('beta', 'gate', 'out'):
        getattr(gated, name).kernel[...] = getattr(plain, name).kernel[...]
    gated.log_rate[...] = jnp.full((2,), -60.0)
    x = inputs()
    close(oracle.run(gated, x), oracle.run(plain, x), tolerances.FLOAT32)


def test_deltanet_looks_up_exactly_and_overwrites():
    """Orthogonal keys, beta 1, identity projections: a query for a key returns the last value written under it."""
    width = 16
    mixer = build('deltanet', width=width, num_heads=1, conv_taps=0)
    eye = jnp.eye(width)
    for name in ('query', 'key'):
        getattr(mixer, name).linear.kernel[...] = eye.at[8:].set(0)  # channels 0-7 are the key, 8-15 the value
    mixer.value.linear.kernel[...] = eye.at[:8].set(0)
    mixer.out.kernel[...] = eye
    mixer.beta.kernel[...] = jnp.full((width, 1), 1e4)  # beta = 1 for positive inputs
    keys = [0, 1, 2, 0, 1]
    rng = np.random.default_rng(0)
    values = rng.uniform(0.5, 2, (len(keys), 8))
    x = np.zeros((1, len(keys), width), np.float32)
    for t, key in enumerate(keys):
        x[0, t, key], x[0, t, 8:] = 3.0, values[t]
    state = mixer.init_state(1, 8)
    y, state, *_ = mixer(x, Context(), state)
    written = np.concatenate([np.zeros((len(keys), 8)), silu(x[0, :, 8:].astype(np.float64))], axis=-1)
    close(y[0], rms(written / 4), tolerances.FLOAT32)  # every token reads back what it wrote
    memory = np.asarray(state.memory['matrix'])[0, 0]
    for key, t in ((0, 3), (1, 4), (2, 2)):  # and the state holds only the last value of each key
        close(memory[key], written[t], tolerances.FLOAT32)


def test_heads_that_do_not_divide_are_refused():
    for name in ('deltanet', 'gated_deltanet'):
        with pytest.raises(ValueError, match='num_heads 5'):
            build(name, num_heads=5)
