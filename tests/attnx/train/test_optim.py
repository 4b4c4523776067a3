"""Schedules' values, Muon's routing, weight decay, and equality with optax's own compositions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from attnx.train import optim

AXES = {
    'embed/embedding': ('vocab', 'embed'),
    'stacks/0/layers/0/mixer/query/kernel': ('layers', 'embed', 'heads'),
    'stacks/0/layers/0/mixer/conv/kernel': ('layers', 'conv', 'heads'),
    'stacks/0/layers/0/mixer/bonus': ('layers', 'heads', 'head_dim'),
    'stacks/0/layers/0/norm/scale': ('layers', 'embed'),
    'stacks/1/layers/0/mlp/up': ('layers', 'expert', 'embed', 'mlp'),
    'stacks/2/layers/1/mlp/kernel': ('embed', 'mlp'),
    'head/kernel': ('embed', 'vocab'),
}
SIZES = {'vocab': 16, 'embed': 8, 'heads': 12, 'head_dim': 4, 'layers': 3, 'conv': 4, 'mlp': 10, 'expert': 2}
MATRICES = {
    'stacks/0/layers/0/mixer/query/kernel',
    'stacks/1/layers/0/mlp/up',
    'stacks/2/layers/1/mlp/kernel',
}


def arrays(seed):
    rng = np.random.default_rng(seed)
    shapes = {name: tuple(SIZES[a] for a in axes) for name, axes in AXES.items()}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def rates(num_steps, **settings):
    rate = optim.schedule(optim.Config(learning_rate=2.0, **settings), num_steps)
    return np.asarray(jax.vmap(rate)(jnp.arange(num_steps)))


def test_wsd_values():
    r = rates(100, schedule='wsd', warmup=10, decay=20, floor=0.1)
    np.testing.assert_allclose(r[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(r[10:80], 2.0, rtol=1e-6)
    np.testing.assert_allclose(r[80:], 2.0 * (1 - 0.9 * np.arange(1, 21) / 20), rtol=1e-5)


@pytest.mark.parametrize('shape', optim.SHAPES)
def test_wsdc_reaches_the_floor_and_stays(shape):
    r = rates(100, schedule='wsdc', warmup=5, decay=20, hold=15, floor=0.25, shape=shape)
    np.testing.assert_allclose(r[84:], 0.5, rtol=1e-5)
    np.testing.assert_allclose(r[5:65], 2.0, rtol=1e-6)
    assert r[83] > 0.5
    assert np.all(np.diff(r[65:]) <= 1e-6)
    if shape == 'exponential':
        np.testing.assert_allclose(r[74], 2.0 * 0.25**0.5, rtol=1e-5)
    if shape != 'sqrt':  # its slope is infinite where the decay begins, on purpose
        steepest = {'linear': 0.75 / 20, 'cosine': 0.75 * math.pi / 40, 'exponential': math.log(4) / 20}[shape]
        assert np.abs(np.diff(r[5:])).max() <= 2.0 * steepest * 1.001


def test_wsdc_without_hold_is_wsd_and_without_phases_is_constant():
    np.testing.assert_array_equal(rates(50, schedule='wsdc', warmup=5), rates(50, schedule='wsd', warmup=5))
    np.testing.assert_array_equal(rates(50, schedule='wsd', warmup=0, decay=0), np.full(50, 2.0, np.float32))
    np.testing.assert_array_equal(rates(50, schedule='constant', warmup=0), np.full(50, 2.0, np.float32))


def test_cosine_values():
    r = rates(110, schedule='cosine', warmup=10, floor=0.0)
    np.testing.assert_allclose(r[10:], 1 + np.cos(np.pi * np.arange(1, 101) / 100), atol=1e-6)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'kind': 'moun'}, "unknown kind 'moun'; did you mean 'muon'"),
        ({'schedule': 'wdsc'}, 'did you mean'),
        ({'hold': 5}, 'hold 5 belongs to wsdc'),
        ({'adam_learning_rate': 1e-3}, 'belongs to muon'),
        ({'shape': 'exponential'}, 'floor > 0'),
        ({'schedule': 'cosine', 'decay': 5}, 'belongs to wsd'),
        ({'b2': 1.5}, 'in \\[0, 1\\], was given 1.5'),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        optim.Config(**settings)


def test_refuses_a_schedule_longer_than_the_run():
    with pytest.raises(ValueError, match='warmup 100 \\+ decay 5 \\+ hold 0 steps exceed the run of steps 50'):
        optim.schedule(optim.Config(warmup=100), 50)


def test_routing():
    assert {name for name, axes in AXES.items() if optim.is_matrix(name, axes)} == MATRICES
    exempt = {name for name, axes in AXES.items() if not optim.decays(name, axes, optim.Config().no_decay)}
    assert exempt == {'embed/embedding', 'stacks/0/layers/0/norm/scale'}


def test_muon_orthogonalises_each_matrix_and_leaves_the_rest_to_adamw():
    params, grads = arrays(0), arrays(1)
    config = optim.Config(kind='muon', warmup=0, schedule='constant', clip_norm=None, learning_rate=0.01)
    tx, _ = optim.build(config, 10, AXES)
    updates = jax.jit(tx.update)(grads, tx.init(params), params)[0]
    mask = {n: optim.decays(n, a, config.no_decay) for n, a in AXES.items()}
    adamw = optax.adamw(0.01, 0.9, 0.95, weight_decay=0.1, mask=mask)
    plain = jax.jit(lambda: adamw.update(grads, adamw.init(params), params)[0])()
    single = contrib.muon(0.01, consistent_rms=0.2, weight_decay=0.1)
    one = jax.jit(lambda g, p: single.update(g, single.init(p), p)[0])
    for name in AXES:
        if name not in MATRICES:
            np.testing.assert_allclose(updates[name], plain[name], atol=1e-6, err_msg=name)
            continue
        g, p, u = (x[name].reshape(-1, *x[name].shape[-2:]) for x in (grads, params, updates))
        for i in range(len(g)):
            want = one(g[i], p[i])
            np.testing.assert_allclose(u[i], want, atol=1e-6, err_msg=name)


def test_adam_rate_of_muon():
    params, grads = arrays(0), arrays(1)
    step = lambda **s: optim.build(optim.Config(kind='muon', warmup=0, schedule='constant', **s), 10, AXES)[0]
    update = lambda tx: jax.jit(lambda: tx.update(grads, tx.init(params), params)[0])()
    same, other = update(step(learning_rate=0.1)), update(step(learning_rate=0.1, adam_learning_rate=0.01))
    for name in AXES:
        ratio = 1.0 if name in MATRICES else 0.1
        np.testing.assert_allclose(other[name], same[name] * ratio, rtol=1e-5, atol=1e-9, err_msg=name)


def test_lion_equals_optax():
    params, grads = arrays(0), arrays(1)
    config = optim.Config(kind='lion', b2=0.99, warmup=0, schedule='constant', learning_rate=0.01, clip_norm=0.5)
    tx, _ = optim.build(config, 10, AXES)
    mask = {n: optim.decays(n, a, config.no_decay) for n, a in AXES.items()}
    want = optax.chain(optax.clip_by_global_norm(0.5), optax.lion(0.01, 0.9, 0.99, weight_decay=0.1, mask=mask))
    got = tx.update(grads, tx.init(params), params)[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want.update(grads, want.init(params), params)[0]
    )


@pytest.mark.parametrize('kind', optim.OPTIMIZERS)
def test_state_lies_where_its_parameter_lies(kind):
    from attnx import sharding

    mesh = sharding.make_mesh({'fsdp': 2, 'tensor': 2}, jax.devices()[:4])
    params = arrays(0)
    where = sharding.param_shardings(mesh, 'fsdp_tp', AXES, {n: p.shape for n, p in params.items()})
    tx, _ = optim.build(optim.Config(kind=kind), 1000, AXES)
    abstract = jax.eval_shape(tx.init, params)
    found = optim.state_shardings(tx, params, where, mesh)
    flat = jax.tree_util.tree_flatten_with_path(abstract)[0]
    for (path, leaf), sharding_ in zip(flat, jax.tree.leaves(found)):
        if hasattr(path[-1], 'key'):  # else a count or Muon's coefficients, replicated
            assert sharding_ == where[path[-1].key]
        sharding_.shard_shape(leaf.shape)
