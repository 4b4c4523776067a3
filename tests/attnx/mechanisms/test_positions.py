"""Identities of mechanisms that are position codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx.mechanisms.softmax import cope
from attnx.nn import relative
from attnx.spec import Context, Dims
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close

B, T, M = 2, 11, 32
DIMS = Dims(width=M, max_length=T, dtype=jnp.float32)
X = np.random.default_rng(0).standard_normal((B, T, M)).astype(np.float32)


def built(name, **fields):
    spec = attnx.get(name)
    return jax.jit(lambda: spec.build(spec.config(num_heads=4, **fields), DIMS, rngs=nnx.Rngs(0)))()


def run(mixer, x=X, **ctx):
    return oracle.run(mixer, x, **ctx)


@pytest.mark.parametrize(('name', 'tables'), [
    ('shaw', ('key_table', 'value_table')), ('music', ('table',)), ('rcmha', ('far', 'far_bias', 'content_bias')),
    ('cope', ('table',)),
])  # fmt: skip
def test_empty_tables_are_attention_without_positions(name, tables):
    mixer = built(name)
    for table in tables:
        setattr(mixer, table, nnx.Param(jnp.zeros_like(getattr(mixer, table)[...])))
    close(run(mixer), run(oracle.like(mixer, built('gqa', num_kv_heads=4, position='none'))), tolerances.FLOAT32)


def test_no_far_projection_is_attention_without_positions():
    mixer = built('transformer_xl')
    mixer.far.kernel = nnx.Param(jnp.zeros_like(mixer.far.kernel[...]))
    close(run(mixer), run(oracle.like(mixer, built('gqa', num_kv_heads=4, position='none'))), tolerances.FLOAT32)


@pytest.mark.parametrize('name', ['shaw', 'music', 'rcmha', 'transformer_xl', 'coca'])
def test_positions_matter_through_differences_only(name):
    """A document anywhere in a row is mixed alike."""
    mixer, ids = built(name), np.zeros((1, T + 5), np.int32)
    alone = run(mixer, X[:1])
    ids[:, 5:] = 1
    moved = np.pad(X[:1], ((0, 0), (5, 0), (0, 0)))
    close(run(mixer, moved, segment_ids=jnp.asarray(ids))[:, 5:], alone, tolerances.FLOAT32)


def test_shaw_equals_its_equation():
    mixer = built('shaw', max_distance=3)
    q, k, v = (np.asarray(a, np.float64) for a in mixer.project(jnp.asarray(X)))
    a, b = (np.asarray(t[...], np.float64) for t in (mixer.key_table, mixer.value_table))
    r = np.clip(np.arange(T)[None] - np.arange(T)[:, None], -3, 3) + 3
    s = (np.einsum('btnh,bsnh->bnts', q, k) + np.einsum('btnh,tsh->bnts', q, a[r])) * 8**-0.5
    s = np.where(np.tril(np.ones((T, T), bool)), s, -np.inf)
    w = np.exp(s - s.max(-1, keepdims=True))
    w /= w.sum(-1, keepdims=True)
    o = np.einsum('bnts,bsnh->btnh', w, v) + np.einsum('bnts,tsh->btnh', w, b[r])
    close(run(mixer), o.reshape(B, T, M) @ np.asarray(mixer.out.kernel[...], np.float64), tolerances.FLOAT32)


def test_lookup_is_the_gather():
    rng = np.random.default_rng(1)
    query, table = rng.standard_normal((B, T, 3, 8)), rng.standard_normal((5, 3, 8))
    where = np.arange(T)[:, None] - np.arange(T)[None]
    inside = (where >= 0) & (where < 5)
    expected = np.einsum('btnh,tsnh->bnts', query, np.where(inside[..., None, None], table[np.where(inside, where, 0)], 0))
    close(relative.lookup(jnp.asarray(query, jnp.float32), jnp.asarray(table, jnp.float32), jnp.asarray(where)[None, None]),
          expected, tolerances.FLOAT32)  # fmt: skip


def test_cope_with_open_gates_counts_tokens():
    rng = np.random.default_rng(2)
    query, table = rng.standard_normal((B, T, 4, 8)).astype(np.float32), rng.standard_normal((T + 2, 8)).astype(np.float32)
    gates = np.broadcast_to(np.tril(np.ones((T, T), np.float32)), (B, 4, T, T))
    count = np.arange(T)[:, None] - np.arange(T)[None] + 1
    expected = np.einsum('btnh,tsh->bnts', query, table[np.maximum(count, 0)])
    found = np.asarray(cope.contextual(jnp.asarray(query), jnp.asarray(table), jnp.asarray(gates)))
    visible = count > 0
    close(found[..., visible], expected[..., visible], tolerances.FLOAT32)


def test_cope_interpolates_between_counts():
    query, table = jnp.ones((1, 1, 1, 1)), jnp.array([[0.0], [10.0], [30.0]])
    gates = jnp.array([[[[0.25, 0.5, 0.75]]]])
    assert np.allclose(cope.contextual(query, table, gates), [[[[20.0, 15.0, 7.5]]]])  # counts 1.5, 1.25, 0.75


def test_coca_scores_peak_at_the_own_position():
    """For fixed contents a key is seen best where it stands, whatever the signs of query and key."""
    mixer = built('coca')
    rng = np.random.default_rng(3)
    radii, lengths = (jnp.asarray(np.abs(rng.standard_normal((1, 1, 4, 4))), jnp.float32) for _ in range(2))
    where = jnp.arange(T)[None]
    key = mixer.turned(jnp.repeat(lengths, T, axis=1), where)
    query = mixer.turned(radii, jnp.array([[5]]))
    s = np.asarray(jnp.einsum('btnh,bsnh->bns', query, key))
    assert (s.argmax(-1) == 5).all()


def test_without_visual_tokens_equal_distance_is_rotary_attention():
    mixer = built('equal_distance')
    other = oracle.like(mixer, built('gqa', num_kv_heads=4))
    text = run(mixer, inputs={'visual': jnp.zeros((B, T), bool)})
    close(text, run(other), tolerances.FLOAT32)
    images = run(mixer, inputs={'visual': jnp.ones((B, T), bool)})
    close(images, run(oracle.like(mixer, built('gqa', num_kv_heads=4, position='none'))), tolerances.FLOAT32)


def test_layout_alone_decides_whom_skimming_sees():
    spec = attnx.get('skim')
    first, second = (spec.build(c, DIMS, rngs=nnx.Rngs(i)) for i, c in enumerate(spec.examples))
    box = jnp.asarray(np.random.default_rng(4).integers(0, 5, (B, T, 4)), jnp.int32)
    published = [first(jnp.asarray(x), Context(inputs={'box': box})).shared['skim'] for x in (X, -X)]
    jax.tree.map(np.testing.assert_array_equal, *published)
    same = Context(inputs={'box': jnp.ones_like(box)})
    shared = first(jnp.asarray(X), same).shared
    y = second(jnp.asarray(X), dataclasses.replace(same, shared=shared)).y
    mean = np.cumsum(np.asarray(second.value(jnp.asarray(X))), axis=1) / np.arange(1, T + 1)[:, None]
    close(y, mean @ np.asarray(second.out.kernel[...]), tolerances.FLOAT32)


def test_a_map_of_the_layout_chooses_keys():
    """Of one key a token reads the value where the map is largest; of as many as there are it attends as ever."""
    spec = attnx.get('skim')
    build = lambda seed, **fields: spec.build(spec.config(num_heads=4, **fields), DIMS, rngs=nnx.Rngs(seed))
    first, box = build(0, num_places=99), jnp.asarray(np.random.default_rng(4).integers(0, 99, (B, T, 4)), jnp.int32)
    ctx = Context(inputs={'box': box})
    ctx = dataclasses.replace(ctx, shared=first(jnp.asarray(X), ctx).shared)
    every = build(1, source='mask', top_k=T)
    plain = oracle.like(every, built('gqa', num_kv_heads=4, position='none'))
    close(oracle.forward(every, X, ctx), run(plain), tolerances.FLOAT32)
    one = oracle.like(every, build(1, source='mask', top_k=1))
    query, key = ctx.shared['skim']
    s = np.asarray(jnp.einsum('btnh,bsnh->bnts', query, key))
    best = np.where(np.tril(np.ones((T, T), bool)), s, -np.inf).argmax(-1)
    value = np.asarray(one.value(jnp.asarray(X))).reshape(B, T, 4, -1)
    read = np.stack([value[b, best[b, n], n] for b in range(B) for n in range(4)]).reshape(B, 4, T, -1)
    read = np.moveaxis(read, 1, 2).reshape(B, T, M)
    close(oracle.forward(one, X, ctx), read @ np.asarray(one.out.kernel[...]), tolerances.FLOAT32)
    state, found = one.init_state(B, T), []
    for part in (slice(0, 5), slice(5, 6), slice(6, T)):
        seen = jnp.where(jnp.arange(T)[:, None, None] < part.stop, key, 0)
        here = dataclasses.replace(ctx, shared={'skim': (query[:, part], seen)})
        y, state = oracle.extend(one, X[:, part], here, state)
        found.append(y)
    close(jnp.concatenate(found, axis=1), oracle.forward(one, X, ctx), tolerances.FLOAT32)
