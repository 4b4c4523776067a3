"""Softmax attention: blockwise form against oracle, oracle against NumPy, and what is promised about rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnx.ops import masks, scores, softmax_attention
from attnx.ops.softmax_attention import Dropout, reference, xla
from tests import tolerances


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def inputs(T, S=None, B=2, N=4, K=2, H=8, Hv=6, seed=0, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S or T, K, H), (B, S or T, K, Hv)
    return tuple(rng.normal(size=s).astype(dtype) for s in shapes)


def normal(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape)


def ids(B, T, seed=2):
    """Packed segment ids with padding behind."""
    return np.sort(np.random.default_rng(seed).integers(0, 4, (B, T)), 1)[:, ::-1].astype(np.int32)


def value_and_gradients(form, arguments, options):
    """(out, lse) and gradients of a random projection of both, for every floating array in arguments and options.

    NumPy arrays, as all checks below are: each operation of jnp outside jit would compile by itself.
    """
    return jax.tree.map(np.asarray, _value_and_gradients(form, arguments, options))


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradients(form, arguments, options):

    def loss(arguments, options):
        out, lse = form(*arguments, **options, return_lse=True)
        weight = lambda x, seed: jnp.asarray(np.random.default_rng(seed).normal(size=x.shape), x.dtype)
        return (out * weight(out, 3)).sum() + (jnp.where(jnp.isfinite(lse), lse, 0) * weight(lse, 4)).sum(), (out, lse)

    (_, outs), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)(arguments, options)
    return outs, [g for g in jax.tree.leaves(grads) if g.dtype != jax.dtypes.float0]


def assert_close(got, want, tolerance=tolerances.FLOAT64):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    got, want = (np.where(np.isfinite(x), x, 0) for x in (got, want))
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(float(abs(want).max()), 1e-3))


def by_hand(q, k, v, visible, bias=0.0, scale=None):
    """NumPy, one row at a time."""
    q, k, v = (np.asarray(x) for x in (q, k, v))
    (B, T, N, H), K = q.shape, k.shape[2]
    out, lse = np.zeros((B, T, N, v.shape[3])), np.full((B, N, T), -np.inf)
    bias = np.broadcast_to(bias, (B, N, T, k.shape[1]))
    for b, n, t in np.ndindex(B, N, T):
        seen = visible[b, n, t]
        if seen.any():
            logits = (k[b, :, n * K // N] @ q[b, t, n] * (scale or H**-0.5) + bias[b, n, t])[seen]
            weights = np.exp(logits - logits.max())
            out[b, t, n] = weights @ v[b, seen, n * K // N] / weights.sum()
            lse[b, n, t] = np.log(weights.sum()) + logits.max()
    return out, lse


def test_oracle_is_the_equation():
    q, k, v = inputs(11, 13)
    visible = np.random.default_rng(0).random((2, 4, 11, 13)) < 0.4
    visible[0, 1, 3] = False
    bias = normal(2, 4, 11, 13)
    got = jax.jit(lambda *a: reference(*a, mask=masks.array(visible), bias=bias, return_lse=True))(q, k, v)
    for x, y in zip(got, by_hand(q, k, v, visible, np.asarray(bias))):
        assert_close(x, y)


# name: (T, S, block sizes, options); each crosses several features, since compiling is what costs.
CASES = {
    'packed, sinks, strip, dropout': lambda: (
        37,
        37,
        (8, 16),
        {
            'mask': masks.causal() & masks.segments(ids(2, 37)),
            'score': scores.relative(normal(2, 4, 73)),
            'sinks': normal(4),
            'dropout': Dropout(0.3, jnp.uint32(7)),
        },
    ),
    'more keys, chain of scores': lambda: (
        20,
        33,
        (8, 16),
        {
            'mask': masks.causal() & masks.window(9),
            'bias': normal(2, 1, 1, 33),
            'score': scores.alibi(normal(4))
            >> scores.softcap(2.0)
            >> scores.temperature(np.exp(normal(4)))
            >> scores.bias(normal(4, 20, 1)),
        },
    ),
    'padding, dense bias': lambda: (
        24,
        32,
        (8, 16),
        {'mask': masks.padding(jnp.array([0, 13])) & ~masks.strided(3), 'bias': normal(1, 4, 24, 32), 'sinks': normal(4)},
    ),
    'decode': lambda: (
        1,
        63,
        (1, 16),
        {'mask': masks.causal(jnp.array([[40], [7]]), jnp.tile(jnp.arange(63) - 3, (2, 1))) & masks.window(20)},
    ),
    'functions, more queries, uneven blocks': lambda: (
        24,
        22,
        (5, 24),
        {
            'mask': masks.as_mask(lambda i: (i.q - i.k) % 3 == i.h % 3),
            'score': scores.as_score(lambda s, i: s * (1 + 0.1 * i.b)),
        },
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_blockwise_equals_oracle(name):
    T, S, blocks, options = CASES[name]()
    arguments = inputs(T, S)
    outs, grads = value_and_gradients(functools.partial(xla, block_sizes=blocks), arguments, options)
    want_outs, want_grads = value_and_gradients(reference, arguments, options)
    for got, want in zip((*outs, *grads), (*want_outs, *want_grads), strict=True):
        assert np.isfinite(got).all() or got.ndim == 3  # lse alone may be -inf
        assert_close(got, want)


def test_one_block_equals_oracle_and_a_second_run_itself():
    T, S, _, options = CASES['packed, sinks, strip, dropout']()
    arguments = inputs(T, S)
    first, second = (jax.tree.leaves(value_and_gradients(xla, arguments, options)) for _ in range(2))
    for got, again, want in zip(first, second, jax.tree.leaves(value_and_gradients(reference, arguments, options))):
        np.testing.assert_array_equal(got, again)
        assert_close(got, want)


@settings(max_examples=4, deadline=None)
@given(
    T=st.integers(1, 20),
    S=st.integers(1, 20),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]),
    blocks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    mask=st.sampled_from(
        [
            None,
            masks.causal(),
            masks.window(3),
            masks.causal() & masks.window(2),
            masks.block_causal(4) & masks.dilated(2, 3),
        ]
    ),
    seed=st.integers(0, 99),
)
def test_any_shape(T, S, heads, blocks, mask, seed):
    arguments = inputs(T, S, 1, *heads, H=4, Hv=3, seed=seed)
    run = jax.jit(lambda form, *a: form(*a, mask=mask, return_lse=True), static_argnums=0)
    for x, y in zip(run(functools.partial(xla, block_sizes=blocks), *arguments), run(reference, *arguments)):
        assert_close(x, y)


def test_chosen_blocks_cover_long_sequences():
    options = {'mask': masks.causal(), 'score': scores.relative(normal(2, 899))}
    run = jax.jit(lambda form, *a: form(*a, **options), static_argnums=0)
    assert_close(*(run(form, *inputs(600, 300, 1, 2, 1)) for form in (xla, reference)))


def test_finite_differences():
    q, k, v = inputs(7, 9, 1, 2, 1, 4, 3)
    leaves = (q, k, v, normal(8, 2), normal(2))

    @jax.jit
    @jax.value_and_grad
    def f(leaves):
        q, k, v, table, sinks = leaves
        score = scores.t5(table, 7, 9, max_distance=16) >> scores.softcap(3.0)
        out, lse = reference(q, k, v, mask=masks.causal(), score=score, sinks=sinks, return_lse=True)
        return (out * normal(*out.shape)).sum() + (lse**2).sum()

    direction = [normal(*x.shape, seed=i) for i, x in enumerate(leaves)]
    moved = lambda step: float(f(tuple(x + step * d for x, d in zip(leaves, direction)))[0])
    slope = sum(float((np.asarray(g) * d).sum()) for g, d in zip(f(leaves)[1], direction))
    assert abs(slope - (moved(1e-5) - moved(-1e-5)) / 2e-5) < tolerances.FINITE_DIFFERENCE * max(1, abs(slope))


@pytest.mark.parametrize('form', [reference, functools.partial(xla, block_sizes=(4, 4))])
def test_rows_that_see_nothing(form):
    q, k, v = inputs(10)
    visible = np.ones((2, 1, 10, 10), bool)
    visible[0, 0, 3:6] = False
    (out, lse), (dq, *others) = value_and_gradients(
        form, (q, k, v), {'mask': masks.array(visible), 'sinks': normal(4), 'bias': normal(1, 4, 10, 10)}
    )
    assert (out[0, 3:6] == 0).all() and np.isneginf(lse[0, :, 3:6]).all() and (dq[0, 3:6] == 0).all()
    assert np.isfinite(lse[1]).all() and all(np.isfinite(g).all() for g in (dq, *others))


@pytest.mark.parametrize('form', [reference, functools.partial(xla, block_sizes=(4, 4))])
def test_poison_stays_in_its_slots(form):
    clean_qkv = inputs(10)
    slots = masks.segments(jnp.array([[1] * 4 + [2] * 4 + [0] * 2] * 2))
    bias, cap = normal(1, 4, 10, 10), scores.softcap(2.0)
    run = lambda q, k, v, bias: value_and_gradients(
        form,
        (q, k, v),
        {'mask': slots, 'score': scores.bias(bias) >> cap >> scores.temperature(normal(4)), 'sinks': normal(4)},
    )
    clean = run(*clean_qkv, bias)
    for poison in (np.nan, np.inf, -np.inf):
        q, k, v, bad_bias = (np.array(x) for x in (*clean_qkv, bias))
        q[:, 9] = k[:, 8, 0, 1] = v[:, 9, 1, 2] = poison
        # Masked logits are poisoned too: rows of segment 1 against keys of segment 2.
        bad_bias[:, :, :4, 4:] = poison
        got = run(q, k, v, bad_bias)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(clean)):
            assert not np.isnan(x).any()
            assert_close(x, y)


@pytest.mark.parametrize('form', [reference, functools.partial(xla, block_sizes=(4, 4))])
def test_visible_poison_turns_exactly_its_rows(form):
    q, k, v = inputs(10)
    v = np.array(v)
    v[0, 6, 0, 2] = np.nan
    run = jax.jit(lambda q, k, v: form(q, k, v, mask=masks.causal(), return_lse=True))
    out, lse = map(np.asarray, run(q, k, v))
    bad = np.zeros((2, 10, 4), bool)
    bad[0, 6:, :2] = True  # key head 0 serves query heads 0 and 1
    np.testing.assert_array_equal(np.isnan(out).all(-1), bad)
    np.testing.assert_array_equal(np.isnan(out).any(-1), bad)
    np.testing.assert_array_equal(np.isnan(lse), np.moveaxis(bad, 1, 2))
    if form is not reference:
        grads = jax.grad(lambda *a: run(*a)[0][:, :6].sum(), argnums=(0, 1, 2))(q, k, v)
        assert all(np.isfinite(g).all() for g in grads)


def test_bad_cotangents_turn_only_what_their_row_sees():
    q, k, v = inputs(10)
    _, pull = jax.vjp(jax.jit(lambda *a: xla(*a, mask=masks.causal(), block_sizes=(4, 4))), q, k, v)
    cotangent = np.array(normal(2, 10, 4, 6))
    cotangent[0, 3, 0, 0] = np.nan
    dq, dk, dv = map(np.asarray, pull(cotangent))
    assert np.isnan(dq[0, 3, 0]).all() and np.isnan(dq).sum() == 8
    for g in (dk, dv):
        assert np.isnan(g[0, :4, 0]).all() and np.isfinite(g[0, 4:]).all() and np.isfinite(g[1]).all()


def test_dropout_bits_do_not_depend_on_the_form():
    q, k, _ = inputs(70, B=1)
    v = np.broadcast_to(np.eye(70)[None, :, None], (1, 70, 2, 70))  # the output is the weights
    drop = Dropout(0.4, 11)
    run = lambda form, **kw: np.asarray(jax.jit(lambda q, k, v: form(q, k, v, dropout=drop, **kw))(q, k, v))
    weights = run(reference)
    for blocks in ((24, 16),):
        np.testing.assert_array_equal(run(xla, block_sizes=blocks) == 0, weights == 0)
    assert abs((weights == 0).mean() - 0.4) < 0.01
    whole = np.asarray(jax.jit(reference)(q, k, v))
    np.testing.assert_allclose(weights[weights != 0] / whole[weights != 0], 1 / 0.6, rtol=1e-4)


def test_low_precision():
    dtype = jnp.bfloat16
    exact = inputs(40)
    low = tuple(x.astype(dtype) for x in exact)
    exact = tuple(x.astype(np.float64) for x in low)
    options = {'mask': masks.causal()}
    (out, lse), grads = value_and_gradients(functools.partial(xla, block_sizes=(16, 16)), low, options)
    (want, want_lse), want_grads = value_and_gradients(reference, exact, options)
    assert out.dtype == dtype and lse.dtype == jnp.float32 and all(g.dtype == dtype for g in grads)
    assert_close(lse, want_lse, tolerances.FLOAT32)
    for x, y in zip((out, *grads), (want, *want_grads)):
        assert_close(x.astype(jnp.float64), y, tolerances.BFLOAT16)


def test_vmap():
    arguments = tuple(np.stack(x) for x in zip(inputs(12, seed=1), inputs(12, seed=2), inputs(12, seed=3)))
    segment = np.stack([ids(2, 12, s) for s in range(3)])
    strip = normal(3, 4, 23)

    def one(form):
        def f(q, k, v, segment, strip):
            mask = masks.causal() & masks.segments(segment)
            loss = lambda q, strip: (form(q, k, v, mask=mask, score=scores.relative(strip)) ** 2).sum()
            return jax.value_and_grad(loss, argnums=(0, 1))(q, strip)

        return f

    got = jax.jit(jax.vmap(one(functools.partial(xla, block_sizes=(4, 4)))))(*arguments, segment, strip)
    single = jax.jit(one(reference))
    singles = [single(*(a[i] for a in (*arguments, segment, strip))) for i in range(3)]
    want = jax.tree.map(lambda *x: np.stack(x), *singles)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert_close(x, y)


def test_shard_map_with_checked_axes():
    mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    arguments, table = inputs(12), normal(32, 4)

    def loss(form, q, k, v, table):
        return (form(q, k, v, mask=masks.causal(), score=scores.t5(table, 12)) ** 2).sum()

    local = lambda *a: jax.lax.psum(loss(functools.partial(xla, block_sizes=(4, 4)), *a), 'data')
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P('data'),) * 3 + (P(),), out_specs=P())
    got = jax.jit(jax.grad(sharded, argnums=(0, 3)))(*arguments, table)
    want = jax.jit(jax.grad(functools.partial(loss, reference), argnums=(0, 3)))(*arguments, table)
    for x, y in zip(got, want):
        assert_close(x, y)


def test_second_order():
    q, k, v = inputs(6)
    f = lambda form: lambda q: (form(q, k, v, mask=masks.causal(), score=scores.softcap(2.0)) ** 2).sum()
    direction = normal(*q.shape)
    _, slope = jax.jit(lambda q: jax.jvp(f(reference), (q,), (direction,)))(q)
    gradient = jax.jit(jax.grad(f(xla)))
    assert_close(slope, (np.asarray(gradient(q)) * direction).sum())
    _, product = jax.jit(lambda q: jax.jvp(jax.grad(f(reference)), (q,), (direction,)))(q)
    ahead, behind = (np.asarray(gradient(q + step * direction)) for step in (1e-5, -1e-5))
    difference = (ahead - behind) / 2e-5
    assert_close(product, difference, tolerances.FINITE_DIFFERENCE)
    for attempt in (
        lambda: jax.make_jaxpr(jax.hessian(f(xla)))(q),
        lambda: jax.jit(jax.grad(lambda q: gradient(q).sum()))(q),
        lambda: jax.jit(jax.jacfwd(jax.jit(jax.jacfwd(f(xla)))))(q),
        lambda: jax.grad(lambda q: jax.jvp(f(xla), (q,), (direction,))[1])(q),
    ):
        with pytest.raises(TypeError, match="impl='reference'"):
            attempt()


def test_identities():
    q, k, v = inputs(12)
    xla = jax.jit(softmax_attention, static_argnames='return_lse')
    assert_close(xla(q, k, v, mask=masks.causal() & masks.window(1)), np.repeat(v, 2, 2))
    out, lse = xla(q, k, v, return_lse=True)
    assert_close(out, xla(q, np.repeat(k, 2, 2), np.repeat(v, 2, 2)))
    softmax1 = np.asarray(out) / (1 + np.exp(-np.moveaxis(lse, 1, 2)))[..., None]
    assert_close(xla(q, k, v, sinks=np.zeros(4)), softmax1)


def test_no_quadratic_buffer():
    T = 2048
    shapes = [jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)] * 3
    strip = jax.ShapeDtypeStruct((2, 2 * T - 1), jnp.float32)
    segment = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def loss(q, k, v, strip, segment):
        mask = masks.causal() & masks.segments(segment)
        return softmax_attention(q, k, v, mask=mask, score=scores.relative(strip), impl='xla').sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*shapes, strip, segment).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < T * T  # a quarter of one head's float32 logits


def test_grouped_heads_are_not_repeated():
    one = jax.jit(lambda q, k, v: xla(q, k, v, block_sizes=(64, 64)))
    q, k = jax.ShapeDtypeStruct((1, 64, 32, 8), jnp.float32), jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)
    repeated = 4096 * 32 * 8 * 4
    assert one.lower(q, k, k).compile().memory_analysis().temp_size_in_bytes < repeated


def test_equal_masks_do_not_recompile():
    traces = []

    @jax.jit
    def f(q, k, v, mask, score):
        traces.append(1)
        return xla(q, k, v, mask=mask, score=score)

    for seed in (1, 2):
        f(*inputs(8), masks.causal() & ~masks.segments(ids(2, 8, seed)), scores.alibi(normal(4, seed=seed)))
    assert len(traces) == 1


Q, K, V = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 6, 4, 8), (2, 7, 2, 8), (2, 7, 2, 5)))
WRONG = {
    'rank': (lambda: softmax_attention(jax.ShapeDtypeStruct((6, 4, 8), jnp.float32), K, V), r'\(6, 4, 8\)'),
    'heads': (lambda: softmax_attention(jax.ShapeDtypeStruct((2, 6, 5, 8), jnp.float32), K, V), 'K=2 .* N=5'),
    'width': (lambda: softmax_attention(jax.ShapeDtypeStruct((2, 6, 4, 9), jnp.float32), K, V), r'\(2, 6, 4, 9\)'),
    'length': (lambda: softmax_attention(Q, K, jax.ShapeDtypeStruct((2, 6, 2, 5), jnp.float32)), 'disagree'),
    'dtype': (lambda: softmax_attention(jax.ShapeDtypeStruct((2, 6, 4, 8), jnp.int32), K, V), 'int32'),
    'dtypes': (lambda: softmax_attention(jax.ShapeDtypeStruct((2, 6, 4, 8), jnp.bfloat16), K, V), 'one floating dtype'),
    'one byte': (lambda: softmax_attention(*(jnp.ones((1, 2, 2, 8), jnp.float8_e4m3fn) for _ in 'qkv')), 'at least 16 bits'),
    'list': (lambda: softmax_attention([[[[1.0]]]], K, V), 'query must be an array, given list'),
    'empty': (lambda: softmax_attention(jax.ShapeDtypeStruct((2, 0, 4, 8), jnp.float32), K, V), 'is 0'),
    'mask operand': (
        lambda: softmax_attention(Q, K, V, mask=masks.segments(jnp.ones((2, 6), int))),
        r"'bk' .*\(2, 7\)",
    ),
    'mask array': (lambda: softmax_attention(Q, K, V, mask=jnp.ones((6, 7), bool)), 'masks.array'),
    'mask value': (lambda: softmax_attention(Q, K, V, mask=lambda i: i.q - i.k), 'boolean'),
    'mask as score': (lambda: softmax_attention(Q, K, V, score=masks.causal()), 'mask='),
    'score as mask': (lambda: softmax_attention(Q, K, V, mask=scores.softcap(1.0)), 'score='),
    'bias': (lambda: softmax_attention(Q, K, V, bias=jnp.ones((3, 4, 6, 7))), r'\(3, 4, 6, 7\)'),
    'bool bias': (lambda: softmax_attention(Q, K, V, bias=jnp.ones((6, 7), bool)), 'masks.array'),
    'strip': (lambda: softmax_attention(Q, K, V, score=scores.relative(jnp.ones((4, 13)))), r'expected \(4, 12\)'),
    'slopes': (lambda: softmax_attention(Q, K, V, score=scores.alibi(jnp.ones(3))), r'\(3,\)'),
    'sinks': (lambda: softmax_attention(Q, K, V, sinks=jnp.ones(2)), 'N=4'),
    'scale': (lambda: softmax_attention(Q, K, V, scale=jnp.ones(())), 'temperature'),
    'rate': (lambda: softmax_attention(Q, K, V, dropout=Dropout(1.0, 0)), r'\[0, 1\)'),
    'seed': (lambda: softmax_attention(Q, K, V, dropout=Dropout(0.1, jax.random.key(0))), 'from_key'),
    'no dropout': (lambda: softmax_attention(Q, K, V, dropout=0.1), 'Dropout'),
    'impl': (lambda: softmax_attention(Q, K, V, impl='xlaa'), "did you mean 'xla'"),
}


@pytest.mark.parametrize('name', WRONG)
def test_bad_input(name):
    attempt, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        attempt()


@pytest.mark.parametrize('form', [reference, xla])
def test_a_row_of_nan_is_no_empty_row(form):
    """At lengths where XLA vectorises the maximum, it drops NaN."""
    q, k, v = (np.array(x) for x in inputs(300, B=1, N=2))
    q[0, 5, 0] = np.nan
    _, lse = jax.jit(lambda *a: form(*a, mask=masks.causal(), return_lse=True))(q, k, v)
    np.testing.assert_array_equal(np.argwhere(np.isnan(lse)), [[0, 0, 5]])


@pytest.mark.quick('sinks1')
@pytest.mark.parametrize('sinks', [None, normal(4)])
def test_statistics(sinks):
    q, k, v = inputs(20, S=25)
    mask = lambda i: (i.k <= i.q) & (i.q > 2)
    x = np.einsum('btnh,bsnh->bnts', q, np.repeat(k, 2, 2)) * 8**-0.5
    x = np.where(np.arange(25) <= np.arange(20)[:, None], x, -np.inf)[:, :, 3:]
    sink = np.full(4, -np.inf) if sinks is None else sinks
    x = np.concatenate([x, np.broadcast_to(sink[:, None, None], (*x.shape[:3], 1))], -1)
    p = np.exp(x - x.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    want = x[..., :-1].max((0, 2, 3)), entropy.mean((0, 2)), p[..., -1].mean((0, 2))
    for form in (reference, functools.partial(xla, block_sizes=(8, 8))):
        out, lse, found = jax.jit(lambda *a, f=form: f(*a, mask=mask, sinks=sinks, return_lse=True, return_stats=True))(q, k, v)
        plain = jax.jit(lambda *a, f=form: f(*a, mask=mask, sinks=sinks, return_lse=True))(q, k, v)
        np.testing.assert_allclose(out, plain[0])
        np.testing.assert_allclose(lse, plain[1])
        for a, b in zip(found, want):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        for name in found._fields:
            alone = jax.jit(lambda *a, f=form, n=name: f(*a, mask=mask, sinks=sinks, return_stats=(n,))[1])(q, k, v)
            assert [x for x in alone._fields if getattr(alone, x) is not None] == [name]
            np.testing.assert_allclose(getattr(alone, name), getattr(found, name), rtol=1e-5, atol=1e-6)
        pull = jax.jit(jax.grad(lambda q, f=form: f(q, k, v, mask=mask, sinks=sinks, return_stats=True)[0].sum()))
        assert np.isfinite(pull(q)).all()


@pytest.mark.parametrize('wrong', ['entropy', ('entropy', 'top')])
def test_unknown_statistics(wrong):
    with pytest.raises(ValueError, match=r"some of \('max_logit', .* given .*entropy"):
        softmax_attention(*(jnp.ones((1, 4, 1, 8)),) * 3, return_stats=wrong)
