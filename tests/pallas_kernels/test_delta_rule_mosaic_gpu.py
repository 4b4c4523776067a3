"""The delta rule kernel: derivative logic, inverse and lowering on the CPU, the whole grid on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import apart, common
from pallas_kernels.delta_rule import chain, check, inverse, joint, mosaic_gpu, products, sweep
from pallas_kernels.gated_linear import accumulate, decays, scaling
from pallas_kernels.gated_linear import check as linear_check
from pallas_kernels.gated_linear import mosaic_gpu as linear
from pallas_kernels.gated_linear import per_channel as channel
from pallas_kernels.gated_linear import sweep as linear_sweep
from tests.pallas_kernels.emulation import emulated
from tests.pallas_kernels.test_gated_linear_mosaic_gpu import in_two_parts, plain_gradient, plain_sweep


def plain_delta(
    q,
    k,
    v,
    strength,
    inverses,
    decay,
    channels,
    state,
    *,
    every=None,
    scale=1.0,
    only_states=False,
    both=False,
    interpret=False,
    reverse=False,
):
    """What `write` (and `reach`, in reverse) promise, token by token in float64."""
    terms, _ = inverses.shape[3], interpret
    (B, T, _, K), N, V = k.shape, strength.shape[1], (state if v is None else v).shape[3]
    v = jnp.zeros((B, T, N, V)) if v is None else v
    has_q, q = q is not None, k if q is None else q
    wide = lambda x: np.repeat(np.asarray(x, np.float64), N // x.shape[2], 2)
    low = lambda x: 0 if x is None else wide(x)
    e = k if channels.other is None else channels.other  # enters the state
    q, k, v, e = wide(q) + low(channels.q_low), wide(k) + low(channels.k_low), wide(v), wide(e) + low(channels.other_low)
    rescale = lambda S, t: S if channels.scales is None else S * np.asarray(channels.scales, np.float64)[:, :, t // 64, :, None]
    first, last = (lambda t: t % 64 == 0), (lambda t: t % 64 == 63 or t == T - 1)
    begins, ends = (last, first) if reverse else (first, last)
    chunks = strength.shape[2]
    beta = np.asarray(strength, np.float64).prod(3).reshape(B, N, -1)
    step = np.zeros((B, N, chunks, 64)) if decay is None else np.diff(np.asarray(decay, np.float64).sum(-2), axis=-1, prepend=0)
    step = np.exp2(np.broadcast_to(step, (B, N, chunks, 64)).reshape(B, N, -1))
    S = np.zeros((B, N, K, V)) if state is None else np.asarray(state, np.float64)
    every = min(every or chunks, chunks)
    out, u = np.zeros((B, T, N, V)), np.zeros((B, T, N, V))
    states = np.zeros((B, N, -(-chunks // every), K, V))
    outer = lambda x, y: x[..., None] * y[..., None, :]
    read = lambda x, S: np.einsum('bnk,bnkv->bnv', x, S)
    for t in reversed(range(T)) if reverse else range(T):
        a, b = step[:, :, t, None, None], beta[:, :, t, None]
        S = rescale(S, t) if begins(t) else S
        if reverse:
            S = S + outer(q[:, t], v[:, t])
            u[:, t] = b * read(k[:, t], S)
            S = a * (S - outer(e[:, t], u[:, t]))
        else:
            u[:, t] = b * (v[:, t] - read(k[:, t], a * S))
            S = a * S + outer(e[:, t], u[:, t])
            out[:, t] = scale * read(q[:, t], S)
        S = rescale(S, t) if ends(t) else S
        states[:, :, t // 64 // every] = S
    as_input = lambda x: jnp.asarray(x, jnp.float32)
    if only_states:
        return (), as_input(states)
    u = as_input(u), *(jnp.zeros_like(as_input(u)),) * (terms - 1)
    found = (as_input(out), *u) if both else as_input(out) if has_q and not reverse else u
    return found, as_input(states)


def plain_chain(transitions, written, first, *, reverse=False, interpret=False):
    """What `chain` promises, in float64."""
    del interpret
    transitions, written = (np.asarray(x, np.float64) for x in (transitions, written))
    state = np.zeros_like(written[:, 0]) if first is None else np.asarray(first, np.float64)
    states = np.zeros_like(written)
    for piece in sorted(range(written.shape[1]), reverse=reverse):
        states[:, piece] = state
        state = transitions[:, piece] @ state + written[:, piece]
    return jnp.asarray(states, jnp.float32)


def plain_joint(
    queries, keys, values, decay, state, partner=None, base=None, *, dots=False, reverse=False, scale=1.0, interpret=False
):
    """What `joint` promises, sweep by sweep."""
    outs, total = [], 0.0
    for r, q in enumerate(queries):
        found = 0.0
        for w, (k, v) in enumerate(zip(keys, values)):
            of = values[-1] if r + 1 == len(queries) else partner
            options = {'reverse': reverse, 'strict': r + w > 0}
            out, _, felt = plain_sweep(q, k, v, decay, None if w else state, of if dots else None, **options)
            found += -out if w else out
            total = total - felt if dots and r + w else felt
        outs.append(found * (-scale if r else scale))
    outs[0] += 0.0 if base is None else base
    return tuple(outs), total


@pytest.mark.quick('shared heads', 'channel')
@pytest.mark.parametrize(
    'case',
    [
        check.Case('shared heads', T=70, N=2, heads=1, K=64, V=64, resets=0.05, scale=0.5),
        check.Case('none', T=30, N=1, K=64, V=40, decay='none', state=False),
        check.Case('constant', T=70, N=2, K=64, V=64, decay='head', beta=(0.0, 2.0)),
        check.Case('pieces', T=150, N=1, K=64, V=64, resets=0.02),
        check.Case('channel', T=150, N=2, heads=1, K=64, V=64, decay='channel', resets=0.03, scale=0.5),
        check.Case('channel, none', T=70, N=1, K=40, V=64, decay='channel', state=False),
        check.Case('channel, strong', T=40, N=1, K=64, V=64, decay='channel', strength=(0.0, 50.0)),
        check.Case('constant, pieces', T=128, N=1, K=64, V=64, decay='head', strength=(0.01, 0.05)),
        check.Case('highest', T=150, N=2, heads=1, K=64, V=64, resets=0.02, scale=0.5, precision='highest'),
    ],
    ids=lambda c: c.name,
)
def test_derivatives(monkeypatch, case):
    monkeypatch.setattr(linear_sweep, 'sweep', plain_sweep)
    monkeypatch.setattr(linear, 'refuse', lambda *_: None)
    monkeypatch.setattr(apart, 'choose', lambda chosen, one, other: one() if chosen else other())
    monkeypatch.setattr(channel, 'choose', lambda chosen, one, other, *args: one(*args) if chosen else other(*args))
    monkeypatch.setattr(decays, 'GROUP', 1)
    monkeypatch.setattr(mosaic_gpu, 'inverses', lambda *_, terms=2, **__: np.zeros((0, 0, 0, terms)))
    monkeypatch.setattr(chain, 'chain', plain_chain)
    monkeypatch.setattr(sweep, 'write', plain_delta)
    monkeypatch.setattr(sweep, 'reach', functools.partial(plain_delta, reverse=True))
    monkeypatch.setattr(mosaic_gpu, 'joint', plain_joint)
    monkeypatch.setattr(mosaic_gpu, 'gradient', plain_gradient)
    arrays, ids, cotangents = case.arrays()
    arrays = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    run = lambda f: linear_check.gradients(f, arrays, ids, cotangents, case.scale, names=check.NAMES)
    with emulated(monkeypatch, common, scaling):
        got = run(functools.partial(mosaic_gpu.delta_rule, precision=case.precision))
    with jax.enable_x64(True):
        want = run(functools.partial(check.oracle, dtype=jnp.float64))
    assert got.keys() == want.keys()
    for name in want:
        scale = np.abs(want[name]).max()
        np.testing.assert_allclose(got[name], want[name], atol=1e-4 * scale, err_msg=name)


def joint_arguments(reverse, T=192, N=2, heads=1, K=128, V=128, decay=True, dots=True, seed=0):
    """Arguments of `joint` in the roles of a gradient, with resets."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    one, of_heads = (lambda: normal(1, T, N, K)), (lambda: normal(1, T, heads, V))
    two = lambda: (one(), one() * jnp.bfloat16(2**-9))
    steps = jnp.where(rng.random((1, T, N)) < 0.02, decays.ERASE, rng.uniform(-0.3, -0.01, (1, T, N)))
    shared = decays.cumulative(steps.astype(jnp.float32), T) if decay else None, normal(1, N, K, V).astype(jnp.float32)
    if reverse:
        return (two(),), ((one(),), two()), (of_heads(), of_heads()), *shared, None, normal(1, T, N, V).astype(jnp.float32)
    return ((one(),), two()), (two(),), (of_heads(),), *shared, of_heads() if dots else None


def assert_joint(got, want):
    error = lambda x, y: np.linalg.norm(np.float64(x) - np.float64(y)) / np.linalg.norm(np.float64(y))
    (out, *wide), felt = got
    assert out.dtype == jnp.bfloat16 and error(out, want[0][0]) < 2e-3
    for x, y in zip(wide, want[0][1:], strict=True):
        assert x.dtype == jnp.float32 and error(x, y) < 1e-5
    assert felt is None or error(felt.sum(2), want[1].sum(2)) < 1e-5


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('shape', [{}, {'K': 64}, {'V': 64, 'decay': False}, {'dots': False, 'decay': False}], ids=str)
def test_joint_emulated(monkeypatch, shape, reverse):
    """Rings go round; every warpgroup has a thread."""
    arguments, options = joint_arguments(reverse, **shape), {'dots': shape.get('dots', True), 'reverse': reverse, 'scale': 0.5}
    with jax.disable_jit(), emulated(monkeypatch, common, accumulate, joint):
        got = joint.joint(*arguments, **options, interpret=True)
    assert_joint(got, plain_joint(*arguments, **options))


@pytest.mark.parametrize('reverse', [False, True])
def test_joint_interpreted_with_race_detection(reverse):
    """As far as rings do not go round: where memory is loaded anew, JAX 0.12 sees a race with reads before a barrier."""
    arguments, options = joint_arguments(reverse, T=128, N=1, K=64, V=64), {'dots': True, 'reverse': reverse, 'scale': 0.5}
    assert_joint(joint.joint(*arguments, **options, interpret=True), plain_joint(*arguments, **options))


@pytest.mark.parametrize('terms', [2, 3])
@pytest.mark.parametrize('collinear', [0.0, 0.95])
def test_inverse(collinear, terms):
    case = check.Case('inverse', T=104, N=2, heads=1, K=64, beta=(0.9, 1.0), collinear=collinear)
    k = case.arrays()[0][1]
    beta = np.random.default_rng(0).uniform(0.9, 1, (1, 2, 2, 64)).astype(np.float32)
    steps = np.random.default_rng(1).uniform(-0.1, 0, (1, 128, 2)).astype(np.float32)
    sums = decays.cumulative(jnp.asarray(steps), 128)
    decay = np.asarray(sums, np.float64).sum(3)
    strength = jnp.stack(products.strengths(jnp.asarray(beta)), axis=3)
    got = np.asarray(inverse.inverses(k, strength, sums, terms=terms, interpret=True), np.float64).sum(3)
    later, earlier = np.moveaxis(np.asarray(strength, np.float64), 3, 0)
    rows = np.zeros((128, 64))
    rows[:104] = np.asarray(k, np.float64)[0, :, 0]
    rows = rows.reshape(2, 64, 64)
    between = np.exp2(np.minimum(decay[..., :, None] - decay[..., None, :], 0))
    A = np.tril((rows @ rows.swapaxes(1, 2)) * later[..., None] * earlier[..., None, :] * between, -1)
    want = np.linalg.inv(np.eye(64) + A) - (terms > 2) * np.eye(64)
    np.testing.assert_allclose(got, want, atol=1e-5 if terms == 2 else 5e-7)


@pytest.mark.parametrize('K, V, pieces, reverse, given', [(128, 64, 3, False, True), (64, 128, 4, True, False)])
def test_chain(K, V, pieces, reverse, given):
    """As good as float32."""
    normal = lambda *shape: jnp.asarray(np.random.default_rng(K).normal(size=shape), jnp.float32)
    arguments = normal(1, pieces, 2, K, K) / K**0.5, normal(1, pieces, 2, K, V), normal(1, 2, K, V) if given else None
    got, want = (f(*arguments, reverse=reverse, interpret=True) for f in (chain.chain, plain_chain))
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-7 * float(jnp.abs(want).max()))


@pytest.mark.parametrize('precision', [None, 'highest'])
def test_interpreted_with_race_detection(precision):
    (q, k, v, beta, g, state), ids, _ = check.Case('small', T=72, N=1, K=64, V=64, resets=0.05).arrays()
    options = {'initial_state': state, 'segment_ids': ids}
    run = lambda *arrays: mosaic_gpu.delta_rule(*arrays, precision=precision, interpret=True, **options)
    (out, last), _ = jax.vjp(run, q, k, v, beta, g)  # the forward pass that keeps u
    want, want_last = check.oracle(q, k, v, beta, g, dtype=jnp.float32, **options)
    error = lambda x, y: np.linalg.norm(np.float32(x) - np.float32(y)) / np.linalg.norm(np.float32(y))
    assert error(out, want) < 4e-3
    assert error(last, want_last) < (2e-7 if precision else check.FLOORS['state'])


@pytest.mark.slow
@pytest.mark.parametrize('precision', [None, 'highest'])
def test_interpreted_in_two_calls(precision):
    """As good as in one, gradients too."""
    case = check.Case('two calls', T=90, N=1, K=64, V=64, decay='token', precision=precision)
    good, errors = check.check(case, interpret=True, kernel=in_two_parts(mosaic_gpu.delta_rule, 37))
    assert good, errors


@pytest.mark.slow
def test_interpreted_per_channel_in_pieces(monkeypatch):
    monkeypatch.setattr(decays, 'GROUP', 1)
    case = check.Case('pieces', T=128, N=1, K=64, V=64, decay='channel', resets=0.02, scale=0.5)
    good, errors = check.check(case, interpret=True)
    assert good, errors


@pytest.mark.quick('channels2-None')
@pytest.mark.parametrize('channels, precision', [((), None), ((), 'highest'), ((128,), None)])
def test_lowers_for_hopper(channels, precision):
    x = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    f32 = x(1, 1000, 4, dtype=jnp.float32)
    loss = lambda *a: mosaic_gpu.delta_rule(*a, precision=precision)[0].astype(jnp.float32).sum()
    allowed = [jax.export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')]
    decay = x(1, 1000, 4, *channels, dtype=jnp.float32)
    arguments = x(1, 1000, 2, 128), x(1, 1000, 2, 128), x(1, 1000, 4, 128), f32, decay
    jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2, 3, 4))), platforms=['cuda'], disabled_checks=allowed)(*arguments)


def test_refusals():
    x = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
    beta = jnp.zeros((1, 64, 2))
    assert mosaic_gpu.unsupported(x, x, x, beta) is None
    assert 'a decay per channel' in mosaic_gpu.unsupported(x, x, x, beta, jnp.zeros(x.shape), precision='highest')
    assert 'widths up to 128, given 192' in mosaic_gpu.unsupported(x, x, jnp.zeros((1, 64, 2, 192), x.dtype), beta)
    assert mosaic_gpu.unsupported(x, x, x, beta, jnp.zeros((1, 64, 2, 64))) is None
    f32 = x.astype(jnp.float32)
    with pytest.raises(ValueError, match=r'delta_rule on mosaic_gpu: .*must be bfloat16'):
        mosaic_gpu.delta_rule(f32, f32, f32, beta)


@pytest.mark.gpu
@pytest.mark.parametrize('case', check.CASES, ids=lambda c: c.name)
def test_grid(case):
    good, errors = check.check(case)
    assert good, errors
