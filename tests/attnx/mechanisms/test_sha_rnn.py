"""SHA-RNN: the LSTM against a loop, the head against its definition, and values collapsed to a vector."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnx.mechanisms.local.sha_rnn import lstm
from attnx.nn import LayerNorm
from attnx.spec import Dims
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close

sig = lambda z: 1 / (1 + np.exp(-z))


def loop(x, w, b, u):
    """One document [T, M] through the LSTM."""
    h = c = np.zeros(u.shape[0])
    out = []
    for row in x:
        i, f, g, o = np.split(row @ w + b + h @ u, 4)
        c = sig(f) * c + sig(i) * np.tanh(g)
        h = sig(o) * np.tanh(c)
        out.append(h)
    return np.array(out)


def test_lstm_is_a_loop_in_each_document():
    rng = np.random.default_rng(0)
    x, w, b, u = (rng.standard_normal(s) for s in ((2, 9, 5), (5, 12), (12,), (3, 12)))
    ids = np.array([[1] * 4 + [2] * 5, [1] * 9], np.int32)
    zero = jnp.zeros((2, 3))
    run = jax.jit(lambda gates: lstm(gates, jnp.asarray(u, jnp.float32), ids, (zero, zero))[0])
    expected = np.stack([np.concatenate([loop(x[0, :4], w, b, u), loop(x[0, 4:], w, b, u)]), loop(x[1], w, b, u)])
    close(run(jnp.asarray(x @ w + b, jnp.float32)), expected, tolerances.FLOAT32)


def test_is_its_definition():
    mixer, x = oracle.build('sha_rnn', expansion=2, memory=5), oracle.inputs()
    for name in ('query_scale', 'key_scale', 'value_scale'):
        getattr(mixer, name)[...] = jnp.asarray(np.random.default_rng(len(name)).standard_normal(16), jnp.float32)
    vector = lambda p: np.asarray(p[...], np.float64)
    h = np.stack([loop(row, oracle.kernel(mixer.input), vector(mixer.input.bias), oracle.kernel(mixer.recurrent)) for row in x])
    h = h[..., :16] + h[..., 16:]
    norm = lambda z: np.asarray(LayerNorm(16, Dims(width=16), rngs=nnx.Rngs(0))(jnp.asarray(z, jnp.float32)), np.float64)
    q = sig(vector(mixer.query_scale)) * norm(norm(h) @ oracle.kernel(mixer.query))
    m, far = norm(h), np.arange(12)[:, None] - np.arange(12)
    c, a = np.split(sig(vector(mixer.value_scale)) @ oracle.kernel(mixer.over), 2)
    v = sig(a) * np.tanh(c)
    close(mixer.scale_of_values(), v, tolerances.FLOAT32)
    read = oracle.attend(q[:, :, None], (sig(vector(mixer.key_scale)) * m)[:, :, None], m[:, :, None], (far >= 0) & (far < 5))
    close(oracle.run(mixer, x), h + v * read[:, :, 0], tolerances.FLOAT32)
    plain = oracle.build('sha_rnn', expansion=2, attention=False)
    for name in ('input', 'recurrent'):
        getattr(plain, name).kernel[...] = getattr(mixer, name).kernel[...]
    close(oracle.run(plain, x), h, tolerances.FLOAT32)
