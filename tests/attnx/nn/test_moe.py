"""Mixture of experts: equal to a loop over experts, dropless and with a capacity, on one device and on eight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import models, plan, sharding
from attnx.nn import flat_axes, mlp, moe, routing, to_flat
from attnx.spec import Dims
from tests import tolerances
from tests.laws import close, flat

B, T, M = 4, 16, 8
DIMS = Dims(width=M)


def config(**change):
    return mlp.Config(**{'kind': 'moe', 'experts': 4, 'top_k': 2, 'hidden': 12} | change)


@functools.cache
def made(given):
    return jax.jit(lambda: mlp.build(given, DIMS, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope='module')
def x():
    return np.random.default_rng(0).standard_normal((B, T, M)).astype(np.float32)


def loop(module, x, kept=None):
    """Every expert on every token, then the weighted choices."""
    return served(module, x, moe.route(x @ module.router[...], module.config.top_k), kept)


def served(module, x, routes, kept=None):
    outs = []
    for e in range(module.config.experts):
        up = x @ module.up[...][e]
        hidden = module.activation(up) if module.gate is None else module.activation(x @ module.gate[...][e]) * up
        outs.append(hidden @ module.down[...][e])
    chosen = jax.nn.one_hot(routes.experts, module.config.experts) * routes.weights[..., None]
    chosen = chosen if kept is None else chosen * kept[..., None]
    return jnp.einsum('btke,ebtm->btm', chosen, jnp.stack(outs))


def both(function, module, x):
    cotangent = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    y, pull = jax.vjp(function, module, x)
    return y, *pull(cotangent)


CASES = {'swiglu': {}, 'switch': {'top_k': 1, 'expert': 'relu2'}, 'capacity': {'capacity': 8.0}}


@pytest.mark.parametrize('change', CASES.values(), ids=CASES)
def test_equals_a_loop_over_experts(x, change):
    module = made(config(**change))
    found = jax.jit(lambda m, x: both(lambda m, x: m(x)[0], m, x))(module, x)
    expected = jax.jit(lambda m, x: both(loop, m, x))(module, x)
    close(found[0], expected[0], tolerances.FLOAT32)
    close(found[2], expected[2], tolerances.FLOAT32_GRAD)
    for name, g in flat(found[1]).items():
        close(g, flat(expected[1])[name], tolerances.FLOAT32_GRAD)


def test_over_capacity_is_dropped_first_choices_first(x):
    given = config(capacity=0.5)  # 0.5 x 2 x 16 / 4: 4 slots
    module = made(given)
    ids = np.ones((B, T), np.int32)
    ids[:, -3:] = 0  # padding takes no slot
    y, aux = jax.jit(lambda m, x: m(x, segment_ids=jnp.asarray(ids)))(module, x)
    routes = moe.route(jnp.asarray(x) @ module.router[...], 2)
    kept = np.zeros((B, T, 2), bool)
    for b in range(B):
        taken = np.zeros(4, int)
        for choice in range(2):
            for t in range(T - 3):
                e = int(routes.experts[b, t, choice])
                kept[b, t, choice] = taken[e] < 4
                taken[e] += 1
    assert 0 < kept.sum() < B * (T - 3) * 2
    close(y, loop(module, x, kept), tolerances.FLOAT32)
    np.testing.assert_allclose(aux['expert_dropped'], 1 - kept.sum() / (B * (T - 3) * 2), rtol=1e-5)


def test_losses_of_known_cases():
    real = jnp.ones((1, 4), bool)
    even = 50.0 * jnp.eye(4)[None]  # each token is sure of an expert of its own
    found = moe.losses(even, moe.route(even, 1), real)
    np.testing.assert_allclose([found['balance_loss'], found['expert_load']], [1, 1], rtol=1e-5)
    np.testing.assert_allclose(found['router_z_loss'], 50.0**2, rtol=1e-5)
    one = jnp.broadcast_to(50.0 * jnp.eye(4)[0], (1, 4, 4))  # all are sure of the same
    np.testing.assert_allclose(moe.losses(one, moe.route(one, 1), real)['balance_loss'], 4, rtol=1e-5)
    mixed = jnp.concatenate([even[:, :2], one[:, :2]], axis=1)
    half = real.at[:, 2:].set(False)  # padding counts for nothing
    np.testing.assert_allclose(moe.losses(mixed, moe.route(mixed, 1), half)['balance_loss'], 2, rtol=1e-5)
    flat_ = jnp.zeros((1, 4, 4))
    np.testing.assert_allclose(moe.losses(flat_, moe.route(flat_, 2), real)['router_z_loss'], np.log(4) ** 2, rtol=1e-5)


@pytest.mark.quick('fsdp_tp-capacity', 'fsdp_context-dropless')
@pytest.mark.parametrize('capacity', [0.0, 1.0], ids=['dropless', 'capacity'])
@pytest.mark.parametrize(
    ('preset', 'mesh'),
    [('fsdp_tp', {'fsdp': 2, 'expert': 2, 'tensor': 2}), ('fsdp_context', {'expert': 4, 'context': 2})],
    ids=['fsdp_tp', 'fsdp_context'],
)
def test_eight_devices_equal_one(x, preset, mesh, capacity):
    module = made(config(capacity=capacity))
    ids = np.ones((B, T), np.int32)
    ids[:, -3:] = 0

    def run(module, x):
        def call(module, x):
            y, aux = module(sharding.constrain(x, ('batch', 'length', 'embed')), segment_ids=jnp.asarray(ids))
            return y + aux['balance_loss'] + aux['router_z_loss']

        return both(call, module, x)

    expected = jax.jit(run)(module, x)
    mesh = sharding.make_mesh(mesh)
    where = sharding.param_shardings(mesh, preset, flat_axes(module), {k: v.shape for k, v in to_flat(module).items()})
    leaves = [jax.device_put(v, where[k]) for k, v in to_flat(module).items()]
    assert where['up'].spec[0] == 'expert'
    with sharding.use(mesh, preset):
        found = jax.jit(lambda m, x: run(m, x))(jax.tree.unflatten(jax.tree.structure(module), leaves), x)
    close(found[0], expected[0], tolerances.FLOAT32)
    close(found[2], expected[2], tolerances.FLOAT32_GRAD)
    for name, g in flat(found[1]).items():
        close(g, flat(expected[1])[name], tolerances.FLOAT32_GRAD)


def test_any_layer_by_config():
    sparse = {n: {'kind': 'moe', 'experts': 4} for n in (1, 3)}
    given = models.ModelConfig(vocab_size=11, width=M, num_layers=4, pattern=('gqa', 'gqa'), mlp_overrides=sparse)
    assert [layer.mlp and layer.mlp.kind for layer in given.layers()] == [None, 'moe', None, 'moe']
    model = jax.eval_shape(lambda: models.build(given, rngs=nnx.Rngs(0)))
    assert model.body.repeats == (2,)  # one scan: the unit repeats
    aux = jax.eval_shape(lambda m, t: m(t).aux, model, jax.ShapeDtypeStruct((2, 8), jnp.int32))
    assert {'router_z_loss', 'balance_loss'} <= set(aux)
    flops = lambda **change: plan.plan(dataclasses.replace(given, **change), length=8, batch=2, packed=False).train_flops
    idle = flops(mlp_overrides={n: {'kind': 'moe', 'experts': 4, 'top_k': 4} for n in (1, 3)}) - flops()
    assert idle == 6 * 2 * 2 * 3 * M * 24  # two layers, two experts of 24 hidden, that a token does not visit


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'kind': 'mo'}, "unknown mlp kind 'mo'; did you mean 'moe'"),
        ({'top_k': 5}, r'top_k 5 must lie in \[1, experts 4\]'),
        ({'kind': 'swiglu', 'top_k': 3, 'experts': 8}, 'mlp top_k belongs to kind moe'),
        ({'bias': True}, 'experts of kind moe have none'),
        ({'expert': 'swiglo'}, "did you mean 'swiglu'"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_overrides_of_another_kind_begin_with_their_own_defaults():
    given = models.ModelConfig(vocab_size=3, mlp=config(), mlp_overrides={0: {'kind': 'gelu'}, 1: {'experts': 8}})
    assert given.layers()[0].mlp == mlp.Config(kind='gelu')
    assert given.layers()[1].mlp == dataclasses.replace(config(), experts=8)


def test_experts_that_count_once_are_parts_of_one_mlp(x):
    """Union of experts: all of them chosen are the MLP that they were cut from; gates learn all the same."""
    module = made(config(experts=3, top_k=3, gates='select'))
    whole = mlp.build(mlp.Config(hidden=36), DIMS, rngs=nnx.Rngs(0))
    for name in ('up', 'gate', 'down'):
        parts = getattr(module, name)[...]
        joined = parts.reshape(36, M) if name == 'down' else jnp.moveaxis(parts, 0, 1).reshape(M, 36)
        getattr(whole, name).kernel = nnx.Param(joined)
    close(module(x)[0], whole(x)[0], tolerances.FLOAT32)
    grads = jax.grad(lambda m: (m(x)[0] ** 2).sum())(made(config(experts=3, gates='select')))
    assert np.abs(np.asarray(grads.router[...])).max() > 0


def test_experts_take_the_likeliest_tokens(x):
    module, ids = made(config(capacity=0.5, order='probability')), np.ones((B, T), np.int32)  # 4 of a row's tokens
    ids[:, -3:] = 0
    y, _ = jax.jit(lambda m, x: m(x, segment_ids=jnp.asarray(ids)))(module, x)
    routes = moe.route(jnp.asarray(x) @ module.router[...], 2)
    experts, p, kept = np.asarray(routes.experts), np.asarray(routes.probabilities), np.zeros((B, T, 2), bool)
    for b, e in np.ndindex(B, 4):
        who = [t for t in range(T - 3) if e in experts[b, t]]
        for t in sorted(who, key=lambda t: -p[b, t, e])[:4]:
            kept[b, t, list(experts[b, t]).index(e)] = True
    assert 0 < kept.sum() < 2 * B * (T - 3)
    close(y, loop(module, x, kept), tolerances.FLOAT32)


def test_a_row_goes_to_its_experts(x):
    module = mlp.build(config(router='row'), dataclasses.replace(DIMS, max_length=12), rngs=nnx.Rngs(0))
    logits = np.einsum('btm,tme->be', x[:, :12], module.router[...])
    routes = moe.route(jnp.broadcast_to(logits[:, None], (B, T, 4)), 2)
    y, short = (jax.jit(lambda m, x: m(x)[0])(module, a) for a in (x, x[:, :12]))
    close(y, served(module, x, routes), tolerances.FLOAT32)
    close(short, y[:, :12], tolerances.FLOAT32)


def test_experts_that_look_ahead_are_of_encoders():
    fields = {'width': 16, 'num_layers': 2, 'pattern': ('mha',), 'vocab_size': 8}
    ahead = mlp.Config(kind='moe', router='row')
    with pytest.raises(ValueError, match='the experts of layer 0 look ahead'):
        models.ModelConfig(**fields, mlp=ahead).layers()
    encoder = models.ModelConfig(**fields, mlp=ahead, kind='encoder', num_classes=2)
    encoder.check_packing(1)
    with pytest.raises(ValueError, match='keeps 1 documents of a packed row apart'):
        encoder.check_packing(2)


def test_each_task_has_its_router(x):
    given = config(tasks=3, gates='plain', task_weight=0.1)
    module, one = made(given), made(config(gates='plain'))
    task = jnp.asarray(np.random.default_rng(2).integers(0, 3, (B, T)), jnp.int32)
    y, aux = module(x, inputs={'task': task})
    for number in range(3):
        for name in ('up', 'gate', 'down'):
            setattr(one, name, getattr(module, name))
        one.router = nnx.Param(module.router[...][number])
        mine = np.asarray(task == number)
        close(np.asarray(y)[mine], np.asarray(one(x)[0])[mine], tolerances.FLOAT32)
    assert -0.1 * np.log(3) < float(aux['task_loss']) < 0
    with pytest.raises(ValueError, match="no side input 'task'"):
        module(x)


def test_information_of_tasks_and_experts():
    task = jnp.asarray([[0, 1, 2]])
    assert np.isclose(routing.mutual_information(task, jnp.eye(3)[None], 3), np.log(3))
    assert np.isclose(routing.mutual_information(task, jnp.full((1, 3, 4), 0.25), 3), 0, atol=1e-6)


def test_a_model_asks_for_the_task():
    fields = {'vocab_size': 8, 'width': 16, 'num_layers': 2, 'pattern': ('gqa',)}
    given = models.ModelConfig(**fields, mlp_overrides={1: {'kind': 'moe', 'tasks': 2, 'experts': 4}})
    with pytest.raises(ValueError, match=r"layer 1 \(gqa\) needs the side input 'task'"):
        given.check_inputs(())
    given.check_inputs({'task'})


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'gates': 'norm'}, "unknown mlp gates 'norm'"),
        ({'gates': 'plain', 'top_k': 1}, 'plain as they are'),
        ({'task_weight': 0.1}, 'mlp tasks 1 must be'),
        ({'order': 'probability'}, 'where they have a capacity'),
        ({'order': 'position'}, "unknown mlp order 'position'; valid: place, probability"),
        ({'router': 'row', 'tasks': 2}, 'the row is one choice'),
    ],
)
def test_gates_and_tasks_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)
