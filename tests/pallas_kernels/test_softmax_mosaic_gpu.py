"""The Hopper softmax attention kernel: metadata and tile logic by brute force, lowering for CUDA, and the grid on a GPU."""

import dataclasses
import functools
import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnx.ops.softmax_attention import reference, xla
from pallas_kernels import blocks, common, tile_eval
from pallas_kernels import elementwise as ew
from pallas_kernels.dropout import Dropout
from pallas_kernels.softmax_attention import check, diagonal, functions, mosaic_gpu, schedule, tables, tiles, tune
from tests.pallas_kernels import emulation


@st.composite
def classes(draw):
    shape = tuple(draw(st.integers(1, n)) for n in (2, 2, 9, 9))
    flat = draw(st.lists(st.integers(0, 2), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    return np.array(flat, np.int8).reshape(shape)


@settings(max_examples=30, deadline=None)
@given(classes())
def test_forward_lists(c):
    lists = schedule.forward_lists(c)
    assert lists.dtype == np.int32
    for at in np.ndindex(c.shape[:3]):
        count, partial, *tiles = lists[at]
        row = c[at]
        assert count == (row != 0).sum() and partial == (row == blocks.PARTIAL).sum()
        assert list(tiles[:partial]) == list(np.flatnonzero(row == blocks.PARTIAL))
        assert list(tiles[partial:count]) == list(np.flatnonzero(row == blocks.FULL))


@settings(max_examples=30, deadline=None)
@given(classes(), st.integers(1, 3), st.integers(1, 2))
def test_packed_classes(c, rows, columns):
    found, names = schedule.packed(c, rows, columns)
    assert found.dtype == np.int8 and names.dtype == np.int32
    for *lead, q, k in np.ndindex(found.shape):
        parts = np.zeros((rows, columns), int)
        own = c[(*lead, slice(q * rows, (q + 1) * rows), slice(k * columns, (k + 1) * columns))]
        parts[: own.shape[0], : own.shape[1]] = own
        want = parts[0, 0] if (parts == parts[0, 0]).all() else blocks.PARTIAL
        assert found[(*lead, q, k)] == want
        name = names[(*lead, q, k)]
        assert name >> 2 * parts.size == k
        assert [name >> 2 * n & 3 for n in range(parts.size)] == list(parts.ravel())
    np.testing.assert_array_equal(jax.jit(schedule.packed, static_argnums=(1, 2))(c, rows, columns)[1], names)


@settings(max_examples=30, deadline=None)
@given(classes(), st.integers(1, 10))
def test_schedule_ends_and_is_ordered(c, together):
    owners = schedule.divided(c)
    ends_and_is_ordered(c, owners, together, *schedule.schedule(c, owners, together))


def ends_and_is_ordered(c, owners, together, lists, ranks, totals):
    """Every visit once; ranks count up per query tile; blocks that wait for their rank finish with `together` resident."""
    np.testing.assert_array_equal(totals, (c != 0).sum(-1))
    nq, nk = c.shape[2:]
    for at in np.ndindex(c.shape[:2]):
        todo, visited = [], [[] for _ in range(nk)]
        for i in range(len(owners)):
            count, tile, part, *entries = lists[(*at, i)]
            assert (tile, part) == (owners[i, 0], owners[i, 3])
            visits = [(e // 2, e % 2, ranks[(*at, i, e // 2)]) for e in entries[:count]]
            assert all(p == (c[at][x, tile] == blocks.PARTIAL) for x, p, _ in visits)
            visited[tile] += [x for x, _, _ in visits]
            todo.append(visits)
        for tile, found in enumerate(visited):
            assert sorted(found) == list(np.flatnonzero(c[at][:, tile]))
        done = [0] * nq
        while any(todo):
            moved = False
            for i in [i for i in range(len(owners)) if todo[i]][:together]:
                x, _, rank = todo[i][0]
                if done[x] == rank:
                    done[x], moved = done[x] + 1, True
                    todo[i].pop(0)
            assert moved, 'the blocks wait for each other'
        assert done == list((c[at] != 0).sum(-1))


@pytest.mark.parametrize('mask', [check.causal, check.prefix_lm(500)])
@pytest.mark.parametrize('processors', [13, 17, 30])
def test_blocks_in_turn_end(mask, processors, monkeypatch):
    """Launched in order, as many at a time as there are multiprocessors, however fast each: every contribution has its turn."""
    monkeypatch.setattr(schedule, 'processors', lambda: processors)
    c = blocks.classify(ew.as_mask(mask), 1, 1, 2048, 2048, 64, 128)
    owners = schedule.divided(c)
    lists, ranks, totals = schedule.schedule(c, owners)
    heads, n = 9, len(owners)
    tail = schedule.in_turn(lists, heads, 4)
    assert tail.shape == (4, n, 32)
    order = [(h, x) for h in range(heads - 4) for x in range(n)] + [(h, x) for x in range(n) for h in range(heads - 4, heads)]
    rng = np.random.default_rng(processors)
    done, running = np.zeros((heads, 32), int), {}
    while order or running:
        while order and len(running) < processors:
            running[order.pop(0)] = 0
        able = []
        for (h, x), j in running.items():
            tile = lists[0, 0, x, 3 + j] // 2
            rank = ranks[0, 0, x, tile] if h < heads - 4 else tail[h - heads + 4, x, tile]
            able += [(h, x)] if done[h, tile] == rank else []
        assert able, 'the blocks wait for each other'
        h, x = able[rng.integers(len(able))]
        done[h, lists[0, 0, x, 3 + running[h, x]] // 2] += 1
        running[h, x] += 1
        if running[h, x] == lists[0, 0, x, 0]:
            del running[h, x]
    np.testing.assert_array_equal(done, np.broadcast_to(totals[0, 0], done.shape))
    assert schedule.in_turn(lists, heads, 0) is None and schedule.in_turn(jnp.asarray(lists), heads, 4) is None


def test_tiles_that_many_see_are_shared():
    """Global tokens before a window: blocks of about equal length, each key tile once or in parts that join."""
    T = 4096
    c = blocks.classify(ew.as_mask(check.global_window(512, 64)), 1, 1, T, T, 64, 128)
    owners = schedule.divided(c)
    lists = schedule.schedule(c, owners)[0][0, 0]
    assert c.shape[3] < len(owners) and set(owners[owners[:, 3] >= 0, 0]) == {0}
    assert lists[:, 0].max() <= 2 * lists[:, 0].mean() < (c[0, 0, :, 0] != 0).sum()
    assert len(schedule.divided(blocks.classify(ew.as_mask(check.causal), 1, 1, T, T, 64, 128))) == T // 128
    rng = np.random.default_rng(0)
    parts = rng.standard_normal((2, 128 * (owners[:, 3].max() + 1), 3, 8)).astype(np.float32)
    x = rng.standard_normal((2, 200, 3, 8)).astype(np.float32)
    joined = schedule.joined(jnp.asarray(x), jnp.asarray(parts), owners)
    np.testing.assert_array_equal(joined[:, 128:], x[:, 128:])
    np.testing.assert_allclose(joined[:, :128], parts.reshape(2, -1, 128, 3, 8).sum(1), rtol=1e-5, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 20),
)
def test_agenda_holds_each_item_once(B, N, nq, together, processors):
    cost = np.arange(B * N * nq).reshape(B, N, nq)[:, :1] % 7 + 0.5
    holds_each_once(*schedule.agenda(B, N, nq, cost, together, processors), B * N * nq, processors)


def holds_each_once(bounds, order, items, processors):
    assert sorted(order) == list(range(items))
    assert bounds[0] == 0 and bounds[-1] == len(order) and (np.diff(bounds) >= 0).all()
    assert len(bounds) == min(processors, items) + 1


def shares(agenda, cost):
    """The cost of each block's items."""
    bounds, order = agenda
    work = np.concatenate([[0], np.cumsum(cost.ravel()[order])])
    return np.diff(work[np.asarray(bounds)])


def test_agenda_is_balanced():
    cost = np.broadcast_to(np.arange(2, 66), (2, 16, 64))
    work = shares(schedule.agenda(2, 16, 64, cost[:1, :1], 4, 132), cost)
    assert work.max() < 1.02 * work.mean()


@settings(max_examples=8, deadline=None)
@given(classes(), st.integers(1, 4))
def test_tables_by_data(c, together):
    """Made by kernels, they are as those that are made while tracing."""
    owners = np.array([(tile, 0, c.shape[2], -1) for tile in range(c.shape[3])])
    names = schedule.packed(c, 1, 1)[1]
    with emulation.emulated(pytest.MonkeyPatch(), common, tables):
        lists, (by_key, ranks, totals) = tables.forward_lists(jnp.asarray(c)), tables.backward(jnp.asarray(c), together)
        named, _, _ = tables.forward(jnp.asarray(c), jnp.asarray(names), 2, 2, 3)
    same(lists, schedule.forward_lists(c), 2)
    same(named, schedule.forward_lists(c, names), 2)
    want = schedule.schedule(c, owners, together)
    same(by_key, want[0], 3)
    np.testing.assert_array_equal(np.where(c.swapaxes(-1, -2), ranks, 0), want[1])
    np.testing.assert_array_equal(totals, want[2])


def same(lists, want, first):
    """Equal as far as the count reaches."""
    valid = np.arange(want.shape[-1]) < first + want[..., :1]
    np.testing.assert_array_equal(np.where(valid, lists, 0), want)


@pytest.mark.parametrize('by_data', [False, True])
def test_longest_first(by_data):
    """Every item once, heads in groups, and under a causal mask all multiprocessors end together."""
    cost = np.arange(2, 130, 2)[None, None]
    order = schedule.longest_first(jnp.asarray(cost) if by_data else cost, 2, 8, 2)
    assert isinstance(order, np.ndarray) != by_data and order.dtype == np.int32
    assert sorted(np.asarray(order)) == list(range(1024))
    for group in np.reshape(order, (8, 128)):
        assert group.max() - group.min() == 127 and (np.diff(cost.ravel()[group % 64]) <= 0).all()
    free = [0] * 132
    for item in np.asarray(order):
        heapq.heapreplace(free, free[0] + int(cost.ravel()[item % 64]) + 2)
    assert max(free) < 1.01 * np.mean(free)


@pytest.mark.parametrize('kind', ['random', 'documents', 'random by head'])
def test_agenda_by_data_is_balanced(kind):
    """No block has more than its share and one item; at any time they work on a few heads."""
    B, N, nq, P = 2, 4, 16, 13
    rng = np.random.default_rng(0)
    length = np.arange(nq) % 12 + 1 if kind == 'documents' else rng.integers(1, 14, (B, N if 'head' in kind else 1, nq))
    length = np.broadcast_to(length, (B, N if 'head' in kind else 1, nq))
    c = np.where(np.arange(16) < length[..., None], np.int8(blocks.FULL), np.int8(blocks.EMPTY))
    with emulation.emulated(pytest.MonkeyPatch(), common, tables):
        _, bounds, order = tables.forward(jnp.asarray(c), None, B, N, P)
    holds_each_once(bounds, order, B * N * nq, P)
    work = shares((bounds, order), np.broadcast_to(length, (B, N, nq)))
    assert work.max() <= work.mean() + 13
    for n in range(8):
        heads = {int(order[min(start + n, order.size - 1)]) // nq for start in bounds[:-1]}
        assert len(heads) <= 3


@pytest.mark.parametrize('T, S', [(5, 9), (100, 64), (130, 257)])
@pytest.mark.parametrize('transposed', [False, True])
def test_strips_are_padded(T, S, transposed):
    Tp, Sp = -(-T // 128) * 128, -(-S // 128) * 128
    strip = np.random.default_rng(0).standard_normal((2, T + S - 1), np.float32)
    padded = np.asarray(functions.prepare(ew.Operand(strip, 'hd'), T, S, Tp, Sp, transposed))
    assert padded.shape == (2, Tp + Sp - 1)
    q, k = np.ogrid[:T, :S]
    found = padded[:, q - k + Sp - 1 if transposed else k - q + Tp - 1]
    np.testing.assert_array_equal(found, strip[:, k - q + T - 1])


@pytest.mark.parametrize('T, S', [(5, 9), (300, 200), (130, 400)])
def test_diagonals_are_summed(T, S):
    nq, nk = -(-T // diagonal.QUERIES), -(-S // diagonal.KEYS)
    ds = np.random.default_rng(0).standard_normal((2, nq * 128, nk * 64), np.float32)
    ds[:, T:], ds[:, :, S:] = 0, 0
    tiles = np.zeros((2, 2 * (nq - 1) + nk, 128, 64), np.float32)
    for q in range(nq):
        for k in range(nk):
            tiles[:, k - 2 * q + 2 * (nq - 1)] += ds[:, q * 128 : (q + 1) * 128, k * 64 : (k + 1) * 64]
    want = np.zeros((2, T + S - 1))
    for q in range(T):
        want[:, T - 1 - q : T - 1 - q + S] += ds[:, q, :S]
    np.testing.assert_allclose(diagonal.strip(jnp.asarray(tiles), T, S), want, atol=1e-4)


def test_diagonal_lists():
    c = np.random.default_rng(0).integers(0, 3, (2, 2, 3, 7)).astype(np.int8)
    todo = diagonal.lists(c)
    seen = 0
    for head in range(2):
        for x in range(todo.shape[1]):
            count, *entries = todo[head, x]
            for e in entries[:count]:
                b, q = divmod(e // 2, 3)
                kind = c[b, head, q, 2 * q + x - 4]
                assert kind and (kind == blocks.PARTIAL) == e % 2
            seen += count
    assert seen == (c != 0).sum()


SCORES = {
    'softcap': lambda s, q, k, a: 5 * jnp.tanh(s / 5),
    'alibi': lambda s, q, k, a: s - a * (q + 7 - k).astype(jnp.float32),
    'alibi ahead': lambda s, q, k, a: s + a * (k - q).astype(s.dtype),
    'gelu': lambda s, q, k, a: jax.nn.gelu(s),
    'twice used': lambda s, q, k, a: s * jax.nn.sigmoid(s) + jnp.abs(s),
    'where': lambda s, q, k, a: jnp.where((q - k) % 3 == 0, s * 2, s - jnp.log1p(abs(a))),
    'cond': lambda s, q, k, a: jax.lax.cond(q > k, lambda: s * a, lambda: s / 3),
    'powers': lambda s, q, k, a: s**3 - s**-1 + jnp.power(s, 2.0) + jnp.floor(s) + jnp.expm1(a),
    'scaled': lambda s, q, k, a: -2.0 * (s * 0.5) / 4.0,
}


CHEAP = 'alibi', 'alibi ahead', 'scaled', 'cond'  # without the special function unit


def test_positions_far_out_keep_their_precision():
    """A slope times positions of 10^6 rounds as their difference does."""
    q, k = jnp.arange(64, dtype=jnp.int32) + 1_000_000, jnp.arange(128, dtype=jnp.int32) + 1_000_000
    s, a = jnp.zeros((64, 128), jnp.float32), jnp.float32(0.7)
    operands = [(s, jnp.float32, 'rc'), (q, jnp.int32, 'r'), (k, jnp.int32, 'c'), (a, jnp.float32, '')]
    (out,) = tile_eval.tile_eval(SCORES['alibi ahead'], operands, (64, 128), lambda x: x, (1, 2), center=k[0])
    np.testing.assert_allclose(out.to('rc'), 0.7 * (k - q[:, None]), rtol=1e-5, atol=1e-5)


def test_exponentials_by_polynomial():
    x = jnp.concatenate([jnp.linspace(-126, 0, 5000), jnp.array([-jnp.inf, -1e30, -200.0, jnp.nan])])[None]
    y = common.exp2(x, x.shape[1])[0]
    np.testing.assert_allclose(y[:5000], jnp.exp2(x[0, :5000]), rtol=9e-5)
    assert (y[5000:5003] == 0).all() and jnp.isnan(y[5003])
    np.testing.assert_array_equal(common.exp2(x, 8)[0, 8:], jnp.exp2(x[0, 8:]))


@pytest.mark.parametrize('name', SCORES)
def test_tile_eval_agrees(name):
    """Values and derivatives on tiles, rows and columns equal the function applied to each element."""
    rng = np.random.default_rng(0)
    M, N = 6, 10
    s = jnp.asarray(rng.standard_normal((M, N)) * 2, jnp.float32)
    q, k = jnp.arange(M, dtype=jnp.int32) + 3, jnp.arange(N, dtype=jnp.int32)
    a = jnp.float32(0.3)
    f = SCORES[name]
    both = lambda s, q, k, a: jax.jvp(lambda s: f(s, q, k, a), (s,), (jnp.float32(1),))
    operands = [(s, jnp.float32, 'rc'), (lambda: q, jnp.int32, 'r'), (lambda: k, jnp.int32, 'c'), (a, jnp.float32, '')]
    each = jax.vmap(jax.vmap(both, (0, None, 0, None)), (0, 0, None, None))(s, q, k, a)
    for center in (None, jnp.int32(3)):
        outs = tile_eval.tile_eval(both, operands, (M, N), lambda x: x, (1, 2), center=center)
        for x, y in zip(outs, each):
            np.testing.assert_allclose(x.to('rc'), y, rtol=2e-5, atol=2e-5)
    held = outs[0].value
    assert isinstance(held, tile_eval.Shifted) == (name in ('alibi', 'alibi ahead'))
    if isinstance(held, tile_eval.Shifted):  # what a kernel adds elsewhere
        np.testing.assert_allclose(held('r') + held.parts()['r'][:, None], each[0], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(held('c') + held.parts()['c'], each[0], rtol=2e-5, atol=2e-5)
    assert tile_eval.special(jax.make_jaxpr(both)(s[0, 0], q[0], k[0], a)) == (name not in CHEAP)
    assert tile_eval.refusal(jax.make_jaxpr(both)(*(jax.ShapeDtypeStruct((), x.dtype) for x in (s, q, k, a)))) is None


TABLE = jnp.arange(100)


def arrays(H=64, dtype=jnp.bfloat16, T=100, S=100, N=4, K=2):
    draw = lambda *shape: jnp.ones(shape, dtype)
    return draw(2, T, N, H), draw(2, S, K, H), draw(2, S, K, H)


@pytest.mark.parametrize(
    'message, call',
    [
        ('cast', lambda: (arrays(dtype=jnp.float32), {})),
        ('differ in dtype', lambda: ((*arrays()[:2], arrays(dtype=jnp.float16)[2]), {})),
        ('head widths up to 256', lambda: (arrays(H=264), {})),
        ("primitive 'lgamma'", lambda: (arrays(), {'score': lambda s, i: jax.lax.lgamma(s)})),
        ('captures an array', lambda: (arrays(), {'mask': lambda i: TABLE[i.k] < 3})),
    ],
)
def test_refusals(message, call):
    args, options = call()
    reason = mosaic_gpu.unsupported(*args, **options)
    assert message in reason
    with pytest.raises(ValueError, match='softmax_attention on mosaic_gpu'):
        mosaic_gpu.softmax_attention(*args, **options)


@pytest.mark.parametrize(
    'form, name',
    [
        (xla, 'poison causal H=64'),
        pytest.param(xla, 'poison padding', marks=pytest.mark.slow),
        (reference, 'poison causal H=64'),
    ],
)
def test_gate_expects_what_the_op_promises(form, name):
    """What the gate demands of the kernel about NaN and Inf holds for the op's other forms, so that none disagrees."""
    (case,) = (c for c in check.grid() if c.name == name)
    case = dataclasses.replace(case, H=16, Hv=16)
    assert check.verdict(check.errors(case, form, repeat=False)) is None


OPTIONS = {
    'plain': {},
    'causal': {'mask': check.causal},
    'documents': {'mask': ew.as_mask(check.causal) & check.segments(np.ones((2, 100), np.int32))},
    'softcap, sinks': {'score': check.softcap(30.0), 'sinks': np.zeros(4, np.float32)},
    'documents, softcap, sinks': {
        'mask': ew.as_mask(check.causal) & check.segments(np.ones((2, 100), np.int32)),
        'score': check.softcap(30.0),
        'sinks': np.zeros(4, np.float32),
    },
    'strip': {'score': check.added(np.zeros((4, 199), np.float32), 'hd'), 'dropout': Dropout(0.1, 3)},
    'bias': {'bias': np.zeros((1, 4, 100, 100), np.float32), 'scale': -0.3, 'return_lse': True},
}


# Every option at one width; the rest of their pairs is slow.
FAST = ('causal', 128), ('documents, softcap, sinks', 64), ('strip', 64), ('bias', 64)
PAIRS = [*((name, 64) for name in OPTIONS), *((name, H) for name in ('causal', 'strip') for H in (128, 40, 256))]


@pytest.mark.parametrize(
    ('name', 'H'), [p if p in FAST else pytest.param(*p, marks=pytest.mark.slow) for p in PAIRS]
)
def test_lowers_for_cuda(name, H):
    options = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in OPTIONS[name].items()}
    lse = options.pop('return_lse', False)

    def loss(q, k, v, score):
        extra = {} if score is None else {'score': score}
        out = mosaic_gpu.softmax_attention(q, k, v, **{**options, **extra}, return_lse=lse)
        return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(out))

    allowed = [jax.export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')]
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3) if name == 'strip' else (0, 1, 2)))
    exported = jax.export.export(step, platforms=['cuda'], disabled_checks=allowed)(*arrays(H=H), options.get('score'))
    kernels = (2 if H <= 128 else 4) + (name == 'strip')
    kernels += 3 * name.startswith('documents')  # that make the tables of blocks
    assert exported.mlir_module().count('@mosaic_gpu_v2') == kernels


@pytest.mark.quick('64')
@pytest.mark.parametrize('H', [64, 128])
def test_dq_is_narrowed_in_the_kernel(H):
    """With heads enough for a tail: two kernels, and no float32 dq is converted behind them."""
    inputs = arrays(H=H, T=1024, S=1024, N=48, K=48)
    loss = lambda q, k, v: mosaic_gpu.softmax_attention(q, k, v, mask=check.causal).astype(jnp.float32).sum()
    allowed = [jax.export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')]
    exported = jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=['cuda'], disabled_checks=allowed)(*inputs)
    module, narrowed = exported.mlir_module(), f'(tensor<2x1024x48x{H}xf32>) -> tensor<2x1024x48x{H}xbf16>'
    assert module.count('@mosaic_gpu_v2') == 2 and module.count(narrowed) == 1  # the cotangent of the loss's own conversion


def test_lowers_under_vmap():
    """One kernel a pass, with a larger batch, and no loop over members."""
    loss = lambda q, k, v: mosaic_gpu.softmax_attention(q, k, v, mask=check.causal).astype(jnp.float32).sum()
    stacked = [jnp.stack([x] * 3) for x in arrays()]
    allowed = [jax.export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')]
    step = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))
    exported = jax.export.export(step, platforms=['cuda'], disabled_checks=allowed)(*stacked)
    assert [x.shape for x in exported.out_avals] == [x.shape for x in stacked]
    module = exported.mlir_module()
    assert module.count('@mosaic_gpu_v2') == 2 and 'stablehlo.while' not in module
    assert module.count('optimization_barrier') >= 2  # see `_over_batches`


@pytest.mark.parametrize('B', [1, 2])
@pytest.mark.parametrize('shared', ['lists', 'seed row', 'dense strip', ''])
def test_vmap_is_a_larger_batch(B, shared):
    """Each member sees its own rows, lists, operands, seed and batch numbers, also under two `vmap`s."""
    rng = np.random.default_rng(0)
    T = S = 4
    number = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def spec_of(row, strip, dense, seed):
        mask = ew.Mask(lambda i, x: x > 0, (ew.Operand(row, 'bq'),))
        score = check.added(strip, 'd') >> check.added(dense, 'bhqk')
        return functions.make_spec(mask, score, Dropout(0.5, seed), T, S, False)

    def kernel(*args, spec):  # all that a kernel reads, by the letters that it reads it by
        x, lists, operands = args[0], args[1], args[2]
        at = jnp.arange(x.shape[0])
        total = x + lists[at if lists.shape[0] > 1 else 0 * at].sum(1) + at % (spec.batch or x.shape[0])
        for o, value in zip(spec.operands, operands):
            rows = 'b' in o.index and o.array.shape[o.index.index('b')] > 1
            assert value.shape[0] == x.shape[0] or not rows
            total += value[at].reshape(len(at), -1).sum(1) if rows else value.sum()
        return (total,)

    def call(x, lists, row, strip, dense, seed):
        spec = spec_of(row, strip, dense, seed)
        operands = [functions.prepare(o, T, S, T, S, True) for o in spec.operands]
        return mosaic_gpu._over_batches(kernel, spec)((x,), (lists,), operands)[0]

    names = 'x', 'lists', 'row', 'strip', 'dense', 'seed'
    shapes = (B,), (1, 3), (B, T), (T + S - 1,), (1, 2, T, S)
    axes = [None if name in shared.split() else 0 for name in names]
    args = [number(*(n for n in (3, 2) if axis == 0), *shape) for shape, axis in zip(shapes, axes)]
    seeds = jnp.arange(6, dtype=jnp.uint32).reshape(3, 2)
    args.append(seeds if axes[-1] == 0 else jnp.uint32(9))
    found = jax.vmap(jax.vmap(call, axes), axes)(*args)
    for i, j in np.ndindex(3, 2):
        one = call(*(x[i, j] if axis == 0 else x for x, axis in zip(args, axes)))
        np.testing.assert_allclose(found[i, j], one, rtol=1e-5)


def test_tuned_tiles_are_pinned_and_replayed(tmp_path, monkeypatch):
    path = tmp_path / 'tiles.json'
    call = tiles.Call(2, 64, 64, 2, 2, 128, 128)
    choice = tiles.Forward(2, 64, 3, (240, 24), turns=False)
    monkeypatch.setattr(tune, 'tune', lambda calls: {one.name: choice for one in calls})
    try:
        tune.replay_or_tune(path, lambda: [call])
        assert tiles.forward(call) == choice and tiles.forward(call._replace(H=64, Hv=64)).consumers == 3
        assert tiles.forward(call._replace(special=True)) != choice
        monkeypatch.setattr(tune, 'tune', None)  # the file is replayed, not made again
        tiles.pin(None)
        tune.replay_or_tune(path, None)
        assert tiles.forward(call) == choice and tiles.pinned() == {call.name: choice}
    finally:
        tiles.pin(None)
    with pytest.raises(ValueError, match="tiles: 'Forward H=64 Hv=64'"):
        tiles.from_json('{"Forward H=64 Hv=64": {"consumers": 3}}')


def test_calls_are_asked_for_as_they_are_traced():
    q, k, v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(H=40))
    score = check.softcap(30.0)
    with tiles.asked() as found:
        jax.eval_shape(functools.partial(mosaic_gpu.softmax_attention, mask=check.causal), q, k, v)
        jax.eval_shape(functools.partial(mosaic_gpu.softmax_attention, score=score), q, k, v)
    assert found == [
        tiles.Call(2, 100, 100, 4, 2, 64, 64, masked=True, special=False),
        tiles.Call(2, 100, 100, 4, 2, 64, 64, masked=False, special=True),
    ]


@pytest.mark.slow
def test_tuner_times_the_largest_call_of_each_class(monkeypatch):
    """By a timer that likes 64 keys; every candidate lowers to a program of its own."""
    made = []

    class Lowered:
        def __init__(self, call):
            made.append(call)

        def compile(self):
            return made[-1]

    class Jitted:
        def __init__(self, f):
            self.f = f

        def lower(self, *args):
            with tiles.asked() as found:
                jax.eval_shape(self.f, *args)
            return Lowered((found[-1], tiles.forward(found[-1])))

    monkeypatch.setattr(tune.jax, 'jit', Jitted)
    small, large = tiles.Call(1, 64, 64, 1, 1, 64, 64), tiles.Call(1, 128, 128, 2, 1, 64, 64)
    special = tiles.Call(1, 64, 64, 1, 1, 128, 64, masked=False, special=True)
    best = tune.tune([large, small, special], timer=lambda program, args: program[1].keys)
    assert {call for call, _ in made} == {large, special}
    assert set(best) == {large.name, special.name} and {x.keys for x in best.values()} == {64}
    assert len({choice for call, choice in made if call == large}) == len(tune.candidates(large)) > 8


def test_gate_tells_right_from_wrong():
    """The gate passes the oracle in 16 bits and fails it with a key hidden."""
    case = check.Case('causal', T=33, H=16, mask=lambda c: ew.as_mask(check.causal), sinks=True)

    def sixteen(q, k, v, *, mask, score, sinks, dropout, return_lse):
        return check.oracle(q, k, v, mask=mask, score=score, sinks=sinks, dropout=dropout, precision=q.dtype)

    def wrong(q, k, v, *, mask, **options):
        return sixteen(q, k, v, mask=mask & ew.as_mask(lambda i: i.k != 5), **options)

    assert check.verdict(check.errors(case, sixteen)) is None
    assert check.verdict(check.errors(case, wrong))


def test_oracle_gradient_in_sixteen_bits():
    """The hand-written backward of the rounded oracle is the derivative: in float32 it equals the plain one."""
    case = check.Case('x', B=1, T=20, S=24, H=8, mask=lambda c: ew.as_mask(check.causal), sinks=True, dtype=jnp.float32)
    rounded = functools.partial(check.oracle, precision=jnp.float32)

    def attention(q, k, v, *, return_lse, **options):
        return rounded(q, k, v, **options)

    assert all(ours < 1e-5 for ours, _, _ in check.errors(case, attention).values())


@pytest.mark.gpu
@pytest.mark.parametrize('case', check.grid(), ids=lambda c: c.name)
def test_grid(case):
    reason = check.verdict(check.errors(case, mosaic_gpu.softmax_attention))
    assert reason is None, reason
