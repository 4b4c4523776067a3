"""The laws of `attnx.spec.LAWS`, over every mechanism of the catalogue. A new file gets them all without writing one."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import axes, catalog, generated, sharding
from attnx import config as config_lib
from attnx.nn import flat_axes, stack, to_flat
from attnx.spec import LAWS, Dims
from tests import effective, tolerances
from tests.laws import BATCH, LENGTH, WIDTH, case, close, flat, positions

NAMES = list(catalog.scan())
# Mechanisms that serve causal and bidirectional models run these laws in both forms, the others in the causal one.
BOTH_FORMS = ('shapes', 'finite', 'causal', 'packing', 'padding', 'learning')


def law_of(test: str) -> str:
    law = re.match(r'test_([a-z0-9]+)', test).group(1)
    assert law in LAWS, f'{law} is not in attnx.spec.LAWS'
    return law


def pytest_generate_tests(metafunc):
    both = law_of(metafunc.function.__name__) in BOTH_FORMS
    second = lambda n: [f'{n}-bidirectional'] if both and catalog.entry(n).causal == 'both' else []
    names = [form for n in NAMES for form in (n, *second(n))]
    metafunc.parametrize('member', names, indirect=True, scope='module')  # all laws of one, then of the next


@pytest.fixture(scope='module')
def member(request, let_go):
    """The name of the mechanism whose laws run; what they compiled is let go with it, or some mechanisms later."""
    yield request.param
    let_go()


@pytest.fixture
def c(request, member):
    """The mechanism's case; skips a law that its SPEC excuses with a reason."""
    law, limits = law_of(request.node.name), catalog.entry(member.partition('-')[0]).limits
    if unknown := set(limits) - set(LAWS):
        pytest.fail(f'{member}: limits name unknown laws {unknown}')
    if law in limits:
        pytest.skip(limits[law])
    return case(member)


def test_shapes(c):
    for dtype in (jnp.float32, jnp.bfloat16):
        module = c.with_dtype(dtype)
        y = jax.eval_shape(lambda m, x: c.plain(m, x, c.ones).y, module, jnp.asarray(c.x, dtype))
        assert (y.shape, y.dtype) == ((BATCH, LENGTH, WIDTH), dtype)


def test_finite(c):
    ids = c.ones.copy()
    ids[0] = 0  # nothing to see in this row
    y = np.asarray(c.forward(c.module, c.x, ids))
    assert np.isfinite(y).all()
    grads, dx = c.gradient(c.module, c.x, ids, np.ones_like(y))
    assert np.isfinite(dx).all()
    for name, g in flat(grads).items():
        assert np.isfinite(g).all(), name


def known(c, ids):
    """Parameters and x -> y, of documents that are known when it is traced."""
    placed = np.asarray(positions(ids))
    return lambda module, x: module(x, c.context(x, jnp.asarray(ids), placed)).y


def documents(c):
    """Segment ids: two documents and padding where the mechanism packs."""
    ids = c.ones.copy()
    if not {'packing', 'padding'} & set(c.entry.limits):
        ids[:, 7:], ids[:, -3:] = 2, 0
    return ids


def test_jit(c):
    """What is known when a program is traced changes nothing: `sharding`'s knows the documents, its gradient's too.

    `bfloat16` knows them and has no gradient's rules, `decode` neither, in float32; op by op: below.
    """
    test_sharding(c)


@pytest.mark.slow
def test_jit_alone(c):
    ids = documents(c)
    for run in (known(c, ids), jax.jit(known(c, ids))):
        close(c.forward(c.module, c.x, ids), run(c.module, jnp.asarray(c.x)), tolerances.FLOAT32)


def test_remat(c):
    """Where the law `context` holds, its program is the recomputed one, on eight devices."""
    if 'context' not in c.entry.limits:
        return test_context(c)
    cotangent = np.random.default_rng(1).standard_normal(c.x.shape).astype(np.float32)
    layer = jax.checkpoint(lambda module, x: c.plain(module, x, c.ones).y)
    loss = lambda module, x: jnp.sum(layer(module, x) * cotangent)
    grads, dx = jax.jit(jax.grad(loss, argnums=(0, 1)))(c.module, c.x)
    expected, dx_expected = c.gradient(c.module, c.x, c.ones, cotangent)
    close(dx, dx_expected, tolerances.FLOAT32_GRAD)
    for name, g in flat(expected).items():
        close(flat(grads)[name], g, tolerances.FLOAT32_GRAD)


def test_deterministic(c):
    ones = np.ones_like(c.x)
    for run in (lambda: c.forward(c.module, c.x, c.ones), lambda: c.gradient(c.module, c.x, c.ones, ones)):
        first, second = jax.tree.leaves(run()), jax.tree.leaves(run())
        assert all(np.array_equal(a, b) for a, b in zip(first, second))


def test_causal(c):
    for t in (0, LENGTH // 2, LENGTH - 2):
        cotangent = np.zeros_like(c.x)
        cotangent[:, t] = 1.0
        _, dx = c.gradient(c.module, c.x, c.ones, cotangent)
        future = np.abs(np.asarray(dx)[:, t + 1 :]).max()
        if c.dims.causal:
            assert future == 0, f'output {t} has a gradient {future} to later tokens'
        elif t == LENGTH // 2:
            assert future > 0 or 'memory' in c.spec.needs, 'declared bidirectional, but reads no later token'
    if c.dims.causal:
        t = LENGTH // 2
        moved = c.x.copy()
        moved[:, t + 1 :] = 100 * np.random.default_rng(2).standard_normal(moved[:, t + 1 :].shape)
        before, after = (np.asarray(c.forward(c.module, x, c.ones))[:, : t + 1] for x in (c.x, moved))
        close(after, before, tolerances.FLOAT32)


def test_packing(c):
    first, second = 7, 11
    ids = np.zeros_like(c.ones)
    ids[:, :first], ids[:, first : first + second] = 1, 2
    packed = np.asarray(c.forward(c.module, c.x, ids))
    for start, length in ((0, first), (first, second)):
        alone, alone_ids = np.zeros_like(c.x), np.zeros_like(ids)
        alone[:, :length], alone_ids[:, :length] = c.x[:, start : start + length], 1
        expected = np.asarray(c.forward(c.module, alone, alone_ids))[:, :length]
        close(packed[:, start : start + length], expected, tolerances.FLOAT32)
    cotangent = np.zeros_like(c.x)
    cotangent[:, first : first + second] = 1.0
    _, dx = c.gradient(c.module, c.x, ids, cotangent)
    dx = np.asarray(dx)
    assert np.abs(dx[:, :first]).max() == 0, 'a document has a gradient to another'
    assert np.abs(dx[:, first + second :]).max() == 0, 'a document has a gradient to padding'


def test_padding(c):
    real = LENGTH - 5
    left, right = np.zeros_like(c.x), np.zeros_like(c.x)
    left_ids, right_ids = np.zeros_like(c.ones), np.zeros_like(c.ones)
    right[:, :real], right_ids[:, :real] = c.x[:, :real], 1
    left[:, -real:], left_ids[:, -real:] = c.x[:, :real], 1
    left[:, :-real], right[:, real:] = 7.0, -3.0  # padding holds anything
    expected = np.asarray(c.forward(c.module, right, right_ids))[:, :real]
    close(np.asarray(c.forward(c.module, left, left_ids))[:, -real:], expected, tolerances.FLOAT32)


def test_batch(c):
    moved = c.x.copy()
    moved[0] = -moved[0] * 3
    before, after = (np.asarray(c.forward(c.module, x, c.ones)) for x in (c.x, moved))
    assert np.array_equal(before[1], after[1])
    assert not np.array_equal(before[0], after[0])


@pytest.mark.parametrize('documents', [False, True], ids=['one', 'packed'])
def test_decode(c, documents):
    assert c.spec.state != 'none', 'keeps no state: say why in limits'
    ids = c.ones.copy()
    if documents:  # a document ends inside the prefill, another inside the steps
        ids[0, 3:], ids[:, 9:], ids[1, 16:] = 2, 3, 4
    placed = np.asarray(positions(ids))
    expected = np.asarray(c.forward(c.module, c.x, ids))
    for split in ([7] + [1] * (LENGTH - 7), [7, 7, 7, 1, 1, 1]):
        state, found, at = c.initial(), [], 0
        for n in split:
            part = slice(at, at + n)
            given = (ids[:, part], placed[:, part]) if documents else (None, None)
            y, state = c.extend(c.module, c.x[:, part], *given, state)
            found.append(np.asarray(y))
            at += n
        close(np.concatenate(found, axis=1), expected, tolerances.FLOAT32)


def test_state(c):
    assert c.spec.state != 'none', 'keeps no state: say why in limits'
    state = c.initial()
    for n in (1, 5):
        _, new = jax.eval_shape(c.extend, c.module, c.x[:, :n], c.ones[:, :n], None, state)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), new, state)
        assert all(jax.tree.leaves(same)), 'a step changes shapes or dtypes of the state'
    assert all(leaf.shape[0] == BATCH for leaf in jax.tree.leaves(state) if leaf.ndim), 'batch comes first in states'


def test_axes(c):
    shapes = {k: v.shape for k, v in to_flat(c.module).items()}
    assert flat_axes(c.module).keys() == shapes.keys(), 'a parameter without axes: make it with nn.param'
    for name, names in flat_axes(c.module).items():
        axes.check(names, shapes[name])
    build = lambda key: c.spec.build_example(c.dims, rngs=nnx.Rngs(key))
    stacked = jax.eval_shape(lambda: stack(build, jax.random.split(jax.random.key(0), 3)))
    for name, names in flat_axes(stacked).items():
        assert names == ('layers', *flat_axes(c.module)[name])
        assert to_flat(stacked)[name].shape == (3, *shapes[name])


def spread(c, preset, mesh, how=''):
    """Outputs and gradients of packed rows on eight devices, against one device.

    how: 'remat', recomputed in the backward pass; 'known', of documents that are known when it is traced.
    """
    mesh = sharding.make_mesh(mesh)
    copies = max(mesh.shape['data'] * mesh.shape['fsdp'] // BATCH, 1)
    x = np.tile(c.x, (copies, 1, 1))
    ids = np.tile(c.ones, (copies, 1))
    ids[:, 7:], ids[:, -3:] = 2, 0  # the second document lies on several devices, the third is padding
    cotangent = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    y, grads, dx = c.kept((preset, how), lambda: run_spread(c, preset, mesh, x, ids, cotangent, how))
    assert len(y.sharding.device_set) == 8
    expected = np.asarray(c.forward(c.module, x[:BATCH], ids[:BATCH]))
    close(y, np.tile(expected, (copies, 1, 1)), tolerances.FLOAT32)
    total, parts = None, []
    for row in range(0, len(x), BATCH):
        rows = slice(row, row + BATCH)
        one, dx_one = c.gradient(c.module, x[rows], ids[rows], cotangent[rows])
        parts.append(np.asarray(dx_one))
        total = flat(one) if total is None else {k: total[k] + v for k, v in flat(one).items()}
    close(dx, np.concatenate(parts), tolerances.FLOAT32_GRAD)
    for name, g in flat(grads).items():
        close(g, total[name], tolerances.FLOAT32_GRAD)


def run_spread(c, preset, mesh, x, ids, cotangent, how):
    shapes = {k: v.shape for k, v in to_flat(c.module).items()}
    where = sharding.param_shardings(mesh, preset, flat_axes(c.module), shapes)
    leaves = [jax.device_put(v, where[k]) for k, v in flat(c.module).items()]  # from numpy: else parts are cut by programs
    module = jax.tree.unflatten(jax.tree.structure(c.module), leaves)
    of_known = known(c, ids)
    layer = lambda module, x, ids: of_known(module, x) if how == 'known' else c.plain(module, x, ids).y
    layer = jax.checkpoint(layer) if how == 'remat' else layer

    def run(module, x, ids):
        x = sharding.constrain(x, ('batch', 'length', 'embed'))
        y, pull = jax.vjp(lambda module, x: layer(module, x, ids), module, x)
        return y, *pull(jnp.asarray(cotangent, y.dtype))

    with sharding.use(mesh, preset):
        return jax.jit(run)(module, x, ids)


def test_sharding(c):
    spread(c, 'fsdp_tp', {'data': 2, 'fsdp': 2, 'tensor': 2}, 'known')


def test_context(c):
    spread(c, 'fsdp_context', {'data': 2, 'context': 4}, 'remat')


@pytest.mark.slow
@pytest.mark.parametrize(('preset', 'mesh'), [('ddp', {}), ('fsdp', {'fsdp': 8})], ids=['ddp', 'fsdp'])
def test_sharding_alone(c, preset, mesh):
    spread(c, preset, mesh)


@pytest.mark.slow
def test_context_alone(c):
    spread(c, 'context', {'context': 8})


def test_bfloat16(c):
    x = jnp.asarray(c.x, jnp.bfloat16)  # rounded in both, as whole numbers among side inputs are made from it
    ids = documents(c)
    low = jax.jit(known(c, ids))(c.with_dtype(jnp.bfloat16), x)
    close(np.asarray(low, np.float32), c.forward(c.module, np.asarray(x, np.float32), ids), tolerances.BFLOAT16)


def test_config(c):
    for config in c.spec.examples:
        assert config_lib.build(type(config), config_lib.to_dict(config)) == config
        assert config_lib.build(type(config), {}) == type(config)(), 'every field has a default'
        hash(config)
        with pytest.raises(ValueError, match='unknown key') as error:
            config_lib.build(type(config), {'num_heds': 2})
        assert all(f.name in str(error.value) for f in dataclasses.fields(config))
        for cls in type(config).__mro__:
            if dataclasses.is_dataclass(cls):
                for field in cls.__annotations__:
                    assert re.search(rf'^    {field}\b.*#', inspect.getsource(cls), re.M), f'{field} has no comment'


def test_effective(c):
    fields = effective.ignored(c.name)
    assert not fields, f'accepted and without effect: {fields}; refuse them, or say in Spec.variants when they matter'


def test_golden(c):
    if not c.entry.path.is_relative_to(catalog.PACKAGE):
        pytest.skip('not of this repository')
    path = catalog.PACKAGE.parent.parent / 'tests' / 'golden' / f'{c.name}.txt'
    renew = f'python -m attnx.catalog --write renews {path.name}; read its diff'
    assert path.is_file() and path.read_text() == generated.golden(c.name), renew


def test_scale(c):
    dims = Dims(width=2048, causal=c.dims.causal, num_layers=24, max_length=4096, dtype=jnp.bfloat16)
    built = jax.eval_shape(lambda: c.spec.build(c.spec.config(), dims, rngs=nnx.Rngs(0)))
    assert sum(v.size for v in to_flat(built).values()) >= 0
    assert c.spec.flops(c.spec.config(), dims, 4096) >= 0
    jax.eval_shape(lambda: built.init_state(1, 4096, dims.dtype))  # of a mixer without arrays, as plans have it


def test_learning(c):
    target = np.random.default_rng(3).standard_normal(c.x.shape).astype(np.float32)
    error = lambda module: np.asarray(c.forward(module, c.x, c.ones)) - target
    before = np.square(error(c.module)).mean()
    grads, _ = c.gradient(c.module, c.x, c.ones, 2 * error(c.module) / target.size)
    norms = {k: float(np.abs(g).max()) for k, g in flat(grads).items()}
    dead = [k for k, n in norms.items() if n == 0]
    assert not dead, f'parameters without gradient: {dead}'
    if not norms:
        return
    total = float(np.sqrt(sum(np.square(g).sum() for g in flat(grads).values())))
    moved = jax.tree.map(lambda p, g: np.asarray(p) - np.float32(1e-2 / total) * np.asarray(g), c.module, grads)
    assert np.square(error(moved)).mean() < before


def test_documented(c):
    doc = c.entry.path.read_text().split('"""')[1]
    for section in ('Equation', 'Paper', 'Differs', 'Cost'):
        assert re.search(rf'^{section}:', doc, re.M), f'the docstring has no {section}: section'
    assert re.search('fused|XLA', c.entry.sections['Cost']), 'Cost does not say what computes it: a fused op, or XLA'
    assert c.entry.paper
    assert c.entry.family in catalog.FAMILIES
    assert c.entry.summary.endswith('.')
