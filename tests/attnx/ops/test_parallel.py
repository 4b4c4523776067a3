"""Ops on eight devices: softmax attention by every way over the context axis, recurrences and convolutions with states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import dispatch, models, ops, sharding
from attnx.ops import masks, scores
from attnx.ops.context_attention import _legs, _needed
from pallas_kernels import blocks
from tests import tolerances
from tests.attnx.ops import recurrences
from tests.laws import close

B, T, N, H = 2, 32, 4, 8
RNG = np.random.default_rng(0)
IDS = np.repeat([[1, 1, 2, 3, 3, 3, 3, 0], [1, 2, 2, 2, 2, 3, 0, 0]], T // 8, axis=1).astype(np.int32)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def by_index(i):
    return (i.k <= i.q) & ((i.h + i.b + i.k) % 3 > 0)


# name -> (key heads, arrays with gradients, options made of them)
CASES = {
    'full': (4, {}, lambda: {}),
    'causal': (4, {}, lambda: {'mask': masks.causal()}),
    'gqa packed sinks': (
        2,
        {'sinks': normal(N)},
        lambda sinks: {'mask': masks.causal() & masks.segments(IDS), 'sinks': sinks},
    ),
    'window packed': (2, {}, lambda: {'mask': masks.causal() & masks.window(5) & masks.segments(IDS)}),
    'window both ways': (1, {}, lambda: {'mask': masks.window(5)}),
    'alibi softcap': (
        4,
        {'slopes': scores.alibi_slopes(N)},
        lambda slopes: {'mask': masks.causal(), 'score': scores.alibi(slopes) >> scores.softcap(5.0)},
    ),
    'strip packed': (
        2,
        {'strip': normal(N, 2 * T - 1)},
        lambda strip: {'mask': masks.causal() & masks.segments(IDS), 'score': scores.relative(strip)},
    ),
    'bias': (4, {'bias': normal(N, T, T)}, lambda bias: {'mask': masks.causal(), 'bias': bias}),
    'by index': (4, {}, lambda: {'mask': by_index}),
}


@functools.cache
def problem(case):
    key_heads, arrays, options = CASES[case]
    query, key, value = normal(B, T, N, H), normal(B, T, key_heads, H), normal(B, T, key_heads, H)
    cotangents = normal(B, T, N, H), normal(B, N, T)

    def run(query, key, value, arrays):
        def call(query, key, value, arrays):
            out, lse = ops.softmax_attention(query, key, value, **options(**arrays), return_lse=True)
            return out, jnp.where(jnp.isfinite(lse), lse, 0)

        found, pull = jax.vjp(call, query, key, value, arrays)
        return found, pull(cotangents)

    return run, (query, key, value, arrays)


@functools.cache
def expected(case):
    run, given = problem(case)
    return jax.jit(run)(*given)


def same(found, expected):
    jax.tree.map(lambda a, b: close(a, b, tolerances.FLOAT32_GRAD), found, expected)


def spread(case, method, mesh, preset='context'):
    """(results on the mesh, how the call was spread)."""
    run, given = problem(case)
    with sharding.use(sharding.make_mesh(mesh), preset, method), dispatch.record() as calls:
        found = jax.jit(lambda *given: run(*given))(*given)
    return found, calls[0].spread


# Slow: a case whose mask and operands are part of another's, for that method, or that another method has.
SLOW = {
    'heads': ('full', 'causal', 'window packed', 'window both ways', 'by index', 'strip packed'),
    'gather': ('causal', 'window both ways', 'bias', 'alibi softcap', 'window packed'),
    'ring': ('full', 'causal', 'bias', 'by index', 'window packed'),
}


@pytest.mark.parametrize(
    ('case', 'method'),
    [pytest.param(c, m, marks=[pytest.mark.slow] if c in slow else []) for m, slow in SLOW.items() for c in CASES],
)
def test_softmax_attention_over_the_context_axis(case, method):
    found, how = spread(case, method, {'data': 2, 'context': 4})
    assert f'tokens over context (4): {method}' in how.how
    same(found, expected(case))


@pytest.mark.parametrize(
    ('case', 'mesh', 'how'),
    [
        ('causal', {'context': 8}, 'gather, zigzag: keys and values take'),
        ('causal', {'data': 2, 'context': 4}, 'heads: 4 key heads divide among 4 devices'),
        ('gqa packed sinks', {'data': 2, 'context': 4}, 'gather, zigzag'),
        ('window packed', {'data': 2, 'context': 4}, 'ring: the mask reaches 2 of 4 parts'),
        ('window both ways', {'context': 8}, 'ring: the mask reaches 3 of 8 parts'),
    ],
)
def test_the_way_is_chosen_by_mask_and_shape(case, mesh, how):
    run, given = problem(case)
    with sharding.use(sharding.abstract_mesh(mesh), 'context'), dispatch.record() as calls:
        jax.eval_shape(lambda *given: run(*given), *given)
    assert how in calls[0].spread.how


def test_heads_rows_and_tokens_at_once():
    """Tensor and context axes together, key heads repeated for the tensor axis."""
    rules = sharding.PRESETS['fsdp_context'] | {'heads': 'tensor'}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sharding.PRESETS, 'all', rules)
        for method in ('heads', 'ring'):
            found, how = spread('window both ways', method, {'data': 2, 'tensor': 2, 'context': 2}, 'all')
            assert 'rows over data (2); heads over tensor (2); tokens over context (2)' in how.how
            same(found, expected('window both ways'))


def test_a_way_that_can_not_serve_is_refused():
    run, given = problem('causal')
    message = "context method 'heads' can not serve this call: 4 heads over 4 key heads do not divide among 8 devices"
    with sharding.use(sharding.abstract_mesh({'context': 8}), 'context', 'heads'), pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *given: run(*given), *given)


def test_keys_go_no_further_than_needed():
    legs = lambda steps, size: _legs(np.isin(np.arange(size), steps))
    assert legs([0, 1], 8) == (1, 0)
    assert legs([0, 1, 7], 8) == (1, 1)
    assert legs([0, 4], 8) == (0, 4) or legs([0, 4], 8) == (4, 0)
    assert legs(range(4), 4) == (3, 0)


@pytest.mark.parametrize(('zigzag', 'longest', 'expected'), [(False, 8, 1), (True, 8, 2), (False, 64, 7), (True, 64, 7)])
def test_keys_of_documents_go_no_further_than_documents_reach(zigzag, longest, expected):
    """128 tokens on 8 devices, documents of at most `longest` tokens: steps of the ring beside the device's own."""
    ids = np.arange(128)[None] // longest
    count = 16 if zigzag else 8

    @jax.jit
    def steps(ids):
        mask = masks.causal() & masks.segments(ids + 1)
        return _legs(_needed(blocks.union(blocks.classify(mask, 1, 1, 128, 128, 128 // count, 128 // count)), 8, zigzag))

    on, back = steps(jnp.asarray(ids + (np.arange(128) >= 4)))  # documents that parts cut
    assert on + back <= expected


def test_dropout_on_parts():
    """The rate is kept, and no two rows on whatever devices share their draws."""
    query, key = normal(B, 64, N, H), np.zeros((B, 64, N, H), np.float32)
    value = np.broadcast_to(np.eye(64, dtype=np.float32)[None, :, None], (B, 64, N, 64))  # the output is the weights
    for method in ('gather', 'ring', 'heads'):
        run = lambda q, k, v: ops.softmax_attention(q, k, v, mask=masks.causal(), dropout=ops.Dropout(0.25, 7))
        with sharding.use(sharding.make_mesh({'data': 2, 'context': 4}), 'context', method):
            kept = np.asarray(jax.jit(run)(query, key, value)) > 0
        kept = kept[:, 32:, :, :32].reshape(-1, 32)
        assert abs(kept.mean() - 0.75) < 0.02
        assert len(np.unique(kept, axis=0)) == len(kept)


# Recurrences and convolutions: states in and out, documents that cross devices and documents that do not -------------


def recurrence(op, decay, given_state, ids):
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    key = draw(B, T, 2, H)
    arrays = {'query': draw(B, T, 2, H), 'key': key / np.linalg.norm(key, axis=-1, keepdims=True), 'value': draw(B, T, N, H)}
    arrays |= {'beta': rng.uniform(0, 1, (B, T, N)).astype(np.float32)} if op == 'delta_rule' else {}
    shapes = {'none': None, 'head': (N,), 'token': (B, T, N), 'channel': (B, T, N, H)}
    arrays['log_decay'] = None if decay == 'none' else -rng.uniform(0, 0.3, shapes[decay]).astype(np.float32)
    arrays['initial_state'] = draw(B, N, H, H) if given_state else None
    cotangents = draw(B, T, N, H), draw(B, N, H, H)

    def run(arrays):
        call = lambda arrays: getattr(ops, op)(**arrays, segment_ids=ids, scale=0.5)
        found, pull = jax.vjp(call, arrays)
        return found, pull(cotangents)

    return run, arrays


@pytest.mark.quick('gated_linear-channel-True-True', 'delta_rule-token-True-True')
@pytest.mark.parametrize(
    ('op', 'decay', 'given_state', 'packed'),
    [
        ('gated_linear', 'none', True, False),
        ('gated_linear', 'head', False, True),
        ('gated_linear', 'token', True, True),
        ('gated_linear', 'channel', True, True),
        ('delta_rule', 'none', True, True),
        ('delta_rule', 'token', True, True),
        ('delta_rule', 'channel', False, False),
    ],
)
def test_recurrences_pass_states(op, decay, given_state, packed):
    run, arrays = recurrence(op, decay, given_state, IDS if packed else None)
    with sharding.use(sharding.make_mesh({'data': 2, 'context': 4}), 'context'), dispatch.record() as calls:
        found = jax.jit(lambda a: run(a))(arrays)
    assert 'tokens over context (4): states by one all-gather' in calls[0].spread.how
    same(found, jax.jit(run)(arrays))


def test_the_states_take_one_all_gather():
    _, arrays = recurrence('gated_linear', 'channel', False, None)
    forward = lambda arrays: ops.gated_linear(**arrays)
    with sharding.use(sharding.make_mesh({'context': 8}), 'context'):
        jaxpr = str(jax.make_jaxpr(forward)(arrays))
    assert jaxpr.count('all_gather[') == 1
    assert not any(other in jaxpr for other in ('ppermute[', 'psum[', 'all_to_all['))


@pytest.mark.parametrize(
    'mesh, preset, packed, options',
    [
        ({'context': 8}, 'context', False, {}),
        ({'context': 8}, 'context', True, {'activation': 'silu', 'unit_heads': 2}),
        ({'fsdp': 4, 'tensor': 2}, 'fsdp_tp', True, {'unit_heads': 2}),
    ],
)
def test_convolution_halos(mesh, preset, packed, options):
    rng = np.random.default_rng(2)
    x, kernel, state = (rng.standard_normal(s).astype(np.float32) for s in ((B, T, 6), (4, 6), (B, 3, 6)))
    cotangents = rng.standard_normal((B, T, 6)).astype(np.float32), rng.standard_normal((B, 3, 6)).astype(np.float32)

    def run(x, kernel, state):
        call = lambda x, w, s: ops.short_conv(x, w, initial_state=s, segment_ids=IDS if packed else None, **options)
        found, pull = jax.vjp(call, x, kernel, state)
        return found, pull(cotangents)

    with sharding.use(sharding.make_mesh(mesh), preset):
        found = jax.jit(lambda *a: run(*a))(x, kernel, state)
    same(found, jax.jit(run)(x, kernel, state))


def test_what_does_not_divide_is_done_whole_and_said():
    x = jax.ShapeDtypeStruct((3, 30, 4, 8), jnp.float32)
    with sharding.use(sharding.abstract_mesh({'data': 2, 'context': 4}), 'context'), dispatch.record() as calls:
        jax.eval_shape(lambda x: ops.gated_linear(x, x, x), x)
    assert calls[0].spread == dispatch.Spread(
        'every device does all of it',
        ('3 rows are not divisible over the 2 devices of data', '30 tokens are not divisible over the 4 devices of context'),
    )


@pytest.mark.slow
def test_states_and_caches_on_a_mesh():
    """Prefill of a prompt that is cut, then single tokens, which are not."""
    mixers = {'local': {'kind': 'sliding_window', 'window': 6}, 'delta': {'kind': 'gated_deltanet', 'num_heads': 2}}
    pattern = ('delta', 'gqa', 'local')
    config = models.ModelConfig(vocab_size=31, width=32, num_layers=3, pattern=pattern, mixers=mixers)
    model = models.build(config, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(3).integers(0, 31, (2, 20)).astype(np.int32)

    def run(model, tokens):
        state, found = model.init_state(2, 24), []
        for part in (tokens[:, :16], tokens[:, 16:17], tokens[:, 17:18], tokens[:, 18:]):
            out = model(part, state=state)
            state, found = out.state, [*found, out.logits]
        return jnp.concatenate(found, axis=1)

    expected = jax.jit(run)(model, tokens)
    with sharding.use(sharding.make_mesh({'data': 2, 'context': 4}), 'context'):
        close(jax.jit(lambda *a: run(*a))(model, tokens), expected, tolerances.FLOAT32_GRAD)


@pytest.mark.slow
@pytest.mark.parametrize('method', ['gather', 'ring'])
def test_kernels_take_the_parts(method):
    """Lowered for a GPU that is not here: masks at shifted indices are nothing that the kernel refuses."""
    array = jax.ShapeDtypeStruct((2, 2048, 4, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, 2048), jnp.int32)

    def loss(query, key, value, ids):
        mask = masks.causal() & masks.segments(ids)
        return ops.softmax_attention(query, key, value, mask=mask, impl='mosaic_gpu').astype(jnp.float32).sum()

    with sharding.use(sharding.make_mesh({'data': 2, 'context': 4}), 'context', method), dispatch.target('cuda'):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(array, array, array, ids)
        assert 'mosaic_gpu' in traced.lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.slow
def test_the_rings_gradients_take_no_forward_pass_again():
    array = jax.ShapeDtypeStruct((2, 2048, 4, 64), jnp.bfloat16)
    out = lambda q, k, v: ops.softmax_attention(q, k, v, mask=masks.causal(), impl='mosaic_gpu')
    gradients = jax.grad(lambda q, k, v: out(q, k, v).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    with sharding.use(sharding.make_mesh({'data': 2, 'context': 4}), 'context', 'ring'), dispatch.target('cuda'):
        alone, traced = (str(jax.make_jaxpr(f)(array, array, array)) for f in (out, gradients))
    forward, backward = (f'name=softmax_{which}' for which in ('forward', 'backward'))
    assert traced.count(forward) == traced.count(backward) == alone.count(forward) > 0


@pytest.mark.quick('delta_rule')
@pytest.mark.parametrize('name', ['gated_linear', 'delta_rule'])
def test_recurrences_within_a_callers_shard_map(name):
    """With checked axes, from no first state: what the scan carries varies over the mesh from the first step on."""
    arrays = recurrences.inputs(name, T=20, dtype=np.float32, state=False)
    P, op = jax.sharding.PartitionSpec, recurrences.op(name)
    mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    gradients = jax.grad(lambda arrays: (op(**arrays, chunk=8, impl='xla')[0] ** 2).sum())
    sharded = jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=P('data'), out_specs=P('data')))
    jax.tree.map(functools.partial(close, tolerance=tolerances.FLOAT32), sharded(arrays), jax.jit(gradients)(arrays))


# On GPUs: `JAX_PLATFORMS=cuda pytest -m gpu <this file>` --------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(len(jax.devices()) < 2, reason='it compares one device with two')
@pytest.mark.parametrize('name', ['ring', 'gather', 'heads', 'gated_linear', 'delta_rule'])
def test_kernels_on_two_devices(name):
    """Error against the float32 form, outputs and gradients: at most twice that of the same kernels on one device."""
    rng = np.random.default_rng(4)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    arrays = [draw(1, 4096, 4, 128) for _ in range(3)]
    ids = jnp.asarray(np.sort(rng.integers(1, 4, (1, 4096)), axis=1), jnp.int32)
    log_decay = -jnp.asarray(rng.uniform(0, 0.1, (1, 4096, 4)), jnp.float32)
    beta = jnp.asarray(rng.uniform(0, 1, (1, 4096, 4)), jnp.float32)

    def out(impl, q, k, v):
        if name in ('ring', 'gather', 'heads'):
            return ops.softmax_attention(q, k, v, mask=masks.causal() & masks.segments(ids), impl=impl)
        k = (k / jnp.linalg.norm(k.astype(jnp.float32), axis=-1, keepdims=True)).astype(k.dtype)
        more = () if name == 'gated_linear' else (beta,)
        return getattr(ops, name)(q, k, v, *more, log_decay, segment_ids=ids, impl=impl)[0]

    def run(impl, q, k, v):
        found, pull = jax.vjp(functools.partial(out, impl), q, k, v)
        return found, *pull(jnp.sin(jnp.arange(found.size).reshape(found.shape)).astype(found.dtype))

    with jax.default_matmul_precision('highest'):
        exact = jax.jit(functools.partial(run, 'xla'))(*(x.astype(jnp.float32) for x in arrays))
    error = lambda found: [np.linalg.norm(np.asarray(x - e, np.float64)) / np.linalg.norm(e) for x, e in zip(found, exact)]
    one = error(jax.jit(functools.partial(run, 'mosaic_gpu'))(*arrays))
    mesh = sharding.make_mesh({'context': 2}, jax.devices()[:2])
    with sharding.use(mesh, 'context', name if name in ('ring', 'gather', 'heads') else 'auto'), dispatch.record() as calls:
        two = error(jax.jit(lambda *given: run('mosaic_gpu', *given))(*arrays))
    assert 'tokens over context (2)' in calls[0].spread.how
    assert all(b <= 2 * a for a, b in zip(one, two)), (one, two)
