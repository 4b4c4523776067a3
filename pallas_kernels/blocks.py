"""Which blocks of a mask are empty, partial or full, found without forming the mask.

The jaxpr of the mask's function is evaluated in interval arithmetic: each index is the range that it takes over a
block, each operand lies between its block-wise minimum and maximum, and the boolean that comes out is three-valued:
surely true everywhere (full), surely false everywhere (empty), or unknown (partial). It costs O(T S / (bq bk)) and the
operands' size, runs on device, and so follows data that changes every step. It is sound: a block is never called full
or empty wrongly. What it does not know (a primitive without a rule, possible overflow or NaN) is partial, which only
costs time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from pallas_kernels import elementwise

EMPTY, PARTIAL, FULL = 0, 1, 2


class Lists(NamedTuple):
    """For each row of blocks, those that are not empty, in ascending order.

    `count` int32 [.., rows]; `block` int32 [.., rows, columns], of which the first `count` hold, the rest are other
    valid block numbers; `partial` bool, aligned with `block`: the mask must be applied there.
    """

    count: Any
    block: Any
    partial: Any


def classify(mask, B: int, N: int, T: int, S: int, bq: int, bk: int):
    """The class of each block of bq queries by bk keys: int8 [B|1, N|1, ceil(T / bq), ceil(S / bk)].

    0 empty, 1 partial, 2 full. Dimensions b and h are 1 where the mask does not depend on them. A block that reaches
    past T or S is at most partial. A mask without operands gives a NumPy array, also under `jax.jit`: a static grid can
    rest on it.
    """
    nq, nk = -(-T // bq), -(-S // bk)
    ragged = (np.arange(1, nq + 1) * bq > T)[:, None] | (np.arange(1, nk + 1) * bk > S)
    if mask is None:
        return np.where(ragged, np.int8(PARTIAL), np.int8(FULL))[None, None]
    operands, call = elementwise.flatten(mask)
    scalars = [jax.ShapeDtypeStruct((), jnp.result_type(o.array)) for o in operands]
    index = [jax.ShapeDtypeStruct((), jnp.int32)] * 4
    closed = jax.make_jaxpr(lambda i, v: call(elementwise.Index(*i, T, S), v))(index, scalars)
    static = not operands and all(isinstance(c, np.ndarray | np.generic | int | float | bool) for c in closed.consts)
    xp = np if static else jnp

    def span(n, block, axis):
        lo = np.arange(-(-n // block), dtype=np.int32) * block
        shape = [1] * 4
        shape[axis] = len(lo)
        return _Interval(lo.reshape(shape), np.minimum(lo + block, n).astype(np.int32).reshape(shape) - np.int32(1))

    inputs = [span(B, 1, 0), span(N, 1, 1), span(T, bq, 2), span(S, bk, 3)]
    inputs += [_bounds(o, T, S, bq, bk) for o in operands]
    with np.errstate(all='ignore'):
        (seen,) = _Evaluator(xp).run(closed.jaxpr, closed.consts, inputs)
    full, some = (xp.broadcast_to(x, np.broadcast_shapes(x.shape, (1, 1, nq, nk))) for x in seen)
    return xp.where(some, xp.where(full & ~ragged, FULL, PARTIAL), EMPTY).astype(np.int8)


def possible(mask, B: int, N: int, T: int, S: int, bq: int, bk: int) -> np.ndarray:
    """Classes [ceil(T / bq), ceil(S / bk)] that hold for every row, head and value of the operands: known while tracing."""
    nq, nk = -(-T // bq), -(-S // bk)
    if mask is None:
        return union(classify(None, B, N, T, S, bq, bk))
    operands, call = elementwise.flatten(mask)
    scalars = [jax.ShapeDtypeStruct((), jnp.result_type(o.array)) for o in operands]
    index = [jax.ShapeDtypeStruct((), jnp.int32)] * 4
    closed = jax.make_jaxpr(lambda i, v: call(elementwise.Index(*i, T, S), v))(index, scalars)
    if any(isinstance(c, jax.core.Tracer) for c in closed.consts):
        return np.full((nq, nk), PARTIAL, np.int8)
    evaluator = _Evaluator(np)

    def span(n, block, shape):
        lo = np.arange(0, n, block, dtype=np.int32).reshape(shape)
        return _Interval(lo, np.minimum(lo + np.int32(block), np.int32(n)) - np.int32(1))

    inputs = [span(B, B, ()), span(N, N, ()), span(T, bq, (-1, 1)), span(S, bk, (1, -1))]
    inputs += [evaluator.unknown(x.dtype) for x in scalars]
    with np.errstate(all='ignore'):
        (seen,) = evaluator.run(closed.jaxpr, closed.consts, inputs)
    full, some = (np.broadcast_to(x, (nq, nk)) for x in seen)
    return np.where(some, np.where(full, FULL, PARTIAL), EMPTY).astype(np.int8)


def extent(score, T: int, S: int) -> tuple[float, float]:
    """What all values of a score lie between, whatever the logit, place and operands: infinite where nothing is known."""
    operands, call = elementwise.flatten(score)
    scalars = [jax.ShapeDtypeStruct((), jnp.result_type(o.array)) for o in operands]
    index = [jax.ShapeDtypeStruct((), jnp.int32)] * 4
    f = lambda s, i, v: call(s, elementwise.Index(*i, T, S), v).astype(jnp.float32)
    closed = jax.make_jaxpr(f)(jax.ShapeDtypeStruct((), jnp.float32), index, scalars)
    evaluator = _Evaluator(np)
    ends = -np.inf, np.inf
    inputs = [_Interval(*(np.asarray(x, np.float32) for x in ends)), *(evaluator.unknown(x.dtype) for x in index + scalars)]
    if any(x is None for x in inputs) or any(isinstance(c, jax.core.Tracer) for c in closed.consts):
        return ends
    with np.errstate(all='ignore'):
        (value,) = evaluator.run(closed.jaxpr, closed.consts, inputs)
    known = value is not None and not (np.isnan(value.lo).any() or np.isnan(value.hi).any())
    return (float(value.lo), float(value.hi)) if known else ends


def union(classes):
    """One class for all batches and heads: [.., nq, nk] -> [nq, nk]; empty or full only where all of them are."""
    xp = _module(classes)
    axes = tuple(range(classes.ndim - 2))
    low, high = classes.min(axes), classes.max(axes)
    return xp.where(high == EMPTY, EMPTY, xp.where(low == FULL, FULL, PARTIAL)).astype(np.int8)


def lists(classes) -> Lists:
    """Compact lists of the blocks to visit in each row of `classes` [.., rows, columns].

    As `classify` gives them: key blocks of each query block. The other way round: of `classes.swapaxes(-1, -2)`.
    """
    xp = _module(classes)
    order = np.argsort(classes == EMPTY, axis=-1, kind='stable') if xp is np else jnp.argsort(classes == EMPTY, axis=-1)
    partial = xp.take_along_axis(classes, order, axis=-1) == PARTIAL
    return Lists((classes != EMPTY).sum(-1).astype(np.int32), order.astype(np.int32), partial)


def _module(x):
    return np if isinstance(x, np.ndarray) else jnp


class _Interval(NamedTuple):
    """All values lie in [lo, hi]; NaN ends mean anything, NaN included. Booleans: (surely true, possibly true)."""

    lo: Any
    hi: Any


def _bounds(operand, T, S, bq, bk) -> _Interval:
    """Block-wise minimum and maximum of an operand, laid out [b, h, q block, k block]."""
    x = jnp.asarray(operand.array)
    letters = operand.index
    x = jnp.transpose(x, sorted(range(x.ndim), key=lambda a: 'bhqkd'.index(letters[a])))
    letters = ''.join(sorted(letters, key='bhqkd'.index))
    lo = hi = x
    for letter, block in (('q', bq), ('k', bk)):
        if letter in letters:
            axis = letters.index(letter)
            lo, hi = _split(lo, axis, block).min(axis + 1), _split(hi, axis, block).max(axis + 1)
    if 'd' in letters:
        # Block (i, j) reads the strip from j bk - i bq + T - bq on, bq + bk - 1 entries, less what lies outside.
        start = np.arange(-(-S // bk)) * bk - np.arange(-(-T // bq))[:, None] * bq + T - bq
        pad = [(0, 0)] * (x.ndim - 1) + [(bq, bq + bk)]
        lo, hi = (_sliding(jnp.pad(x, pad, mode='edge'), bq + bk - 1, f) for f in (jnp.minimum, jnp.maximum))
        lo, hi = lo[..., start + bq], hi[..., start + bq]
        letters = letters[:-1] + 'qk'
    shape, axes = [1] * 4, 'bhqk'
    for letter, n in zip(letters, lo.shape):
        shape[axes.index(letter)] = n
    return _Interval(lo.reshape(shape), hi.reshape(shape))


def _split(x, axis, block):
    n = x.shape[axis]
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -n % block)
    x = jnp.pad(x, pad, mode='edge')
    return x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])


def _sliding(x, width, f):
    """f over each run of `width` entries of the last axis, by doubling: [.., n] -> [.., n - width + 1]."""
    length = 1
    while 2 * length <= width:
        x = f(x[..., :-length], x[..., length:])
        length *= 2
    rest = width - length
    return f(x[..., : x.shape[-1] - rest], x[..., rest:]) if rest else x


_INLINE = {'jit', 'pjit', 'closed_call', 'core_call', 'custom_jvp_call', 'custom_vjp_call', 'remat2', 'checkpoint'}


class _Evaluator:
    """Evaluates a jaxpr of scalars on intervals whose ends are arrays, by NumPy or by jnp."""

    def __init__(self, xp):
        self.xp = xp

    def run(self, jaxpr, consts, inputs):
        env = dict(zip(jaxpr.invars, inputs))
        for var, value in zip(jaxpr.constvars, consts):
            value = self.xp.asarray(value)
            env[var] = _Interval(value, value) if value.shape == () else self.unknown(value.dtype)

        def read(atom):
            if isinstance(atom, jex.Literal):
                value = np.asarray(atom.val, atom.aval.dtype)
                return _Interval(value, value)
            return env[atom]

        for eqn in jaxpr.eqns:
            outs = self.equation(eqn, [read(a) for a in eqn.invars])
            env.update(zip(eqn.outvars, outs))
        return [read(a) for a in jaxpr.outvars]

    def equation(self, eqn, xs):
        name, params = eqn.primitive.name, eqn.params
        unknown = [self.unknown(v.aval.dtype) for v in eqn.outvars]
        if any(v.aval.shape != () for v in (*eqn.invars, *eqn.outvars)):
            return unknown
        if name in _INLINE:
            inner = next((params[key] for key in ('jaxpr', 'call_jaxpr', 'fun_jaxpr') if key in params), None)
            return (
                unknown if inner is None else self.run(getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', ()), xs)
            )
        if name == 'cond':
            branches = [self.run(b.jaxpr, b.consts, xs[1:]) for b in params['branches']]
            return [self.join(*outs) for outs in zip(*branches)]
        rule = getattr(self, f'_{name}', None)
        if rule is None or len(eqn.outvars) != 1:
            return unknown
        dtype = eqn.outvars[0].aval.dtype
        out = rule(*xs, **params) if name in ('convert_element_type', 'integer_pow') else rule(*xs)
        if out is None:
            return unknown
        out = _Interval(*(self.xp.asarray(x).astype(dtype) for x in out))
        if jnp.issubdtype(dtype, jnp.floating):
            out = self.choose(self.xp.isnan(out.lo) | self.xp.isnan(out.hi), self.unknown(dtype), out)
        return [out]

    def unknown(self, dtype):
        if dtype == jnp.bool_:
            return _Interval(np.asarray(False), np.asarray(True))
        if jnp.issubdtype(dtype, jnp.integer):
            info = jnp.iinfo(dtype)
            return _Interval(np.asarray(info.min, dtype), np.asarray(info.max, dtype))
        if jnp.issubdtype(dtype, jnp.floating):
            return _Interval(np.asarray(np.nan, dtype), np.asarray(np.nan, dtype))
        return None

    def join(self, *xs):
        lo, hi = xs[0]
        for x in xs[1:]:
            lo, hi = self.xp.minimum(lo, x.lo), self.xp.maximum(hi, x.hi)
        return _Interval(lo, hi)

    def choose(self, where, a, b):
        return _Interval(self.xp.where(where, a.lo, b.lo), self.xp.where(where, a.hi, b.hi))

    def checked(self, lo, hi, about):
        """Results of arithmetic: integers that may have wrapped are unknown, floats are widened by their rounding.

        `about`: the candidates of the ends in float32, in which overflow shows.
        """
        if jnp.issubdtype(lo.dtype, jnp.floating):
            return self.widen(lo, hi, 2)
        info = jnp.iinfo(lo.dtype)
        bound = float(info.max) * (1 - 2**-20)
        wrapped = False
        for x in about:
            wrapped = wrapped | (x > bound) | (x < (-bound if info.min < 0 else 0))
        return self.choose(wrapped, self.unknown(lo.dtype), _Interval(lo, hi))

    def defined(self, out, first, second, f):
        """Unknown where two infinities, or zero and infinity, may meet inside the operands and make NaN."""
        if not jnp.issubdtype(out.lo.dtype, jnp.floating):
            return out
        bad = self.xp.isnan(f(*first)) | self.xp.isnan(f(*second))
        return self.choose(bad, self.unknown(out.lo.dtype), out)

    def widen(self, lo, hi, ulps):
        # A tile may round otherwise than this evaluation does: other libraries, fused multiply-adds.
        eps, tiny = ulps * float(jnp.finfo(lo.dtype).eps), float(jnp.finfo(lo.dtype).tiny)
        return _Interval(lo - abs(lo) * eps - tiny, hi + abs(hi) * eps + tiny)

    def _add(self, a, b):
        ends = [(a.lo, b.lo), (a.hi, b.hi)]
        out = self.checked(a.lo + b.lo, a.hi + b.hi, [_f32(x) + _f32(y) for x, y in ends])
        return self.defined(out, (a.lo, b.hi), (a.hi, b.lo), lambda x, y: x + y)

    _add_any = _add

    def _sub(self, a, b):
        out = self.checked(a.lo - b.hi, a.hi - b.lo, [_f32(a.lo) - _f32(b.hi), _f32(a.hi) - _f32(b.lo)])
        if jnp.issubdtype(a.lo.dtype, jnp.unsignedinteger):
            out = self.choose(a.lo < b.hi, self.unknown(a.lo.dtype), out)
        return self.defined(out, (a.lo, b.lo), (a.hi, b.hi), lambda x, y: x - y)

    def _mul(self, a, b):
        ends = [(x, y) for x in a for y in b]
        out = self.join(*(_Interval(x * y, x * y) for x, y in ends))
        out = self.checked(out.lo, out.hi, [_f32(x) * _f32(y) for x, y in ends])
        zero = lambda x: self.xp.where((x.lo <= 0) & (x.hi >= 0), self.xp.zeros_like(x.lo), self.xp.ones_like(x.lo))
        far = lambda x: self.xp.maximum(abs(x.lo), abs(x.hi))
        return self.defined(out, (zero(a), far(b)), (far(a), zero(b)), lambda x, y: x * y)

    def _square(self, a):
        a = self._abs(a)
        return self._mul(a, a)

    def _integer_pow(self, a, *, y):
        if y < 1 or y > 8:
            return None
        out = base = self._abs(a) if y % 2 == 0 else a
        for _ in range(y - 1):
            out = self._mul(out, base)
        return out

    def _neg(self, a):
        return self.checked(-a.hi, -a.lo, [-_f32(a.lo), -_f32(a.hi)])

    def _abs(self, a):
        crosses = (a.lo <= 0) & (a.hi >= 0)
        x, y = abs(a.lo), abs(a.hi)
        lo = self.xp.where(crosses, self.xp.zeros_like(x), self.xp.minimum(x, y))
        out = _Interval(lo, self.xp.maximum(x, y))
        if jnp.issubdtype(x.dtype, jnp.signedinteger):
            return self.choose(a.lo == jnp.iinfo(x.dtype).min, self.unknown(x.dtype), out)
        return out

    def _div(self, a, b):
        ends = [(x, y) for x in a for y in b]
        if jnp.issubdtype(a.lo.dtype, jnp.floating):
            far = lambda x: self.xp.maximum(abs(x.lo), abs(x.hi))
            safe = ((b.lo > 0) | (b.hi < 0)) & ~(self.xp.isinf(far(a)) & self.xp.isinf(far(b)))
            out = self.join(*(_Interval(x / y, x / y) for x, y in ends))
            return self.choose(safe, self.widen(out.lo, out.hi, 4), self.unknown(a.lo.dtype))
        safe = b.lo > 0  # integers
        quotient = lambda x, y: self.truncated(x, self.xp.where(safe, y, self.xp.ones_like(y)))
        out = self.join(*(_Interval(quotient(x, y), quotient(x, y)) for x, y in ends))
        return self.choose(safe, out, self.unknown(a.lo.dtype))

    def truncated(self, x, y):
        if self.xp is jnp:
            return jax.lax.div(*jnp.broadcast_arrays(jnp.asarray(x), jnp.asarray(y)))
        return np.where(x < 0, -(-x // y), x // y) if jnp.issubdtype(x.dtype, jnp.signedinteger) else x // y

    def _rem(self, a, b):
        if not jnp.issubdtype(a.lo.dtype, jnp.integer):
            return None
        safe = (b.lo == b.hi) & (b.lo > 0)
        c = self.xp.where(safe, b.lo, self.xp.ones_like(b.lo))
        one = self.xp.ones_like(c)
        first, last = self.truncated(a.lo, c), self.truncated(a.hi, c)
        # Within one period on one side of zero the remainder follows its dividend; else it takes anything below c.
        same = (first == last) & ((a.lo >= 0) | (a.hi <= 0))
        zero = self.xp.zeros_like(c)
        wide = _Interval(self.xp.where(a.lo >= 0, zero, one - c), self.xp.where(a.hi <= 0, zero, c - one))
        out = self.choose(same, _Interval(a.lo - first * c, a.hi - last * c), wide)
        return self.choose(safe, out, self.unknown(a.lo.dtype))

    def _sign(self, a):
        return _Interval(self.xp.sign(a.lo), self.xp.sign(a.hi))

    def _max(self, a, b):
        return _Interval(self.xp.maximum(a.lo, b.lo), self.xp.maximum(a.hi, b.hi))

    def _min(self, a, b):
        return _Interval(self.xp.minimum(a.lo, b.lo), self.xp.minimum(a.hi, b.hi))

    def _clamp(self, low, x, high):
        return self._min(self._max(x, low), high)

    def _floor(self, a):
        return _Interval(self.xp.floor(a.lo), self.xp.floor(a.hi))

    def _ceil(self, a):
        return _Interval(self.xp.ceil(a.lo), self.xp.ceil(a.hi))

    def monotone(self, f, a):
        return self.widen(f(a.lo), f(a.hi), 64)

    def _exp(self, a, **_):
        return self.monotone(self.xp.exp, a)

    def _log(self, a):
        return self.monotone(self.xp.log, a)

    def _sqrt(self, a):
        return self.monotone(self.xp.sqrt, a)

    def _tanh(self, a):
        return self.monotone(self.xp.tanh, a)

    def _logistic(self, a):
        return self.monotone(lambda x: 1 / (1 + self.xp.exp(-x)), a)

    def _eq(self, a, b):
        point = (a.lo == a.hi) & (b.lo == b.hi) & (a.lo == b.lo)
        return _Interval(point, ~(a.lo > b.hi) & ~(b.lo > a.hi))

    def _ne(self, a, b):
        return self._not(self._eq(a, b))

    def _lt(self, a, b):
        return _Interval(a.hi < b.lo, ~(a.lo >= b.hi))

    def _le(self, a, b):
        return _Interval(a.hi <= b.lo, ~(a.lo > b.hi))

    def _gt(self, a, b):
        return self._lt(b, a)

    def _ge(self, a, b):
        return self._le(b, a)

    def _not(self, a):
        return _Interval(~a.hi, ~a.lo)  # booleans, and integers too: ~x falls as x grows

    def _and(self, a, b):
        if a.lo.dtype == jnp.bool_:
            return _Interval(a.lo & b.lo, a.hi & b.hi)
        positive = (a.lo >= 0) & (b.lo >= 0)
        bits = _Interval(self.xp.zeros_like(a.lo), self.xp.minimum(a.hi, b.hi))
        return self.choose(positive, bits, self.unknown(a.lo.dtype))

    def _or(self, a, b):
        return _Interval(a.lo | b.lo, a.hi | b.hi) if a.lo.dtype == jnp.bool_ else None

    def _xor(self, a, b):
        if a.lo.dtype != jnp.bool_:
            return None
        return _Interval((a.lo & ~b.hi) | (b.lo & ~a.hi), (a.hi & ~b.lo) | (b.hi & ~a.lo))

    def _select_n(self, which, *cases):
        out = self.join(*cases)
        if which.lo.dtype == jnp.bool_:
            out = self.choose(which.lo, cases[1], self.choose(~which.hi, cases[0], out))
        return out

    def _convert_element_type(self, a, *, new_dtype, **_):
        old = a.lo.dtype
        if new_dtype == jnp.bool_:
            zero = np.zeros((), old)
            return self._ne(a, _Interval(zero, zero))
        if old != jnp.bool_ and jnp.issubdtype(new_dtype, jnp.integer):
            info = jnp.iinfo(new_dtype)
            if jnp.issubdtype(old, jnp.integer):
                was = jnp.iinfo(old)
                fits = (a.lo >= max(info.min, was.min)) & (a.hi <= min(info.max, was.max))
            else:
                fits = (_f32(a.lo) >= info.min * (1 - 2**-20)) & (_f32(a.hi) <= info.max * (1 - 2**-20))
            zeros = _Interval(self.xp.zeros_like(a.lo), self.xp.zeros_like(a.hi))
            kept = self.choose(fits, a, zeros)
            return self.choose(fits, _Interval(*(x.astype(new_dtype) for x in kept)), self.unknown(new_dtype))
        return _Interval(a.lo.astype(new_dtype), a.hi.astype(new_dtype))

    def _copy(self, a):
        return a

    _stop_gradient = _copy_p = _reshard = _copy

    def _broadcast_in_dim(self, a, *_):
        return a


def _f32(x):
    return x.astype(np.float32)
