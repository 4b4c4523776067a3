"""The correctness gate of the softmax attention kernel: a quadratic oracle and a grid of cases.

The kernel's output, log-sum-exp and every gradient are compared with the oracle in float64. Its error may be at most
twice that of the oracle run in the kernel's own precision (16-bit operands of every product and a 16-bit output,
float32 sums), and a second run must be bit-equal. Cases with poison put NaN or Inf into inputs: what may see it must be
NaN, all else as if 0 stood there. On a GPU machine

    python -m pallas_kernels.softmax_attention.check [words] [--part i/n] [--tiles FILE] [--run]

runs the whole grid, or the cases whose name contains one of the words, or every n-th of them; with --tiles by the
choices of `tiles` in that file; with --run only runs the kernels, without comparing, for compute-sanitizer.
"""

import dataclasses
import functools
import os
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dropout as dropout_lib
from pallas_kernels import elementwise as ew
from pallas_kernels import statistics

FACTOR = 2.0
FEW, DRAWS = 16, 8  # results of so few numbers are drawn so many times
ROUNDING = 1e-3  # relative, in the 2-norm: less than one rounding to bfloat16 everywhere
FLOOR = 1e-4  # relative; an error below is that of fast exp and tanh and is not compared


def oracle(query, key, value, *, mask=None, score=None, scale=None, sinks=None, dropout=None, precision=jnp.float64):
    """Quadratic attention and lse. In 16-bit `precision`, products round their operands to it; sums are float32."""
    (_, T, N, H), (S, K) = query.shape, key.shape[1:3]
    wide = jnp.float64 if precision == jnp.float64 else jnp.float32
    scale = H**-0.5 if scale is None else scale
    if precision == jnp.float64:
        dot = functools.partial(jnp.einsum, precision='highest')
    else:
        dot = functools.partial(_rounded_einsum, precision)
    q, k, v = (x.astype(wide) for x in (query, jnp.repeat(key, N // K, 2), jnp.repeat(value, N // K, 2)))
    s = dot('btnh,bsnh->bnts', q, k) * scale
    i = ew.Index(*(jax.lax.broadcasted_iota(jnp.int32, s.shape, a) for a in range(4)), T, S)
    seen = True if mask is None else _call(ew.as_mask(mask), i)
    if score is not None:
        s = _call(ew.as_score(score), i, s)
    s = jnp.where(seen, s, -jnp.inf)
    top = jax.lax.stop_gradient(s.max(-1, keepdims=True))
    empty = top == -jnp.inf
    top = jnp.where(empty, 0, top)
    p = jnp.exp(s - top)
    total = p.sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.where(empty, 0, jnp.exp(sinks.astype(wide)[:, None, None] - top))
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0]
    factor = 1.0
    if dropout is not None:
        factor = jnp.where(dropout_lib.keep(dropout.seed, *i[:4], dropout.rate), dropout.inverse_keep, 0.0)
    if wide == jnp.float64:
        return dot('bnts,bsnh->btnh', p / total * factor, v), lse
    sink = jnp.zeros(N) if sinks is None else sinks.astype(wide)
    return _rounded_softmax(precision, s, v, sink, jnp.asarray(factor, wide), lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded_softmax(precision, s, v, sink, factor, lse):
    p = jnp.exp(s - jnp.where(lse == -jnp.inf, 0, lse)[..., None])
    return _rounded_einsum(precision, 'bnts,bsnh->btnh', p * factor, v).astype(precision), lse


def _rounded_softmax_fwd(precision, s, v, sink, factor, lse):
    out = _rounded_softmax(precision, s, v, sink, factor, lse)
    return out, (s, v, sink, factor, *out)


def _rounded_softmax_bwd(precision, saved, cotangents):
    # As every implementation that keeps the 16-bit output only: sum(p * dp) is had from it, as sum(out * dout).
    (s, v, sink, factor, out, lse), (do, dlse) = saved, cotangents
    base = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    p = jnp.exp(s - base[..., None])
    do = do.astype(jnp.float32)
    delta = jnp.where(lse == -jnp.inf, 0, (do * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2) - dlse)
    dv = _rounded_einsum(precision, 'bnts,btnh->bsnh', p * factor, do)
    dp = _rounded_einsum(precision, 'btnh,bsnh->bnts', do, v) * factor
    dsink = -(jnp.exp(sink[:, None] - base) * delta).sum((0, 2))
    return p * (dp - delta[..., None]), dv, dsink, None, None


_rounded_softmax.defvjp(_rounded_softmax_fwd, _rounded_softmax_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded_einsum(precision, formula, a, b):
    r = lambda x: x.astype(precision)
    return jnp.einsum(formula, r(a), r(b), preferred_element_type=jnp.float32)


def _rounded_einsum_bwd(precision, formula, saved, g):
    a, b = saved
    ia, rest = formula.split(',')
    ib, io = rest.split('->')
    dot = functools.partial(_rounded_einsum, precision)
    return dot(f'{io},{ib}->{ia}', g, b), dot(f'{io},{ia}->{ib}', g, a)


_rounded_einsum.defvjp(lambda *args: (_rounded_einsum(*args), args[2:]), _rounded_einsum_bwd)


def _call(f, i, *logits):
    operands, call = ew.flatten(f)
    at = dict(zip('bhqk', i[:4]), d=i.k - i.q + (i.q_len - 1))
    pick = lambda o: tuple(0 if c in 'bh' and n == 1 else at[c] for c, n in zip(o.index, o.array.shape))
    values = [jnp.asarray(o.array)[pick(o)] if o.index else jnp.asarray(o.array) for o in operands]
    return call(*logits, i, values)


# The vocabulary of the grid


def causal(i):
    return i.k <= i.q + (i.k_len - i.q_len)


def window(size):
    return lambda i: causal(i) & (i.k > i.q + (i.k_len - i.q_len) - size)


def _same(i, a, b):
    return jnp.where(a > 0, a, -1) == jnp.maximum(b, 0)  # `(a == b) & (a > 0)`, with one comparison of pairs


def segments(query_ids, key_ids=None):
    key_ids = query_ids if key_ids is None else key_ids
    return ew.Mask(_same, (ew.Operand(query_ids, 'bq'), ew.Operand(key_ids, 'bk')))


def documents(B, T, length, seed=None):
    """Ids from 1 on; every third document of random length when seeded, with padding (0) at the end."""
    if seed is None:
        return np.tile(np.arange(T) // length + 1, (B, 1)).astype(np.int32)
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, T, (B, max(T // length, 1))), -1)
    ids = (np.arange(T)[None, None] >= cuts[..., None]).sum(1) + 1
    return np.where(np.arange(T) >= T - T // 10, 0, ids).astype(np.int32)


def prefix_lm(n):
    return lambda i: causal(i) | (i.k < n)


def global_window(size, count):
    return lambda i: causal(i) & ((i.k > i.q + (i.k_len - i.q_len) - size) | (i.k < count))


def softcap(cap):
    return ew.as_score(lambda s, i: cap * jnp.tanh(s / cap))


def alibi(slopes):
    f = lambda s, i, slope: s - slope * (i.q + (i.k_len - i.q_len) - i.k).astype(jnp.float32)
    return ew.Score((ew.Term(f, (ew.Operand(slopes, 'h'),)),))


def added(array, index):
    return ew.Score((ew.Term(lambda s, i, a: s + a.astype(s.dtype), (ew.Operand(array, index),)),))


@dataclasses.dataclass
class Case:
    name: str
    B: int = 2
    T: int = 128
    S: int | None = None
    N: int = 2
    K: int | None = None
    H: int = 64
    Hv: int | None = None
    mask: Any = None  # a mask, or a function of the case
    score: Any = None
    sinks: bool = False
    dropout: Any = None
    dtype: Any = jnp.bfloat16
    dlse: bool = True
    poison: Any = None  # {'q', 'k', 'v', 'do', 'dlse' or 'score': [(index, value), ...]}; values at the same places of
    # the case without poison are 0

    def __post_init__(self):
        self.S, self.K, self.Hv = self.S or self.T, self.K or self.N, self.Hv or self.H

    def inputs(self, seed=0):
        rng = np.random.default_rng(seed)
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32)).astype(self.dtype)
        c = self
        q, k, v = draw(c.B, c.T, c.N, c.H), draw(c.B, c.S, c.K, c.H), draw(c.B, c.S, c.K, c.Hv)
        do = draw(c.B, c.T, c.N, c.Hv)
        dlse = jnp.asarray(rng.standard_normal((c.B, c.N, c.T), np.float32)) * bool(c.dlse)
        sinks = jnp.asarray(rng.standard_normal(c.N, np.float32)) if c.sinks else None
        score = c.score(rng, c) if callable(c.score) else c.score
        mask = c.mask(c) if callable(c.mask) else c.mask
        return (q, k, v, score, sinks), mask, do, dlse

    def poisoned(self, inputs, clean=False):
        """The inputs with the poison in its places, or with 0 there."""
        (q, k, v, score, sinks), mask, do, dlse = inputs

        def put(x, name):
            for index, value in (self.poison or {}).get(name, []):
                x = x.at[index].set(0.0 if clean else value)
            return x

        score = jax.tree.map(lambda x: put(x, 'score'), score)
        return (put(q, 'q'), put(k, 'k'), put(v, 'v'), score, sinks), mask, put(do, 'do'), put(dlse, 'dlse')

    def spoilt(self, inputs) -> dict:
        """Where NaN must come out, for poisoned inputs: {name: boolean array or one boolean}."""
        (q, k, v, score, _), mask, do, dlse = inputs
        c, G = self, self.N // self.K
        bad = lambda x: np.asarray(~jnp.isfinite(x).all(-1))
        i = ew.Index(*np.ogrid[: c.B, : c.N, : c.T, : c.S], c.T, c.S)
        i = i._replace(**{x: jnp.asarray(getattr(i, x)) for x in 'bhqk'})
        seen = np.ones((c.B, c.N, c.T, c.S), bool) if mask is None else np.asarray(_call(mask, i))
        seen = np.broadcast_to(seen, (c.B, c.N, c.T, c.S))
        keys = np.repeat((bad(k) | bad(v)).swapaxes(1, 2), G, 1)
        row = (seen & keys[:, :, None]).any(-1) | (bad(q).swapaxes(1, 2) & seen.any(-1))
        live = np.asarray((do != 0).any(-1).swapaxes(1, 2) | (dlse != 0)) & seen.any(-1)
        back = live & (row | bad(do).swapaxes(1, 2) | ~np.isfinite(dlse))
        hit = back[..., None] & seen
        of_keys = lambda hit: hit.any(2).reshape(c.B, c.K, G, c.S).any(2).swapaxes(1, 2)[..., None]
        kept = hit if c.dropout is None else hit & np.asarray(dropout_lib.keep(c.dropout.seed, *i[:4], c.dropout.rate))
        rows = lambda x: x.swapaxes(1, 2)[..., None]
        spoilt = {
            'out': rows(row),
            'lse': row,
            'dq': rows(back),
            'dk': of_keys(hit),
            'dv': of_keys(kept),
            'dsinks': back.any((0, 2)),
        }
        if score is not None:
            (operand,) = ew.flatten(score)[0]
            if operand.index == 'hd':
                d = np.arange(c.S) - np.arange(c.T)[:, None] + c.T - 1
                count = lambda x: np.bincount(d[x], minlength=c.T + c.S - 1)
                spoilt['dscore'] = np.stack([count(x) for x in hit.any(0)]) > 0
            else:
                spoilt['dscore'] = hit.any(tuple(a for a, x in enumerate('bhqk') if x not in operand.index))
        return spoilt


def _random(index):
    """A score that adds a random operand with this index."""

    def make(rng, c):
        sizes = {'b': c.B, 'h': c.N, 'q': c.T, 'k': c.S, 'd': c.T + c.S - 1}
        return added(jnp.asarray(rng.standard_normal([sizes[x] for x in index], np.float32)), index)

    return make


def grid() -> list[Case]:
    plain = lambda f: lambda c: ew.as_mask(f)
    of_docs = lambda length: lambda c: ew.as_mask(causal) & segments(jnp.asarray(documents(c.B, c.T, length, 1)))
    # batch 0 sees nothing
    hidden = lambda c: ew.Mask(lambda i, n: i.k < n, (ew.Operand(jnp.arange(c.B) * (c.S // 2), 'b'),))
    cases = []
    for T in (1, 63, 128, 1000, 4096):
        for name, mask in (('full', None), ('causal', plain(causal))):
            for H in (64, 128):
                cases.append(Case(f'{name} T={T} H={H}', T=T, H=H, mask=mask, B=1 if T > 2000 else 2))
    cases += [
        Case('full T<S', T=100, S=300, H=128),
        Case('causal T<S', T=100, S=300, mask=plain(causal)),
        Case('causal T>S', T=300, S=100, H=128, mask=plain(causal)),
        Case('one query', T=1, S=1000, N=8, K=2, H=128, mask=plain(causal)),
        Case('window', T=1000, H=128, mask=plain(window(100))),
        Case('window H=64', T=1000, mask=plain(window(300))),
        Case('prefix', T=700, H=128, mask=plain(prefix_lm(200))),
        Case('global window', T=1000, H=128, mask=plain(global_window(100, 4))),
        Case('documents', T=1000, H=128, mask=of_docs(150)),
        Case('documents H=64', T=1000, mask=of_docs(150)),
        Case('hidden rows', T=300, N=8, H=128, mask=hidden, sinks=True),
        Case('gqa', T=300, N=8, K=2, H=128, mask=plain(causal)),
        Case('mqa', T=300, N=4, K=1, mask=plain(causal)),
        Case('gqa full long', B=1, T=2048, N=4, K=2, H=128),
        Case('H=80', T=200, H=80),
        Case('H=40 Hv=128', T=200, H=40, Hv=128, mask=plain(causal)),
        Case('H=128 Hv=64', T=200, H=128, Hv=64),
        Case('f16', T=300, H=128, mask=plain(causal), dtype=jnp.float16),
        Case('sinks', T=300, N=8, H=128, mask=plain(window(50)), sinks=True),
        Case('softcap', T=500, H=128, mask=plain(causal), score=softcap(5.0)),
        Case('softcap H=64', T=500, mask=plain(causal), score=softcap(5.0)),
        Case('alibi', T=500, N=8, H=128, mask=plain(causal), score=lambda r, c: alibi(2.0 ** -jnp.arange(1.0, 9))),
        # each tile of keys raises the running maximum
        Case('rising', T=600, N=8, H=128, sinks=True, score=lambda r, c: ew.as_score(lambda s, i: s + 0.05 * i.k)),
        Case('gelu score', T=200, H=128, score=lambda r, c: ew.as_score(lambda s, i: jax.nn.gelu(s))),
        Case('row operand', T=200, H=128, score=_random('bq')),
        Case('column operand', T=200, H=128, score=_random('hk')),
        Case('bias hqk', T=300, H=128, score=_random('hqk')),
        Case('bias bhqk H=64', T=300, score=_random('bhqk'), mask=plain(causal)),
        Case('strip', T=300, H=128, score=_random('hd'), mask=plain(causal)),
        Case('strip T<S', T=100, S=330, score=_random('d')),
        Case('dropout', T=300, H=128, dropout=dropout_lib.Dropout(0.2, 7)),
        Case('dropout H=64', T=1000, N=8, mask=plain(causal), dropout=dropout_lib.Dropout(0.1, 8), sinks=True),
        Case(
            'everything',
            T=777,
            S=900,
            N=8,
            K=2,
            H=96,
            Hv=72,
            sinks=True,
            mask=lambda c: ew.as_mask(window(300)) | ew.as_mask(lambda i: i.k < 3),
            score=lambda r, c: _random('hd')(r, c) >> softcap(8.0),
            dropout=dropout_lib.Dropout(0.1, 9),
        ),
        Case('H=256', T=300, S=500, H=256, mask=plain(causal)),
        Case('H=256 full', T=200, H=256, N=4, K=2),
        Case('H=192 Hv=128', T=300, H=192, Hv=128, mask=plain(causal), sinks=True),
        Case('H=136', T=100, H=136, Hv=200, score=_random('hd'), mask=plain(window(50))),
        Case('H=256 everything', T=200, H=256, score=softcap(5.0), mask=of_docs(80), dropout=dropout_lib.Dropout(0.1, 3)),
        Case('long keys', B=1, T=1000, S=17100, mask=plain(causal)),
        Case('long queries', B=1, T=17100, S=1000, mask=plain(lambda i: i.k <= i.q)),
    ]
    nan, inf, at = float('nan'), float('inf'), np.s_
    future = {
        'k': [(at[0, 250], nan), (at[1, 130, 0, 3], inf)],
        'v': [(at[0, 251, 1, 5], nan), (at[1, 200], inf)],
        'q': [(at[0, 100, 0], nan), (at[1, 50, 1, 2], inf)],
        'do': [(at[1, 60, 0, 7], nan), (at[0, 20], inf)],
    }
    dead = {'q': [(at[:, 5:9], nan)], 'do': [(at[:, 5:9], 0.0)], 'dlse': [(at[:, :, 5:9], 0.0)]}
    padding = {x: [(at[:, 270:], nan)] for x in ('q', 'k', 'v')}
    beyond = lambda c: ew.as_mask(lambda i: i.k < 150)
    cases += [
        Case('poison causal', T=300, H=128, mask=plain(causal), poison=future),
        Case('poison causal H=64', T=300, H=64, N=4, mask=plain(causal), poison=future, sinks=True),
        Case('poison H=256', T=300, H=256, mask=plain(causal), poison=future),
        Case('poison window', T=300, H=128, N=4, K=2, mask=plain(window(40)), poison=future, dtype=jnp.float16),
        Case('poison padding', T=300, H=128, mask=of_docs(80), poison=padding),
        Case('poison cache', T=20, S=300, H=64, mask=beyond, poison={x: [(at[:, 150:], inf)] for x in ('k', 'v')}),
        Case('poison full', T=300, H=128, poison={'k': [(at[0, 7, 0, 1], -inf)], **dead}),
        Case('poison dropout', T=300, H=64, mask=plain(causal), poison=future, dropout=dropout_lib.Dropout(0.3, 1)),
        Case('poison bias', T=300, mask=plain(causal), score=_random('hqk'), poison={'score': [(at[:, 3, 9:], nan)]}),
        Case('poison and bias', T=300, mask=plain(causal), score=_random('hqk'), poison=future),
        Case('poison strip', T=300, H=128, mask=plain(causal), score=_random('hd'), poison={'k': [(at[:, 299], nan)]}),
    ]
    return cases


def errors(case: Case, attention, seed=0, repeat=True) -> dict:
    """{name: (error of `attention`, of the oracle in its precision, second run equal)}, relative in the 2-norm.

    The error of a few numbers is mostly luck (8 sink gradients: 0.3 to 1.4 times the reference's), so results of at
    most `FEW` numbers are drawn `DRAWS` times, and both errors are root mean squares over the draws.
    """
    first, mask = case.inputs(seed)[:2]
    same_functions = lambda diff: jax.tree.unflatten(jax.tree.structure(first), jax.tree.leaves(diff))

    def compiled(f):
        def call(diff, do, dlse):
            q, k, v, score, sinks = diff
            out, pull = jax.vjp(lambda *a: f(*a), q, k, v, score, sinks)
            return out, pull((do.astype(out[0].dtype), dlse.astype(out[1].dtype)))

        return jax.jit(call)

    options = lambda score, sinks: {'mask': mask, 'score': score, 'sinks': sinks, 'dropout': case.dropout}
    kernel = lambda q, k, v, score, sinks: attention(q, k, v, **options(score, sinks), return_lse=True)
    same = lambda precision: lambda q, k, v, score, sinks: oracle(q, k, v, **options(score, sinks), precision=precision)
    run, reference, exact = compiled(kernel), compiled(same(case.dtype)), compiled(same(jnp.float64))

    def draw(seed):
        diff, *rest = case.inputs(seed)
        inputs = (same_functions(diff), *rest)  # a score's function made anew would be compiled anew
        poisoned = case.poisoned(inputs)
        spoilt = case.spoilt(poisoned) if case.poison else {}
        diff, _, do, dlse = case.poisoned(inputs, clean=True)
        given = (poisoned[0], *poisoned[2:]) if case.poison else (diff, do, dlse)
        ours = jax.device_get(run(*given))
        again = jax.device_get(run(*given)) if repeat else ours
        theirs = jax.device_get(reference(diff, do, dlse))
        with jax.enable_x64(True):
            widen = lambda x: x.astype(jnp.float64) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x
            truth = jax.device_get(exact(jax.tree.map(widen, diff), widen(do), widen(dlse)))
        names = ['out', 'lse', 'dq', 'dk', 'dv', 'dscore', 'dsinks']
        grads = {'dq': 0, 'dk': 1, 'dv': 2}
        flat = lambda r: [*r[0], *r[1]]
        result, sizes = {}, {}
        for name, a, a2, b, c in zip(names, flat(ours), flat(again), flat(theirs), flat(truth)):
            for x, x2, y, z in zip(*(jax.tree.leaves(t) for t in (a, a2, b, c))):
                if not np.issubdtype(np.asarray(z).dtype, np.floating):
                    continue
                equal = np.array_equal(np.asarray(x).view(np.uint8), np.asarray(x2).view(np.uint8))
                if name in spoilt:
                    where = np.broadcast_to(spoilt[name], np.shape(z))
                    own = np.array(False)
                    if name in grads:
                        own = ~np.isfinite(np.asarray(given[0][grads[name]], np.float32))
                    equal &= bool(np.isnan(np.asarray(x, np.float32)[where & ~own]).all())
                    where = where | own  # the gradient of an element that is not finite itself may be anything
                    x, y, z = (np.where(where, 0, np.asarray(a, np.float64)) for a in (x, y, z))
                result[name], sizes[name] = (_error(x, z), _error(y, z), equal), np.size(z)
        return result, sizes

    result, sizes = draw(seed)
    few = [name for name in ('dscore', 'dsinks') if 0 < sizes.get(name, 0) <= FEW and not case.poison]
    if few:
        drawn = [result, *(draw(seed + n)[0] for n in range(1, DRAWS))]
        for name in few:
            ours, theirs, equal = zip(*(r[name] for r in drawn))
            mean = lambda x: float(np.sqrt(np.mean(np.square(x))))
            result[name] = mean(ours), mean(theirs), all(equal)
    return result


def _error(x, truth):
    x, truth = np.asarray(x, np.float64), np.asarray(truth, np.float64)
    if not np.array_equal(np.isneginf(x), np.isneginf(truth)) or np.isnan(x).any():
        return np.inf
    finite = np.isfinite(truth)
    x, truth = x[finite], truth[finite]
    size = np.sqrt((truth**2).mean()) if truth.size else 0.0
    return float(np.sqrt(((x - truth) ** 2).mean()) / size) if size else float(np.abs(x).max(initial=0.0))


def verdict(result: dict) -> str | None:
    """What is wrong with `errors`' result, or None."""
    bad = [
        f'{name}: error {ours:.2e}, reference {theirs:.2e}'
        for name, (ours, theirs, _) in result.items()
        if not ours <= max(FACTOR * theirs, FLOOR)
    ]
    bad += [
        f'{name}: a second run differs, or what sees poison is finite' for name, (_, _, equal) in result.items() if not equal
    ]
    return '; '.join(bad) or None


def repeated(attention, how: str) -> str | None:
    """What is wrong with the kernel under `jax.vmap` or in `jax.lax.scan`: each member equals a run of its own.

    Members differ in their documents and their seed of dropout too. Equal to rounding: XLA sums out * dout in another order
    where there are more rows (16 threads a row in place of 32), so the kernel is not given the same bits. An addition to dq
    that is lost or overwrites another is off by far more.
    """
    case = Case(how, B=2, T=300, H=64, N=4, K=2)
    members = [case.inputs(seed) for seed in range(3)]

    def loss(q, k, v, do, ids, seed):
        mask = ew.as_mask(causal) & segments(ids)
        out = attention(q, k, v, mask=mask, dropout=dropout_lib.Dropout(0.1, seed))
        return (out.astype(jnp.float32) * do).sum()

    run = lambda *args: jax.grad(loss, (0, 1, 2))(*args)
    arrays = [
        (*diff[:3], do.astype(jnp.float32), jnp.asarray(documents(case.B, case.T, 150, n)), jnp.uint32(n))
        for n, (diff, _, do, _) in enumerate(members)
    ]
    apart = [jax.jit(run)(*a) for a in arrays]
    stacked = tuple(map(jnp.stack, zip(*arrays)))
    if how == 'vmap':
        together = jax.jit(jax.vmap(run))(*stacked)
    else:
        together = jax.jit(lambda stacked: jax.lax.scan(lambda _, a: (None, run(*a)), None, stacked)[1])(stacked)
    off = {name: _error(x, np.stack(each)) for name, x, *each in zip(('dq', 'dk', 'dv'), together, *apart)}
    return f'{how} differs from a run of each member by {off}' if max(off.values()) > ROUNDING else None


def statistics_agree(attention) -> str | None:
    """What is wrong with the kernel's statistics, or None."""
    case = Case('statistics', T=300, N=4, K=2, H=64, mask=ew.as_mask(window(100)), sinks=True)
    (q, k, v, _, sinks), mask, *_ = case.inputs()
    stats = lambda asked: jax.jit(lambda *a: attention(*a, mask=mask, sinks=sinks, return_stats=asked)[1])(q, k, v)
    found, alone = stats(True), [getattr(stats((name,)), name) for name in statistics.Statistics._fields]
    with jax.enable_x64(True):
        wide = [np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k)]
        x = np.einsum('btnh,bsnh->bnts', wide[0], np.repeat(wide[1], 2, 2)) * case.H**-0.5
        t, s = np.arange(case.T)[:, None], np.arange(case.S)
        x = np.where((s <= t) & (s > t - 100), x, -np.inf)
        x = np.concatenate([x, np.broadcast_to(np.asarray(sinks)[:, None, None], (*x.shape[:3], 1))], -1)
        p = np.exp(x - x.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
        truth = x[..., :-1].max((0, 2, 3)), entropy.mean((0, 2)), p[..., -1].mean((0, 2))
    off = [float(np.abs(np.asarray(a) - b).max()) for a, b in zip((*found, *alone), truth * 2)]
    return None if max(off) < 1e-3 else f'statistics are off by {off}'


def run_only(case: Case, attention):
    """Forward and backward once, nothing else: for compute-sanitizer."""
    (q, k, v, score, sinks), mask, do, dlse = case.poisoned(case.inputs())
    f = lambda q, k, v: attention(q, k, v, mask=mask, score=score, sinks=sinks, dropout=case.dropout, return_lse=True)
    run = jax.jit(lambda q, k, v, do, dlse: jax.vjp(f, q, k, v)[1]((do, dlse)))
    jax.block_until_ready(run(q, k, v, do, dlse))


def main(words):
    # Before a device is asked for: XLA would spend most of the time on the fastest way to multiply the oracle's matrices.
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_gpu_autotune_level=0'
    from pallas_kernels.softmax_attention import mosaic_gpu, tiles

    part, of = 0, 1
    if '--tiles' in words:
        at = words.index('--tiles')
        tiles.pin(tiles.from_json(pathlib.Path(words[at + 1]).read_text(), words[at + 1]))
        words = words[:at] + words[at + 2 :]
    only = '--run' in words
    words = [w for w in words if w != '--run']
    if '--part' in words:
        at = words.index('--part')
        part, of = map(int, words[at + 1].split('/'))
        words = words[:at] + words[at + 2 :]
    failed, worst, start = [], 0.0, time.time()
    chosen = [c for c in grid() if not words or any(w in c.name for w in words)]
    for case in chosen[part::of]:
        if only:
            run_only(case, mosaic_gpu.softmax_attention)
            continue
        try:
            result = errors(case, mosaic_gpu.softmax_attention)
            reason = verdict(result)
            ratios = {n: round(a / b, 2) if b else 0.0 for n, (a, b, _) in result.items()}
            worst = max(worst, *(r for n, r in ratios.items() if result[n][0] > FLOOR), 0.0)
        except Exception as error:
            reason, ratios = f'{type(error).__name__}: {str(error)[:600]}', {}
        print(f'{"FAIL" if reason else "ok  "} {case.name:24} {ratios} {reason or ""}', flush=True)
        if reason:
            failed.append(case.name)
    repeats = [(how, functools.partial(repeated, how=how)) for how in ('vmap', 'scan')]
    for name, extra in (*repeats, ('statistics', statistics_agree)):
        if not part and (not words or name in words):
            reason = extra(mosaic_gpu.softmax_attention)
            print(f'{"FAIL" if reason else "ok  "} {name} {reason or ""}', flush=True)
            failed += [name] if reason else []
    print(f'{len(failed)} failed {failed}; worst ratio {worst}; {time.time() - start:.0f} s')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
