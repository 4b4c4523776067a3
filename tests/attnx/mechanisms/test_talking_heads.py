"""Talking heads: multi-head attention at identity mixtures, its definition, and blocks of rows."""

import jax
import jax.numpy as jnp
import numpy as np

from attnx.mechanisms.softmax.talking_heads import talking_heads
from attnx.ops import masks, scores
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close

RNG = np.random.default_rng(0)


def inputs(length=11, key_heads=2, heads=3, value_heads=4, width=5):
    draw = lambda *shape: RNG.standard_normal(shape).astype(np.float32)
    q, k = draw(2, length, key_heads, width), draw(2, length, key_heads, width)
    return q, k, draw(2, length, value_heads, width), draw(key_heads, heads), draw(heads, value_heads)


def test_begins_as_multi_head_attention():
    options = {'num_heads': 4, 'sinks': True, 'scores': (('alibi',), ('softcap', 3.0)), 'masks': (('window', 5),)}
    mixer, full, x = oracle.build('talking_heads', **options), oracle.build('mha', **options), oracle.inputs()
    for name in ('query', 'key', 'value', 'out'):
        getattr(full, name).kernel[...] = getattr(mixer, name).kernel[...]
    close(oracle.run(mixer, x), oracle.run(full, x), tolerances.FLOAT32)


def test_is_its_definition_and_masked_pairs_stay_zero():
    q, k, v, before, after = inputs()
    mask, visible = masks.causal(), oracle.causal(11)
    j = np.einsum('btkh,bskh->bkts', q, k).astype(np.float64) * 0.4
    logits = np.where(visible, np.einsum('bkts,kn->bnts', j, before), -np.inf)
    w = np.exp(logits - logits.max(-1, keepdims=True))
    u = np.einsum('bnts,nv->bvts', w / w.sum(-1, keepdims=True), after)
    assert (u[:, :, ~visible] == 0).all()
    close(u.sum(-1), np.broadcast_to(after.sum(0)[:, None], u.shape[:3]), tolerances.FLOAT32)
    got = jax.jit(lambda *a: talking_heads(*a, mask=mask, score=None, scale=0.4))(q, k, v, before, after)
    close(got, np.einsum('bvts,bsvh->btvh', u, v), tolerances.FLOAT32)


def test_blocks_of_rows_change_nothing():
    arrays = inputs(length=37)
    ids = np.repeat([[1, 2, 0]], [10, 20, 7], axis=1).repeat(2, axis=0).astype(np.int32)
    mask = masks.causal() & masks.segments(jnp.asarray(ids))
    strip = RNG.standard_normal((3, 73)).astype(np.float32)

    def loss(arrays, strip, rows):
        out = talking_heads(*arrays, mask=mask, score=scores.relative(strip), scale=0.4, rows=rows)
        return jnp.sum(jnp.sin(out)), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    (grads, out), (expected, want) = run(arrays, strip, 8), run(arrays, strip, 64)
    close(out, want, tolerances.FLOAT32)
    for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected)):
        close(got, wanted, tolerances.FLOAT32_GRAD)
