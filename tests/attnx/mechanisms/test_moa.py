"""Mixture of attention heads: a loop over tokens and experts, one expert alone, and the least of its loss."""

import jax
import jax.numpy as jnp
import numpy as np

from attnx.nn import routing
from attnx.spec import Context
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


def test_is_its_definition():
    mixer, x = oracle.build('moa', num_experts=5, top_k=2, num_kv_heads=2, head_dim=4), oracle.inputs()
    key, value = oracle.turn(oracle.heads(x, mixer.key, 2)), oracle.heads(x, mixer.value, 2)
    outs = []  # of every expert, for every token
    for wq, wo in zip(np.asarray(mixer.query[...], np.float64), np.asarray(mixer.out[...], np.float64)):
        q = oracle.turn((x @ wq).reshape(*x.shape[:2], 2, -1))
        outs.append(oracle.attend(q, key, value, oracle.causal(x.shape[1])).reshape(*x.shape[:2], -1) @ wo)
    logits = x @ oracle.kernel(mixer.router)
    expected = np.zeros(x.shape)
    for b, t in np.ndindex(*x.shape[:2]):
        best = np.argsort(-logits[b, t])[:2]
        gates = np.exp(logits[b, t, best])
        expected[b, t] = sum(g * outs[e][b, t] for g, e in zip(gates / gates.sum(), best))
    close(oracle.run(mixer, x), expected, tolerances.FLOAT32)


def test_one_expert_is_multi_head_attention_and_order_of_experts_is_free():
    x = oracle.inputs()
    mixer, full = oracle.build('moa', num_experts=1, top_k=1), oracle.build('mha', num_heads=4)
    for name in ('query', 'key', 'value', 'out'):
        mine = getattr(mixer, name)
        getattr(full, name).kernel[...] = mine.kernel[...] if hasattr(mine, 'kernel') else mine[...][0]
    close(oracle.run(mixer, x), oracle.run(full, x), tolerances.FLOAT32)
    mixer, order = oracle.build('moa', num_experts=4), np.array([2, 0, 3, 1])
    before = oracle.run(mixer, x)
    mixer.router.kernel[...] = mixer.router.kernel[...][:, order]
    mixer.query[...], mixer.out[...] = mixer.query[...][order], mixer.out[...][order]
    close(oracle.run(mixer, x), before, tolerances.FLOAT32)


def test_loss_is_least_at_balance():
    mixer, x = oracle.build('moa', num_experts=4, balance_weight=1.0, z_share=0.0), oracle.inputs()
    run = jax.jit(lambda m: m(jnp.asarray(x), Context()).aux['balance_loss'])
    assert run(mixer) > 1
    mixer.router.kernel[...] = jnp.zeros((16, 4))
    close(run(mixer), 1.0, tolerances.FLOAT32)


def test_expert_product_and_its_gradients():
    rng = np.random.default_rng(0)
    x, kernels = rng.standard_normal((2, 5, 6)), rng.standard_normal((3, 6, 4))
    chosen = np.stack([rng.permutation(3)[:2] for _ in range(10)]).reshape(2, 5, 2)  # some experts may have no token
    chosen[0] = [0, 1]
    dense = lambda x, k: jnp.einsum('bti,btkio->btko', x, k[chosen])
    mine = lambda x, k: routing.expert_product(x, k, jnp.asarray(chosen))
    args = jnp.asarray(x, jnp.float32), jnp.asarray(kernels, jnp.float32)
    close(jax.jit(mine)(*args), dense(*args), tolerances.FLOAT32)
    grad = lambda f: jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1)))(*args)
    for got, want in zip(grad(mine), grad(dense)):
        close(got, want, tolerances.FLOAT32_GRAD)
