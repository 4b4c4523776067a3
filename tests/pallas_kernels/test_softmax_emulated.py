"""The Hopper softmax attention kernels, run on a CPU by `emulation` and held to the gate that they pass on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.ops.softmax_attention import xla
from pallas_kernels import blocks, common
from pallas_kernels import dropout as dropout_lib
from pallas_kernels import elementwise as ew
from pallas_kernels.softmax_attention import (
    backward,
    check,
    diagonal,
    forward,
    functions,
    mosaic_gpu,
    schedule,
    tables,
    tiles,
    wide,
)
from tests.pallas_kernels import emulation

causal = ew.as_mask(check.causal)
slopes = jnp.asarray([0.5, 0.125])
sinks_before = ew.as_mask(check.global_window(100, 4))
CASES = {
    'causal, grouped': check.Case('', B=1, T=140, N=2, K=1, mask=causal, sinks=True),
    'alibi': check.Case('', B=1, T=140, N=2, H=128, mask=causal, score=lambda r, c: check.alibi(slopes)),
    'alibi, then softcap': check.Case('', B=1, T=70, N=2, score=lambda r, c: check.alibi(slopes) >> check.softcap(5.0)),
    'softcap': check.Case('', B=1, T=140, N=1, H=128, mask=causal, score=check.softcap(5.0)),
    'documents': check.Case(
        '', B=2, T=140, N=1, mask=lambda c: causal & check.segments(jnp.asarray(check.documents(c.B, c.T, 50, 1)))
    ),
    'strip': check.Case('', B=1, T=140, S=100, N=2, mask=causal, score=check._random('hd')),
    'dropout': check.Case('', B=1, T=140, N=1, mask=causal, dropout=dropout_lib.Dropout(0.2, 7)),
    'wide': check.Case('', B=1, T=140, N=2, H=136, mask=causal, score=check.softcap(5.0)),
    'shared key tile': check.Case('', B=1, T=700, N=1, H=128, mask=sinks_before),
}


QUICK = ('causal, grouped',)


@pytest.mark.parametrize('name', [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_emulated_kernels_pass_the_gate(name, monkeypatch):
    case = CASES[name]
    if name == 'shared key tile':
        assert len(schedule.divided(blocks.classify(case.mask, 1, 1, case.T, case.T, 64, 128))) > 6
    passes(case, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize('H, tail', [(64, 0), (128, 0), (128, 3)])
def test_emulated_order_passes_the_gate(H, tail, monkeypatch):
    """dQ made 16-bit by later blocks, of heads that have ended and of the last ones; heads launched in turn."""
    monkeypatch.setattr(schedule, 'processors', lambda: 4 if tail else 2)
    hidden = lambda c: CASES['documents'].mask(c) & ew.as_mask(lambda i: i.q < 130)  # a query tile that no block visits
    case = check.Case('', B=1, T=270, N=5, H=H, mask=causal if tail else hidden)
    monkeypatch.setattr(schedule, 'TAIL', tail)
    if tail:
        classes = blocks.classify(causal, 1, 1, case.T, case.T, tiles.backward(H, H).queries, 128)
        lists = schedule.schedule(classes, schedule.divided(classes))[0]
        assert schedule.in_turn(lists, case.N, tail) is not None
    passes(case, monkeypatch)


def passes(case, monkeypatch):
    plain = lambda kernel, spec: lambda arrays, metadata, operands: kernel(*arrays, *metadata, operands, spec=spec)
    monkeypatch.setattr(mosaic_gpu, '_over_batches', plain)  # `custom_vmap` would trace what is to run here
    monkeypatch.setattr(check, 'FEW', 0)  # XLA makes the gradients of few numbers
    monkeypatch.setattr(jax, 'jit', lambda f, **_: f)
    with emulation.emulated(monkeypatch, common, backward, diagonal, forward, functions, tables, wide):
        result = check.errors(case, mosaic_gpu.softmax_attention, repeat=False)
    assert check.verdict({x: result[x] for x in ('out', 'lse', 'dq', 'dk', 'dv')}) is None


@pytest.mark.slow
def test_emulated_statistics(monkeypatch):
    monkeypatch.setattr(jax, 'jit', lambda f, **_: f)
    with emulation.emulated(monkeypatch, common, forward, functions, tables):
        assert check.statistics_agree(mosaic_gpu.softmax_attention) is None


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('bad', [(), (jnp.nan,), (jnp.inf, -jnp.inf), (-jnp.inf,)])
def test_what_is_not_finite_is_cleaned(dtype, bad, monkeypatch):
    x = np.random.default_rng(0).standard_normal((2, 64, 128)).astype(dtype)
    x[0, 0, 0] = jnp.finfo(dtype).max
    want = x.copy()
    for n, value in enumerate(bad):
        x[n, 5 + n, 100] = value
        want[n, 5 + n, 100] = 0
    with emulation.emulated(monkeypatch, common):
        common.clean([emulation.Ref(x[0]), emulation.Ref(x[1])])
    np.testing.assert_array_equal(x, want)


@pytest.mark.slow
def test_wide_counts_what_is_not_finite_as_zero(monkeypatch):
    """Above width 128, NaN comes in by the log-sum-exp alone: as if zeros stood in its place, bit for bit."""
    nan, inf = jnp.nan, jnp.inf
    rng = np.random.default_rng(0)
    q, k, v, do = (jnp.asarray(rng.standard_normal((1, 200, 2, 136)), jnp.bfloat16) for _ in range(4))
    lse, delta = (jnp.asarray(rng.standard_normal((1, 2, 200)) + middle, jnp.float32) for middle in (8, 0))
    q, do = q.at[0, 10, 0].set(nan).at[0, 140, 1, 2].set(inf), do.at[0, 12, 0, 7].set(nan).at[0, 150].set(-inf)
    k, v = k.at[0, 130].set(nan).at[0, 20, 1, 3].set(inf), v.at[0, 131, 1, 5].set(nan).at[0, 60, 0].set(inf)
    lse = lse.at[0, 0, 10].set(nan).at[0, 1, 140].set(backward.HIDDEN).at[0, 0, 12].set(nan).at[0, :, 150].set(nan)
    mask = ew.as_mask(lambda i: (i.k <= i.q) & (i.k > i.q - 30) & (i.k != 130) & (i.k != 60))
    zeros = [jnp.where(jnp.isfinite(x), x, 0) for x in (q, k, v, do)]
    with emulation.emulated(monkeypatch, common, functions, wide):
        found, want = (mosaic_gpu._wide(0.1, *x, lse, delta, mask, None, None) for x in ((q, k, v, do), zeros))
    for x, y in zip(found, want):
        assert jnp.isnan(y).any()
        np.testing.assert_array_equal(x.astype(jnp.float32), y.astype(jnp.float32))


@pytest.mark.slow
def test_emulated_backward_of_parts(monkeypatch):
    """Gradients of two parts of the keys, from output and log-sum-exp over both: together those of one call."""
    case = check.Case('', B=1, T=140, N=2, H=64, mask=causal)
    rng = np.random.default_rng(0)
    q, k, v, do = (jnp.asarray(rng.standard_normal((1, 140, 2, 64)), jnp.bfloat16) for _ in range(4))
    plain = lambda kernel, spec: lambda arrays, metadata, operands: kernel(*arrays, *metadata, operands, spec=spec)
    exact = lambda q, k, v: xla(q, k, v, mask=case.mask, return_lse=True)
    (out, lse), pull = jax.vjp(exact, *(x.astype(jnp.float32) for x in (q, k, v)))
    want = pull((do.astype(jnp.float32), jnp.zeros_like(lse)))
    seen = out, lse, do, jnp.zeros_like(lse)
    monkeypatch.setattr(mosaic_gpu, '_over_batches', plain)
    monkeypatch.setattr(jax, 'jit', lambda f, **_: f)
    with emulation.emulated(monkeypatch, common, backward, forward, functions, wide):

        def part(first, last):
            mask = ew.as_mask(lambda i: i.k + first <= i.q)
            return mosaic_gpu.softmax_attention_backward(q, k[:, first:last], v[:, first:last], seen=seen, mask=mask)

        (dq, dk, dv, _), (more, *others, _) = part(0, 72), part(72, 140)
    got = dq.astype(jnp.float32) + more.astype(jnp.float32), *(jnp.concatenate(x, 1) for x in zip((dk, dv), others))
    for x, y in zip(got, want):
        assert jnp.linalg.norm(x - y) <= 5e-3 * jnp.linalg.norm(y)
