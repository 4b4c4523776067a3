"""The TPU kernels on a CPU: interpreted against the oracle with poison and race detection, and compiled by libtpu."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnx import dispatch
from attnx.ops import delta_rule, gated_linear, masks, paged_attention, scores, softmax_attention
from pallas_kernels import aot_tpu, blocks, libtpu
from pallas_kernels.delta_rule import mosaic_tpu as delta
from pallas_kernels.dropout import Dropout
from pallas_kernels.gated_linear import mosaic_tpu as linear
from pallas_kernels.softmax_attention import mosaic_tpu, mosaic_tpu_tiles, paged_tpu
from tests.attnx.ops import recurrences
from tests.tolerances import FLOAT32, FLOAT32_GRAD

# Scratch memory starts as NaN, reads out of bounds and races raise; two cores share the parallel dimensions.
STRICT = pltpu.InterpretParams(
    uninitialized_memory='nan', out_of_bounds_reads='raise', detect_races=True, num_cores_or_threads=2
)


@pytest.fixture
def interpreted():
    try:
        with pltpu.force_tpu_interpret_mode(STRICT):
            yield
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def close(got, want, tolerance):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        if not jnp.issubdtype(y.dtype, jnp.floating):
            continue
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        finite = np.isfinite(y)
        top = np.abs(y[finite]).max() if finite.any() else 1
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * top, err_msg=jax.tree_util.keystr(path))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def attention(T, S, N=2, K=1, H=32, Hv=16):
    return draw(1, T, N, H, seed=1), draw(1, S, K, H, seed=2), draw(1, S, K, Hv, seed=3), draw(1, T, N, Hv, seed=4)


def gradients(attend, **options):
    """Jitted (q, k, v, w) -> (out, lse), and gradients by q, k, v, the score's arrays and the sinks; of rows with a weight."""
    floating = {name: options.pop(name) for name in ('score', 'sinks') if name in options}

    def loss(q, k, v, floating, w):
        out, lse = attend(q, k, v, **floating, **options)
        seen = jnp.where((w != 0).any(-1).swapaxes(1, 2), lse, 0)
        return (out * w).sum() + jnp.where(jnp.isfinite(seen), jnp.sin(seen), 0).sum(), (out, lse)

    run = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True, allow_int=True))
    return lambda q, k, v, w: run(q, k, v, floating, w)[::-1]


def oracle(**options):
    return gradients(functools.partial(softmax_attention, impl='reference', return_lse=True), **options)


def check(arrays, sides, **options):
    got = gradients(functools.partial(mosaic_tpu.attend, sides=sides), **options)(*arrays)
    want = oracle(**options)(*arrays)
    close(got[0], want[0], FLOAT32)
    close(got[1], want[1], FLOAT32_GRAD)


@functools.cache
def by_rows():
    """The kernel's gradients and the oracle's of a call with all that scales by rows; 100 to 149 is a hidden document."""
    options = {
        'mask': masks.causal() & masks.window(90) & masks.segments(np.repeat([[1, 2, 0, 3]], 50, 1)),
        'score': scores.alibi(jnp.array([0.1, 0.3])) >> scores.bias(draw(1, 2, 200, 1)) >> scores.softcap(3.0),
        'sinks': jnp.array([0.5, -1.0]),
        'dropout': Dropout(0.2, 7),
    }
    return gradients(functools.partial(mosaic_tpu.attend, sides=(128, 256, 128)), **options), oracle(**options)


def test_attention_with_everything_that_scales_by_rows(interpreted):
    """Documents, window, row and head operands, softcap, sinks, dropout, grouped heads, ragged lengths, keys in parts."""
    got, want = (run(*attention(200, 200)) for run in by_rows())
    close(got[0], want[0], FLOAT32)
    close(got[1], want[1], FLOAT32_GRAD)


def test_attention_keeps_poison_in_its_place(interpreted):
    """NaN and Inf where nothing looks change nothing, in values too; where a row looks, that row is NaN."""
    ours, reference = by_rows()
    q, k, v, w = attention(200, 200)
    bad = q.at[:, 3].set(jnp.nan), k.at[:, 110].set(jnp.inf), v.at[:, 120].set(jnp.nan).at[:, 190].set(jnp.nan)
    poisoned = np.isin(np.arange(200), [3, *range(190, 200)])
    w = w.at[:, poisoned].set(0)  # the poisoned rows have no cotangent
    ((out, lse), grads), (want, want_grads) = ours(*bad, w), reference(q, k, v, w)
    assert np.isnan(out[:, poisoned]).all() and np.isnan(lse[:, :, poisoned]).all()
    close((out[:, ~poisoned], lse[:, :, ~poisoned]), (want[0][:, ~poisoned], want[1][:, :, ~poisoned]), FLOAT32)
    close(grads, want_grads, FLOAT32_GRAD)


def test_attention_with_strip_and_empty_tiles(interpreted):
    """A relative bias, more keys than queries, a static window that leaves tiles empty, two spans of queries."""
    strip = scores.relative(draw(2, 200 + 300 - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mosaic_tpu, 'RESIDENT', 1)
        check(attention(200, 300, K=2), (128, 128, 128), mask=masks.causal() & masks.window(60), score=strip, scale=-0.2)


def test_attention_with_dense_operands(interpreted):
    """A dense mask, a dense bias that two heads share, one by keys."""
    visible = np.random.default_rng(0).random((1, 1, 130, 200)) < 0.5
    visible[..., 5, :] = False
    score = scores.bias(draw(1, 1, 130, 200)) >> scores.bias(draw(1, 2, 1, 200))
    check(attention(130, 200), (256, 256, 128), mask=masks.array(visible), score=score)


@pytest.mark.parametrize('traced', [False, True])
def test_tables_hold_every_live_tile_once_in_order(traced):
    classes = np.random.default_rng(0).integers(0, 3, (2, 3, 4, 5)).astype(np.int8)
    classes[1, 2, 1] = blocks.EMPTY
    table, steps = (jax.jit(mosaic_tpu_tiles.words) if traced else mosaic_tpu_tiles.words)(classes)
    for b, h in np.ndindex(2, 3):
        steps_seen = [mosaic_tpu_tiles.Step(jnp.asarray(table).reshape(-1), (2, 3), b, h, t) for t in range(int(steps))]
        found = [(int(s.row), int(s.column), int(s.kind)) for s in steps_seen]
        assert [x for x in found if x[2]] == [(i, j, classes[b, h, i, j]) for i, j in np.argwhere(classes[b, h])]
        firsts, lasts = ([int(s.row) for s in steps_seen if getattr(s, end)] for end in ('first', 'last'))
        assert firsts == lasts == [0, 1, 2, 3]  # each row begins and ends once, empty ones too


def test_tables_too_large_are_united():
    classes = np.zeros((4, 8, 90, 90), np.int8)
    classes[2, 3, 5, 6], classes[:, :, 7, 7] = blocks.FULL, blocks.FULL
    fit = mosaic_tpu_tiles.fitting(classes)
    assert fit.shape == (4, 1, 90, 90) and fit[2, 0, 5, 6] == blocks.PARTIAL and (fit[:, 0, 7, 7] == blocks.FULL).all()
    assert mosaic_tpu_tiles.fitting(np.zeros((40, 8, 90, 90), np.int8)).shape == (1, 1, 90, 90)


def test_the_tile_follows_the_mask():
    """A short window takes smaller tiles than the whole triangle; a mask that depends on data is not looked into."""
    x = jnp.zeros((1, 8192, 1, 128), jnp.bfloat16)
    tile = lambda mask: mosaic_tpu._tiling(mosaic_tpu._Static(1.0, None), x, x, mask)[0]
    assert (tile(masks.causal()).queries, tile(masks.causal()).keys) == (1024, 1024)
    assert tile(masks.causal() & masks.window(128)).keys < 1024
    assert tile(masks.segments(jnp.ones((1, 8192), jnp.int32))).keys == 512


@pytest.mark.parametrize(
    'name, decay, nats, chunk',
    [
        ('gated_linear', 'none', 1, 16),
        ('gated_linear', 'head', 1, 32),
        ('gated_linear', 'token', 80, 16),
        ('gated_linear', 'channel', 5, 16),
        ('delta_rule', 'token', 1, 16),
        ('delta_rule', 'channel', 80, 16),
    ],
)
def test_recurrences(interpreted, name, decay, nats, chunk):
    """Outputs, states and gradients; resets, a first state, grouped heads, a ragged end, decays that erase."""
    N, K = (8, 4) if decay == 'head' else (2, 1)
    arrays = recurrences.inputs(name, B=1, T=40, N=N, K=K, H=16, Hv=8, decay=decay, nats=nats, dtype=np.float32)
    if decay == 'token':
        arrays['log_decay'] = arrays['log_decay'].at[0, 7].set(-jnp.inf)
    ids = recurrences.segments(0, B=1, T=40) if decay in ('token', 'channel') else None
    got = recurrence(name, chunk)(arrays, ids, jnp.arange(40))
    want = recurrences.gradients(name, 'reference', scale=0.5)(arrays, ids)
    close(got[0], want[0], FLOAT32)
    close(got[1], want[1], FLOAT32_GRAD)


@functools.cache
def recurrence(name, chunk):
    op = {'gated_linear': linear.gated_linear, 'delta_rule': delta.delta_rule}[name]
    return recurrences.over_rows(functools.partial(op, scale=0.5, chunk=chunk))


@pytest.mark.parametrize(('name', 'decay'), [('gated_linear', 'channel'), ('delta_rule', 'token')])
def test_documents_keep_their_poison(interpreted, name, decay):
    recurrences.assert_documents_keep_their_poison(name, decay, recurrence(name, 16), FLOAT32_GRAD)


@pytest.mark.parametrize('T', [1, 3])
def test_paged_attention(interpreted, monkeypatch, T):
    """Ragged lengths down to 0, pages in any order, NaN in unused slots and pages, window, softcap, sinks, grouped heads."""
    monkeypatch.setattr(paged_tpu, 'KEYS', 32)  # two pages a step, three steps
    r = np.random.default_rng(0)
    B, N, K, H, size, count = 4, 4, 2, 16, 16, 6
    lengths = np.array([0, 5, 40, 96], np.int32)
    pages = r.permutation(B * count).reshape(B, count).astype(np.int32)
    k, v = (np.full((K, B * count, size, H), np.nan, np.float32) for _ in range(2))
    dense = r.normal(size=(2, B, count * size, K, H)).astype(np.float32)
    for b, t in np.argwhere(np.arange(count * size) < lengths[:, None]):
        k[:, pages[b, t // size], t % size], v[:, pages[b, t // size], t % size] = dense[0, b, t], dense[1, b, t]
    q, sinks = draw(B, T, N, H), jnp.array([0.5, -1.0, 0.0, 2.0])
    queries = lengths[:, None] - T + np.arange(T)
    mask = masks.causal(queries, np.tile(np.arange(count * size), (B, 1)))
    mask = mask & masks.window(50, queries, np.tile(np.arange(count * size), (B, 1)))
    options = {'mask': mask, 'score': scores.softcap(2.0), 'sinks': sinks, 'impl': 'reference', 'return_lse': True}
    want = jax.jit(functools.partial(softmax_attention, **options))(q, *dense)
    for impl in ('mosaic_tpu', 'xla', 'reference'):
        run = functools.partial(paged_attention, window=50, softcap=2.0, sinks=sinks, impl=impl)
        close(jax.jit(run)(q, k, v, pages, lengths), want, FLOAT32)


@pytest.mark.parametrize('name', ['gated_linear', 'delta_rule'])
def test_a_recurrent_step(interpreted, name):
    """One token, from a state to the next."""
    arrays = recurrences.inputs(name, T=1, N=4, K=4, H=16, Hv=8, dtype=np.float32)
    op = {'gated_linear': linear.gated_linear, 'delta_rule': delta.delta_rule}[name]
    close(jax.jit(lambda arrays: op(**arrays))(arrays), recurrences.forward(name, 'reference')(arrays, None), FLOAT32)


def test_highest_takes_six_passes():
    # Interpreted, three passes and six are the same.
    program = lambda **options: str(jax.make_jaxpr(functools.partial(delta.delta_rule, **options))(*BF16, beta))
    beta = jax.ShapeDtypeStruct((1, 64, 2), jnp.float32)
    assert 'Precision.HIGH,' in program() and 'Precision.HIGH,' not in program(precision='highest')


BF16 = [jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)] * 3
LONG = [jax.ShapeDtypeStruct((1, 2**21, 1, 8), jnp.bfloat16)] * 3


@pytest.mark.parametrize(
    'message, reason',
    [
        ('bfloat16 and float32, given float16', lambda: mosaic_tpu.unsupported(*[jnp.zeros((1, 8, 1, 8), jnp.float16)] * 3)),
        ('up to 256, given 512', lambda: mosaic_tpu.unsupported(*[jnp.zeros((1, 8, 1, 512), jnp.bfloat16)] * 3)),
        ("primitive 'lgamma'", lambda: mosaic_tpu.unsupported(*BF16, score=lambda s, i: jax.lax.lgamma(s))),
        ('exceeds the scalar memory', lambda: mosaic_tpu.unsupported(*LONG)),
        ('given chunk=256', lambda: linear.unsupported(*BF16, chunk=256)),
        ('must all be bfloat16 or float32', lambda: delta.unsupported(*[jnp.zeros((1, 2, 1, 8), jnp.float16)] * 3, None)),
    ],
)  # fmt: skip
def test_refusals(message, reason):
    assert message in reason()


@pytest.mark.parametrize(
    ('message', 'changes'),
    [
        ('expected query', {'lengths': np.zeros((3,), np.int32)}),
        ('2 key heads do not divide 3 query heads', {'query': jnp.zeros((2, 1, 3, 8))}),
        ('must be integers', {'pages': jnp.zeros((2, 3))}),
        ('window must be at least 1, given 0', {'window': 0}),
        ("mosaic_tpu' refuses this call: a page holds a multiple of 16", {'impl': 'mosaic_tpu'}),
    ],
)
def test_paged_attention_refuses(message, changes):
    given = {'query': jnp.zeros((2, 1, 4, 8)), 'key_pages': jnp.zeros((2, 9, 8, 8)), 'value_pages': jnp.zeros((2, 9, 8, 4))}
    given |= {'pages': np.zeros((2, 3), np.int32), 'lengths': np.ones((2,), np.int32)}
    with pytest.raises(ValueError, match=message):
        paged_attention(**{**given, **changes})


def test_a_mesh_is_refused():
    """The compiler would have to cut the kernel: refused, so that `auto` takes the XLA form."""
    mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert 'does not partition a TPU kernel' in mosaic_tpu.unsupported(*BF16)
        assert 'does not partition a TPU kernel' in linear.unsupported(*BF16)
    assert mosaic_tpu.unsupported(*BF16) is None


def test_auto_on_tpu_takes_the_kernels():
    with dispatch.target('tpu'), dispatch.record() as calls:
        jax.eval_shape(lambda q: softmax_attention(q, q, q, mask=masks.causal()), BF16[0])
    assert calls[0].chosen('tpu').impl == 'mosaic_tpu' and calls[0].chosen('cpu').impl == 'xla'


# Compiled by libtpu, in a child process: it ends the process on some errors.


def compiled(*arguments):
    if reason := libtpu.missing():
        pytest.skip(reason)
    command = [sys.executable, '-m', 'pallas_kernels.aot_tpu', 'compile', *arguments]
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    results = [json.loads(line) for line in out.stdout.splitlines() if line.startswith('{')]
    assert results and out.returncode == 0, f'{results}\n{out.stderr[-2000:]}'
    for result in results:
        assert result['good'], result
    return results


def test_compiles():
    """One case a chip; each holds two kernels and no array of T x S."""
    results = compiled('--in-turn', 'small tiles', 'gated_linear token', 'delta_rule token')
    assert [result['topology'] for result in results] == [*aot_tpu.TOPOLOGIES]


@pytest.mark.slow
@pytest.mark.parametrize('topology', aot_tpu.TOPOLOGIES)
def test_everything_compiles(topology):
    compiled(f'--topology={topology}', '--slow')


FORWARD = {
    'softmax_attention': lambda x: ((x, x[:, :, :1], x[:, :, 1:]), {'mask': masks.causal(), 'score': scores.softcap(2.0)}),
    'gated_linear': lambda x: ((x, x, x, -(x[..., 0] ** 2)), {'scale': 0.5}),
    'delta_rule': lambda x: ((x, x / 9, x, jnp.abs(x[..., 0]) / 9), {'scale': 0.5}),
}


@pytest.mark.parametrize('name', FORWARD)
def test_forward_mode_beside_the_kernel(interpreted, name):
    """The value is the kernel's, its derivative along a direction that of the xla form; a second one names another form."""
    op = {'softmax_attention': softmax_attention, 'gated_linear': gated_linear, 'delta_rule': delta_rule}[name]

    def f(impl, x):
        args, options = FORWARD[name](x)
        return op(*args, **options, impl=impl)

    x, dx = draw(1, 40, 2, 16, seed=1), draw(1, 40, 2, 16, seed=2)
    got, want = (jax.jit(lambda x, dx, i=i: jax.jvp(jax.jit(lambda x: f(i, x)), (x,), (dx,)))(x, dx) for i in IMPLS)
    close(got[0], want[0], FLOAT32)
    close(got[1], want[1], FLOAT32_GRAD)
    total = lambda x: sum(y.sum() for y in jax.tree.leaves(f('mosaic_tpu', x)))
    with pytest.raises(TypeError, match="impl 'mosaic_tpu' has first-order derivatives only; impl='reference' has higher ones"):
        jax.eval_shape(jax.hessian(total), x)


IMPLS = ('mosaic_tpu', 'xla')
