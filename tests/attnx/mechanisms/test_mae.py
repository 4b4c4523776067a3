"""Mixture of attentive experts: identities of the mixture, and which parameters each phase trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.nn import to_flat
from attnx.spec import Context
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close

HEADS = ('query', 'key', 'value', 'out')


def build(**fields):
    return oracle.build('mae', num_heads=4, gate_every=3, **fields)


def tilt(mixer, logits):
    mixer.gate_out.kernel[...] = jnp.zeros_like(mixer.gate_out.kernel[...])
    mixer.gate_out.bias[...] = jnp.asarray(logits, jnp.float32)


def attention(mixer, x, without=None):
    """Multi-head attention with the heads of `mixer`, one left out."""
    full = oracle.build('mha', num_heads=4)
    for name in HEADS:
        getattr(full, name).kernel[...] = getattr(mixer, name).kernel[...]
    if without is not None:
        full.out.kernel[...] = full.out.kernel[...].reshape(4, 4, 16).at[without].set(0).reshape(16, 16) * 4 / 3
    return oracle.run(full, x)


def test_uniform_gates_are_multi_head_attention_and_one_hot_gates_an_expert():
    mixer, x = build(), oracle.inputs()
    tilt(mixer, [0, 0, 0, 0])
    close(oracle.run(mixer, x), attention(mixer, x), tolerances.FLOAT32)
    tilt(mixer, [0, 60, 0, 0])
    close(oracle.run(mixer, x), attention(mixer, x, without=1), tolerances.FLOAT32)


@pytest.mark.parametrize('causal', [True, False])
def test_gate_reads_the_mean(causal):
    mixer, x = build(causal=causal), oracle.inputs()
    probs, _ = mixer.probabilities(jnp.asarray(x), Context(), None)
    mean = np.cumsum(x, axis=1) / np.arange(1, 13)[:, None] if causal else x.mean(1, keepdims=True) + 0 * x
    logits = np.tanh(mean @ oracle.kernel(mixer.gate)) @ oracle.kernel(mixer.gate_out)
    close(probs, np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), tolerances.FLOAT32)


def test_phases_train_gate_and_experts_in_turn():
    mixer, x = build(), oracle.inputs()

    @jax.jit
    def run(mixer, step):
        ctx = Context(key=jax.random.key(0), step=step)
        loss = lambda m, x: jnp.sum(jnp.sin(m(x, ctx).y))
        return mixer(jnp.asarray(x), ctx).y, *jax.grad(loss, argnums=(0, 1))(mixer, jnp.asarray(x))

    mixture = oracle.run(mixer, x)
    for step in (0, 1, 2, 3):
        y, grads, dx = run(mixer, jnp.int32(step))
        size = {name: np.abs(np.asarray(g)).max() for name, g in to_flat(grads).items()}
        gate = {name for name in size if 'gate' in name}
        idle, busy = (set(size) - gate, gate) if step % 3 == 0 else (gate, set(size) - gate)
        assert all(size[n] == 0 for n in idle) and all(size[n] > 0 for n in busy)
        assert np.abs(np.asarray(dx)).max() > 0, 'layers below go on learning'
        if step % 3 == 0:
            close(y, mixture, tolerances.FLOAT32)
    tilt(mixer, [0, 0, 60, 0])  # the expert that is drawn now
    close(run(mixer, jnp.int32(1))[0], attention(mixer, x, without=2), tolerances.FLOAT32)
    with pytest.raises(ValueError, match='mae draws an expert'):
        oracle.run(mixer, x, step=jnp.int32(1))
