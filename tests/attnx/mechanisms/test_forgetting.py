"""Forget gates: open ones are softmax attention, constant ones ALiBi, closed ones see the token alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


@pytest.mark.parametrize('bias', [30.0, 0.3, -60.0])
def test_constant_gates(bias):
    mixer, x = oracle.build('forgetting', num_heads=2), oracle.inputs()
    mixer.forget.kernel[...] = jnp.zeros_like(mixer.forget.kernel[...])
    mixer.forget.bias[...] = jnp.full((2,), bias)
    q, k, v = (oracle.heads(x, f, 2) for f in (mixer.query, mixer.key, mixer.value))
    length = x.shape[1]
    slope = np.log1p(np.exp(-bias))  # -log f
    far = np.arange(length)[:, None] - np.arange(length)
    logits = np.einsum('btnh,bsnh->bnts', q, k) * q.shape[-1] ** -0.5 - slope * far
    w = np.where(oracle.causal(length), np.exp(logits), 0)
    out = np.einsum('bnts,bsnh->btnh', w / w.sum(-1, keepdims=True), v)
    out = v if bias == -60 else out
    close(oracle.run(mixer, x), oracle.project(out, mixer.out), tolerances.FLOAT32)


def test_fixed_gates_start_at_decay_times_between_the_two():
    mixer = oracle.build('forgetting', num_heads=3, width=24, gates='fixed', shortest=2.0, longest=200.0)
    log_gate = np.asarray(-jnp.logaddexp(0, -mixer.forget_bias[...]))
    close(-1 / log_gate, [2, 20, 200], 1e-4)
