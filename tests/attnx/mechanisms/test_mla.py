"""Latent attention: both forms, the latent cache, YaRN over both halves of a head."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx import ops
from attnx.nn.softmax import Rope
from attnx.spec import Context
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close

SIZES = {'num_heads': 2, 'head_dim': 6, 'rope_dim': 4, 'value_dim': 5, 'kv_rank': 12, 'query_rank': 10}


def expected(mixer, x, frequencies=None, sharpen=1.0):
    n, (head, _, _, rank) = mixer.num_heads, mixer.sizes
    x = np.asarray(x, np.float64)
    q = oracle.heads(oracle.rms(x @ oracle.kernel(mixer.query_down)), mixer.query, n)
    down = x @ oracle.kernel(mixer.down)
    latent, shared = oracle.rms(down[..., :rank]), down[..., rank:]
    shared = oracle.turn(shared[:, :, None], frequencies)
    q = np.concatenate([q[..., :head], oracle.turn(q[..., head:], frequencies)], -1) * sharpen
    k = np.concatenate([oracle.heads(latent, mixer.key, n), np.repeat(shared, n, axis=2)], -1)
    v = oracle.heads(latent, mixer.value, n)
    return oracle.project(oracle.attend(q, k, v, oracle.causal(x.shape[1])), mixer.out)


def test_training_is_the_plain_form():
    mixer, x = oracle.build('mla', **SIZES), oracle.inputs()
    close(oracle.run(mixer, x), expected(mixer, x), tolerances.FLOAT32)


def test_forms_are_equal_gradients_too():
    mixer = oracle.build('mla', **SIZES)
    rng = np.random.default_rng(1)
    head, rope, value, rank = mixer.sizes
    plain, rotated, entry = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((2, 5, 2, head), (2, 5, 2, rope), (2, 7, 1, rank + rope))
    )
    cotangent = rng.standard_normal((2, 5, 2, value))

    def attend(q, k, v):  # bidirectional, plain
        k, v = (jnp.repeat(a, 2 // a.shape[2], axis=2) for a in (k, v))
        w = jax.nn.softmax(jnp.einsum('btnh,bsnh->bnts', q, k) * (head + rope) ** -0.5, axis=-1)
        return jnp.einsum('bnts,bsnh->btnh', w, v)

    def loss(form, *arrays):
        return jnp.sum(getattr(mixer, form)(*arrays, attend) * cotangent)

    both = lambda form: jax.value_and_grad(lambda *a: loss(form, *a), argnums=(0, 1, 2))
    found, wanted = jax.jit(lambda *a: (both('absorbed')(*a), both('expanded')(*a)))(plain, rotated, entry)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        close(a, b, tolerances.FLOAT32_GRAD)


def test_steps_absorb_and_long_prefills_expand(monkeypatch):
    mixer, x = oracle.build('mla', **SIZES), oracle.inputs(length=16)
    used = []
    for name in ('absorbed', 'expanded'):
        form = getattr(type(mixer), name)
        monkeypatch.setattr(type(mixer), name, lambda self, *a, f=form, n=name: used.append(n) or f(self, *a))
    state, found = mixer.init_state(2, 16, jnp.float32), []
    for part in (slice(0, 11), slice(11, 15), slice(15, 16)):
        y, state = oracle.extend(mixer, x[:, part], Context(), state)
        found.append(y)
    assert used == ['expanded', 'absorbed', 'absorbed']
    close(jnp.concatenate(found, axis=1), expected(mixer, x), tolerances.FLOAT32)


def test_the_cache_holds_latents_only():
    state = oracle.build('mla', **SIZES).init_state(3, 20, jnp.bfloat16)
    assert [(a.shape, a.dtype) for a in state.arrays] == [((3, 20, 1, 12 + 4), jnp.bfloat16)]


def test_default_sizes_keep_the_paper_s_ratios():
    assert oracle.build('mla', width=512, num_heads=4).sizes == (128, 64, 128, 512)


def test_yarn_sharpens_both_halves():
    mixer, x = oracle.build('mla', **SIZES, rope=Rope(scaling='yarn', factor=4.0, original_length=64)), oracle.inputs()
    frequencies = ops.positions.rope_frequencies(4, scaling=ops.positions.Scaling('yarn', 4.0, 64)).inverse
    want = expected(mixer, x, frequencies, (0.1 * math.log(4.0) + 1) ** 2)
    close(oracle.run(mixer, x), want, tolerances.FLOAT32)


def test_norms_of_keys_are_refused():
    with pytest.raises(ValueError, match='qk_norm'):
        oracle.build('mla', qk_norm=True)
