"""Mixture of heads: its gates against a loop, and multi-head attention where all heads are on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.spec import Context
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close

aux = jax.jit(lambda mixer, x, ids: mixer(x, Context(segment_ids=ids)).aux)
SIZES = {'num_heads': 8, 'num_kv_heads': 4, 'shared_heads': 2}


def zero_routers(mixer):
    for f in (mixer.router, mixer.shared_router, mixer.share):
        f.kernel[...] = jnp.zeros_like(f.kernel[...])


@pytest.mark.parametrize('router', ['linear', 'norm'])
def test_is_grouped_query_attention_with_every_head_on(router):
    mixer, x = oracle.build('moh', **SIZES, top_k=6, router=router), oracle.inputs()
    if router == 'linear':
        zero_routers(mixer)
    full = oracle.build('gqa', num_heads=8, num_kv_heads=4)
    for name in ('query', 'key', 'value', 'out'):
        getattr(full, name).kernel[...] = getattr(mixer, name).kernel[...]
    close(oracle.run(mixer, x), oracle.run(full, x), tolerances.FLOAT32)


def test_gates_are_their_definition():
    mixer, x = oracle.build('moh', **SIZES, top_k=3), oracle.inputs()
    gates, _, chosen = (np.asarray(a) for a in mixer.gates(jnp.asarray(x), None))
    for b, t in np.ndindex(*x.shape[:2]):
        logits = [x[b, t].astype(np.float64) @ oracle.kernel(f) for f in (mixer.shared_router, mixer.router, mixer.share)]
        shared, routed, share = (np.exp(z) / np.exp(z).sum() for z in logits)
        kept = np.where(np.argsort(np.argsort(-routed)) < 3, routed, 0)
        want = [2 * share[0] * 2 * shared, 2 * share[1] * 3 * kept / kept.sum()]
        close(gates[b, t], np.concatenate(want), tolerances.FLOAT32)
        close(gates[b, t].sum(), 2 * (2 * share[0] + 3 * share[1]), tolerances.FLOAT32)
    assert (chosen.sum(-1) == 3).all()


def test_balance_loss_is_least_at_uniform_use_and_ignores_padding():
    mixer, x = oracle.build('moh', **SIZES, top_k=2, balance_weight=1.0), oracle.inputs()
    ids = np.ones(x.shape[:2], np.int32)
    uneven = float(aux(mixer, x, ids)['balance_loss'])
    ids[:, 8:] = 0
    moved = x.copy()
    moved[:, 8:] = 50.0
    assert float(aux(mixer, x, ids)['balance_loss']) == float(aux(mixer, moved, ids)['balance_loss'])
    zero_routers(mixer)  # p uniform: R sum p m = K, whichever heads the ties go to
    close(aux(mixer, x, ids)['balance_loss'], 2.0, tolerances.FLOAT32)
    assert uneven > 2.0


def test_norms_choose_heads_and_pass_a_gradient():
    mixer, x = oracle.build('moh', **SIZES, top_k=2, router='norm'), oracle.inputs()
    query = jnp.asarray(oracle.heads(x, mixer.query, 8), jnp.float32)
    gates = np.asarray(mixer.gates(jnp.asarray(x), query)[0])
    norm = np.linalg.norm(np.asarray(query), axis=-1)[:, :, 2:]
    rank = np.argsort(np.argsort(-norm, axis=-1), axis=-1)
    close(gates, np.concatenate([np.ones((*norm.shape[:2], 2)), rank < 2], axis=-1), tolerances.FLOAT32)
    slope = jax.grad(lambda q: jnp.sum(mixer.gates(jnp.asarray(x), q)[0] * jnp.arange(8.0)))(query)
    assert np.abs(np.asarray(slope)[:, :, 2:]).max() > 0


@pytest.mark.parametrize(('fields', 'error'), [({'top_k': 7}, 'top_k 7'), ({'router': 'nrom'}, "did you mean 'norm'")])
def test_bad_config(fields, error):
    with pytest.raises(ValueError, match=error):
        oracle.build('moh', **{**SIZES, **fields})
