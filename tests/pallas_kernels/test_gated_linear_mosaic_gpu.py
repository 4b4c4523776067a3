"""The gated linear kernel: schedule and derivative logic and lowering on the CPU, the whole grid on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import apart, common
from pallas_kernels.gated_linear import (
    accumulate,
    check,
    decays,
    decode,
    log_decay,
    mosaic_gpu,
    per_channel,
    pieces,
    scaling,
    states,
    sweep,
)
from tests.pallas_kernels.emulation import emulated


def plain_sweep(
    q,
    k,
    v,
    decay,
    state,
    partner=None,
    scales=None,
    base=None,
    against=None,
    *,
    by_columns=False,
    reverse=False,
    strict=False,
    precise=False,
    exact=False,
    wide=False,
    own=False,
    every=None,
    scale=1.0,
    heads=0,
    interpret=False,
):
    """What `sweep` promises, token by token in float64."""
    del interpret, precise, exact, wide
    exact = lambda terms: sum(np.asarray(x, np.float64) for x in terms) if terms else None
    q, k, v = (exact(sweep.terms_of(x)) for x in (q, k, v))
    (B, T, _, K), V = k.shape, v.shape[3]
    N = max(heads, *(x.shape[2] for x in (q, k, v) if x is not None))
    repeat = lambda x: np.repeat(np.asarray(x, np.float64), N // x.shape[2], 2)
    q, k, v = (None if x is None else repeat(x) for x in (q, k, v))
    chunks = -(-T // 64)
    every = min(every or chunks, chunks)
    step = np.zeros((B, N, chunks, 64))
    if decay is not None:
        step = np.diff(np.asarray(decay, np.float64).sum(-2), axis=-1, prepend=0)
    step = np.broadcast_to(step, (B, N, chunks, 64)).reshape(B, N, -1)
    S = np.zeros((B, N, K, V)) if state is None else np.asarray(state, np.float64)
    out, dots = np.zeros((B, T, N, V)), np.zeros((B, N, V // 64, chunks * 64))
    states = np.zeros((B, N, -(-chunks // every), K, V))
    if scales is not None:
        scales = np.asarray(scales, np.float64)[..., None, :] if by_columns else np.asarray(scales, np.float64)[..., None]
    rescale = lambda S, t: S if scales is None else S * scales[:, :, t // 64]
    first, last = (lambda t: t % 64 == 0), (lambda t: t % 64 == 63 or t == T - 1)
    begins, ends = (last, first) if reverse else (first, last)
    begins_group = lambda c: c in (chunks - 1, c // every * every + every - 1) if reverse else c % every == 0
    entered = np.zeros_like(states)
    for t in reversed(range(T)) if reverse else range(T):
        if begins(t) and begins_group(t // 64):
            entered[:, :, t // 64 // every] = S
        S = rescale(S, t) if begins(t) else S
        a = np.exp2(step[:, :, t])[..., None, None]
        before = S if reverse else a * S
        S = before + k[:, t][..., None] * v[:, t][..., None, :]
        if q is not None:
            read = lambda S, t=t: np.einsum('bnk,bnkv->bnv', q[:, t], S)
            out[:, t] = scale * read(before if strict else S)
            if own:
                dots[..., t] = (q[:, t] * k[:, t]).sum(-1)[..., None]
            if partner is not None:
                dots[:, :, 0, t] = (read(before) * repeat(partner)[:, t]).sum(-1)
        if reverse:
            S = a * S
        S = rescale(S, t) if ends(t) else S
        states[:, :, t // 64 // every] = S
    as_input = lambda x: jnp.asarray(x, jnp.float32)
    out = out if base is None else out + base
    if against is not None:
        states = (entered * np.asarray(against, np.float64)).reshape(*states.shape[:3], -1, 64, V).sum(3)
        states = states if by_columns else states.reshape(*states.shape[:4], -1, 64).sum(-1).swapaxes(3, 4)
    return None if q is None else as_input(out), as_input(states), as_input(dots) if own or partner is not None else None


def plain_twin(q, k, v, decay, state, partner=None, against=None, *, both=True, precise=False, terms=3, every=None, **options):
    """What `twin` promises."""
    other = met = None
    if both:
        turned = None if state is None else state.swapaxes(2, 3)
        other, _, _ = plain_sweep(partner, v, k, decay, turned, **options)
    groups = every if against is None else None
    out, states, dots = plain_sweep(q, k, v, decay, state, partner if precise else None, every=groups, **options)
    if against is not None:
        met = plain_sweep(q, k, v, decay, state, against=against, every=every, **options)[1]
    return out, other, states if terms == 3 else None, met, dots


def plain_gradient(reads, writes, first, met, decay, *, T, scale=1.0, interpret=False):
    """What `log_decay.gradient` promises, token by token in float64."""
    del interpret
    each, met = (np.asarray(x, np.float64) * scale for x in (reads.sum(2) - writes.sum(2), met.sum(3)))
    first = np.zeros(met.shape[:2]) if first is None else np.asarray(first, np.float64).sum(2) * scale
    step = np.diff(np.float64(decay[..., 0, :]), axis=-1, prepend=0.0)
    step = np.broadcast_to(step, (*each.shape[:2], -(-T // 64), 64)).reshape(*each.shape[:2], -1)
    found, size = np.zeros((*each.shape[:2], T)), 64 * decays.GROUP
    for b, n, begin in np.ndindex(*met.shape):
        begin *= size
        end, sum_ = min(begin + size, T), met[b, n, begin // size]
        for t in reversed(range(begin, end)):
            found[b, n, t] = sum_ = 0.0 if step[b, n, t] <= decays.NEGLIGIBLE else sum_ + each[b, n, t]
        heard = int(np.argmax([*(step[b, n, begin:end] <= decays.NEGLIGIBLE), True]))
        missed = (met[b, n, begin // size - 1] if begin else first[b, n]) - sum_
        found[b, n, begin : begin + heard] += missed * (1 - np.arange(heard) / max(heard, 1))
    return jnp.asarray(np.moveaxis(found, 2, 1), jnp.float32)


@pytest.fixture
def plain(monkeypatch):
    """Sweeps without a kernel; gradients anchored, and pieces cut, at every chunk."""
    monkeypatch.setattr(decays, 'GROUP', 1)
    monkeypatch.setattr(pieces, 'sweep', plain_sweep)
    monkeypatch.setattr(pieces, 'twin', plain_twin)
    monkeypatch.setattr(mosaic_gpu, 'gradient', plain_gradient)
    last = lambda k, v, decay, **options: plain_sweep(None, k, v, decay, None, **options)[1]
    monkeypatch.setattr(pieces.of_pieces, 'states', last)
    monkeypatch.setattr(apart, 'choose', lambda chosen, one, other: one() if chosen else other())
    monkeypatch.setattr(per_channel, 'choose', lambda chosen, one, other, *args: one(*args) if chosen else other(*args))
    monkeypatch.setattr(mosaic_gpu, 'refuse', lambda *_, **__: None)


def gradients(function, case):
    arrays, ids, cotangents = case.arrays()
    arrays = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    names = [name if case.trained or name != 'log_decay' else None for name in check.NAMES]
    return check.gradients(function, arrays, ids, cotangents, case.scale, names=names)


CASES = [
    check.Case('shared heads', T=50, N=2, heads=1, K=64, V=64, resets=0.1, erase=0.1, scale=0.5),
    check.Case('none', T=30, K=40, V=64, decay='none', state=False),
    check.Case('pieces', T=150, N=1, K=64, V=64, resets=0.02),
    check.Case('constant, pieces', T=128, N=1, K=64, V=64, decay='head'),
    check.Case('constant, pieces, not trained', T=128, N=1, K=64, V=64, decay='head', trained=False),
    check.Case('highest', T=150, N=2, heads=1, K=64, V=64, resets=0.02, scale=0.5, precision='highest'),
    check.Case('highest, constant, widths 64, 128', T=100, N=1, K=64, V=128, decay='head', precision='highest'),
    check.Case('highest, not trained', T=70, N=1, K=64, V=64, state=False, trained=False, precision='highest'),
    check.Case('channel', T=150, N=2, heads=1, K=64, V=64, decay='channel', resets=0.03, scale=0.5),
    check.Case('channel, pieces', T=150, N=1, K=64, V=64, decay='channel', resets=0.02),
    check.Case('channel, near the span', T=70, N=1, K=64, V=64, decay='channel', strength=(1.9, 2.05)),
    check.Case('channel, strong', T=40, N=1, K=64, V=64, decay='channel', strength=(0.0, 50.0)),
]


@pytest.mark.quick('shared heads', 'none', 'constant, pieces', 'highest', 'channel', 'channel, strong')
@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_derivatives_and_pieces(plain, monkeypatch, case):
    with emulated(monkeypatch, common, scaling):
        got = gradients(functools.partial(mosaic_gpu.gated_linear, precision=case.precision), case)
    with jax.enable_x64(True):
        want = gradients(functools.partial(check.oracle, dtype=jnp.float64), case)
    assert got.keys() == want.keys()
    for name in want:
        scale = np.abs(want[name]).max()
        # cumulative decays are in float32, and every step that erases adds 128 to them
        np.testing.assert_allclose(got[name], want[name], atol=1e-4 * scale, err_msg=name)


def test_scaled_terms_hold_what_float32_does(plain, monkeypatch):
    """Of 16-bit arrays, with sweeps that are exact."""
    case = check.Case('terms', T=70, N=1, K=64, V=64, decay='channel', resets=0.03, scale=0.5)
    run = lambda function, *wide: check.gradients(function, *case.arrays(), case.scale, *wide)
    with emulated(monkeypatch, common, scaling):
        got = run(mosaic_gpu.gated_linear)
    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, run(check.oracle, jnp.float64))
    for name in ('state', 'dstate', 'dlog_decay'):
        error = np.linalg.norm(np.asarray(got[name]) - want[name]) / np.linalg.norm(want[name])
        assert error < 1e-6, (name, error)  # 7e-8, 6e-8, 2e-7; with two terms in place of three the state's is 2.6e-6


@pytest.mark.parametrize('terms, bits', [(1, 8), (2, 17), (3, 24)])
def test_terms_add_up(terms, bits):
    """The first is the nearest, and what is not finite stays so."""
    x = np.float32(np.random.default_rng(0).normal(size=1000) * 2.0 ** np.arange(-60, 40, 0.1))
    parts = accumulate.split(jnp.asarray(x), terms, jnp.bfloat16)
    error = np.abs(sum(np.float64(part) for part in parts) / x - 1).max()
    assert 0.4 < error * 2**bits <= 1 if terms < 3 else error == 0
    assert (np.abs(np.float64(parts[0]) / x - 1) <= 2.0**-8).all()
    lost = sum(accumulate.split(jnp.asarray([jnp.nan, jnp.inf, -jnp.inf]), terms, jnp.bfloat16))
    assert not np.isfinite(np.float32(lost)).any()


def test_pieces_fill_the_chip_only_where_it_is_empty():
    assert pieces.number(8, 2048, 16, 128, 128) == 1
    assert pieces.number(1, 65536, 16, 128, 128) == 8
    assert pieces.number(1, 1024, 1, 128, 128) == 2


@pytest.mark.quick('True-head', 'False-channel', 'True-none', 'True-channel', 'False-token')
@pytest.mark.parametrize('decay', ['none', 'head', 'token', 'channel'])
@pytest.mark.parametrize('beta', [False, True])
def test_one_token(monkeypatch, decay, beta):
    """Of 16 tiles, four a warpgroup."""
    monkeypatch.setattr(common, 'PROCESSORS', 1)
    (q, k, v, g, state), _, _ = check.Case('step', T=1, B=2, N=2, heads=1, K=40, V=80, decay=decay).arrays()
    strength = jnp.asarray([[[0.3, 1.0]], [[0.0, 2.0]]]) if beta else None
    got = decode.one_token((0.5, True), q, k, v, strength, g, state)
    narrow = lambda x: x if x is None or x.ndim == 1 else x[:, 0]
    want = decode.plain((0.5,), *map(narrow, (q, k, v, strength, g)), state)
    np.testing.assert_allclose(np.float32(got[0][:, 0]), np.float32(want[0]), rtol=1e-2, atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('width', [64, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize('precision', [None, 'highest'])
def test_interpreted_with_race_detection(width, precision):
    case = check.Case('small', T=70, N=1, K=width, V=width, resets=0.05, precision=precision)
    good, errors = check.check(case, interpret=True)
    assert good, errors


def in_two_parts(kernel, at: int):
    """The kernel on the tokens before `at`, then on the others, from the state that it came to."""

    def run(*arrays, initial_state, **options):
        part = lambda tokens: [x if x is None or x.ndim < 2 else x[:, tokens] for x in arrays]
        first, state = kernel(*part(slice(at)), initial_state=initial_state, **options)
        second, state = kernel(*part(slice(at, None)), initial_state=state, **options)
        return jnp.concatenate([first, second], axis=1), state

    return run


@pytest.mark.parametrize('decay', ['token', pytest.param('head', marks=pytest.mark.slow)])
def test_interpreted_in_two_calls(decay):
    """As good as in one, gradients too."""
    case = check.Case('two calls', T=90, N=1, K=64, V=64, decay=decay)
    good, errors = check.check(case, interpret=True, kernel=in_two_parts(mosaic_gpu.gated_linear, 37))
    assert good, errors


@pytest.mark.parametrize(
    'T, N, parts, X, decay, first',
    [(600, 3, (2, 1), 64, 'token', True), (70, 4, (1, 1), 1, 'token', False), (1024, 1, (1, 2), 40, 'head', True)],
)
def test_gradient_of_log_decay(T, N, parts, X, decay, first):
    """Steps that erase, and such that nothing is felt through."""
    rng, chunks = np.random.default_rng(T), -(-T // 64)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    given = -rng.uniform(0.0, 0.5, {'head': N, 'token': (2, T, N)}[decay])
    given = given if decay == 'head' else np.where(rng.random(given.shape) < 0.01, rng.choice([-np.inf, -50.0]), given)
    given = jnp.asarray(given, jnp.float32)
    dots = (normal(2, N, count, 64 * chunks).at[..., T:].set(0.0) for count in parts)
    ends = normal(2, N, X) if first else None, normal(2, N, -(-chunks // decays.GROUP), X)
    args = *dots, *ends, decays.cumulative(decays.steps(given, None), T, given)
    got, want = (f(*args, T=T, scale=0.5, interpret=True) for f in (log_decay.gradient, plain_gradient))
    np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize('reverse, decay', [(False, 'token'), (True, 'token'), (False, 'head')])
def test_states_of_pieces(reverse, decay):
    """As a sweep finds them."""
    resets = 0.05 if decay == 'token' else 0.0
    (_, k, v, log_decay, _), ids, _ = check.Case('', T=128, N=2, heads=1, K=64, V=128, decay=decay, resets=resets).arrays()
    decay = decays.cumulative(decays.steps(log_decay, ids), 128)
    got = states.states(k, v, decay, reverse=reverse, interpret=True)
    want = sweep.sweep(None, k, v, decay, None, reverse=reverse, interpret=True)[1]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize('decay, trained', [('channel', True), ('head', False)])
def test_interpreted_in_pieces(monkeypatch, decay, trained):
    monkeypatch.setattr(decays, 'GROUP', 1)
    resets = 0.02 if trained else 0.0
    case = check.Case('pieces', T=128, N=1, K=64, V=64, decay=decay, resets=resets, scale=0.5, trained=trained)
    assert pieces.number(1, case.T, 1, 64, 64) == 2
    good, errors = check.check(case, interpret=True)
    assert good, errors


@pytest.mark.parametrize(
    'K, V, channels',
    [
        (128, 128, ()),
        (128, 128, (128,)),
        pytest.param(256, 64, (), marks=pytest.mark.slow),
        pytest.param(256, 128, (256,), marks=pytest.mark.slow),
        pytest.param(64, 128, (64,), marks=pytest.mark.slow),
    ],
)
def test_lowers_for_hopper(K, V, channels):
    x = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    ones = x(1, 1000, 4, K), x(1, 1000, 4, K), x(1, 1000, 4, V), x(1, 1000, 4, *channels, dtype=jnp.float32)
    loss = lambda *a: mosaic_gpu.gated_linear(*a)[0].astype(jnp.float32).sum()
    allowed = [jax.export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')]
    jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2, 3))), platforms=['cuda'], disabled_checks=allowed)(*ones)


def test_a_few_numbers_are_drawn_several_times():
    """The draws count as one result, and a single run that is wrong fails."""
    runs = []

    def kernel(*arrays, interpret, precision, **options):
        out, state = check.oracle(*arrays, dtype=jnp.float32, **options)
        runs.append(len(runs))
        return out * (1 + spoilt.get(len(runs), 0.0)), state

    case = check.Case('few', T=4, N=2, K=8, V=8, decay='head')
    spoilt = {}
    good, errors = check.check(case, interpret=True, kernel=kernel)
    assert good and len(runs) == check.DRAWS and errors['dlog_decay'][0] == errors['dlog_decay'][1]
    runs.clear()
    spoilt[3] = 0.5
    good, errors = check.check(case, interpret=True, kernel=kernel)
    assert not good and errors['dlog_decay'][0] > 1e-2 and errors['out'][0] == errors['out'][1]


@pytest.mark.parametrize(
    'change, words',
    [
        ({'dtype': jnp.float32}, 'must be bfloat16, given float32'),
        ({'V': 320}, 'widths up to 256, given 320'),
        ({'chunk': 32}, 'chunks of 64, given chunk=32'),
        ({'scale': 0.0}, 'other than 0'),
    ],
)
def test_refusals(change, words):
    dtype, T, V = change.get('dtype', jnp.bfloat16), change.get('T', 64), change.get('V', 64)
    x = jnp.zeros((1, T, 2, 64), dtype)
    options = {name: change[name] for name in ('chunk', 'scale') if name in change}
    reason = mosaic_gpu.unsupported(x, x, jnp.zeros((1, T, 2, V), dtype), **options)
    assert words in reason
    with pytest.raises(ValueError, match='gated_linear on mosaic_gpu'):
        mosaic_gpu.gated_linear(x, x, jnp.zeros((1, T, 2, V), dtype), **options)


def test_highest_wants_no_decay_per_channel():
    x = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
    assert 'decay per channel' in mosaic_gpu.unsupported(x, x, x, jnp.zeros(x.shape), precision='highest')
    assert 'decay per channel' not in (mosaic_gpu.unsupported(x, x, x, jnp.zeros(x.shape[:3]), precision='highest') or '')
    one = x[:, :1]
    assert 'decay per channel' not in (mosaic_gpu.unsupported(one, one, one, jnp.zeros(one.shape), precision='highest') or '')


@pytest.mark.gpu
@pytest.mark.parametrize('case', check.CASES, ids=lambda c: c.name)
def test_grid(case):
    good, errors = check.check(case)
    assert good, errors


def test_what_is_not_finite_stays_in_its_document(plain):
    """Outputs, last state and gradients of the other documents are as without it."""
    (q, k, v, g, state), _, cotangents = check.Case('documents', T=80, N=2, K=64, V=64).arrays()
    ids = jnp.asarray(np.repeat([0, 1, 2], [30, 25, 25])[None], jnp.int32)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    other = np.repeat([True, False, True], [30, 25, 25])

    def run(v, k):
        f = lambda q, k, v, g: mosaic_gpu.gated_linear(q, k, v, g, initial_state=state, segment_ids=ids)
        (out, last), pull = jax.vjp(f, q, k, v, g)
        do = jnp.where(other[None, :, None, None], cotangents[0].astype(jnp.float32), 0)
        return out, *pull((do, cotangents[1])), last

    spoilt = run(v.at[0, 40, 0, 3].set(jnp.nan), k.at[0, 50, 1, 0].set(jnp.inf))
    clean = run(v, k)
    assert np.isnan(spoilt[0][0, 40:55, 0]).all() and np.isnan(spoilt[0][0, 50:55, 1]).all()
    for got, want in zip(spoilt[:-1], clean):
        np.testing.assert_allclose(got[:, other], want[:, other], atol=1e-5)
    np.testing.assert_allclose(spoilt[-1], clean[-1], atol=1e-5)
