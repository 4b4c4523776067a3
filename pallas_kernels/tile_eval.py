"""Runs a scalar Python function on register tiles inside a Mosaic kernel.

A mask or score function is traced once on scalars; its jaxpr is then evaluated on scalars, row vectors, column vectors
and tiles at once, each value kept in the smallest of these shapes until it meets a larger one. That makes row-only and
column-only subexpressions almost free, and it gives a place to rewrite the primitives that have no Mosaic lowering
(`add_any`, which every `jax.vjp` makes, `floor`, `log1p`, ...).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

INLINE = {'jit', 'pjit', 'closed_call', 'custom_jvp_call', 'custom_vjp_call', 'remat2', 'checkpoint', 'remat'}
where, i32 = jnp.where, jnp.int32


def _up(f):  # transcendental functions of 16-bit values do not lower
    return lambda x, **_: f(x.astype(jnp.float32)).astype(x.dtype)


def _floor(x):
    t = x.astype(i32).astype(x.dtype)
    return where(lax.abs(x) < 2.0**23, where(t > x, t - 1, t), x)


def _log1p(x):
    u = 1 + x
    return where(u == 1, x, jnp.log(u) * (x / where(u == 1, 1.0, u - 1)))


def _expm1(x):
    u = jnp.exp(x)
    small = (u - 1) * x / where(u == 1, 1.0, jnp.log(jnp.maximum(u, 1e-38)))
    return where(u == 1, x, where(u - 1 == -1, -1.0, small))


def _integer_pow(x, *, y):
    if y == 0:
        return jnp.ones_like(x)
    r = lax.integer_pow(x, abs(y)) if abs(y) > 1 else x
    return 1 / r if y < 0 else r


def _pow(x, y):
    if jnp.issubdtype(y.dtype, jnp.integer):
        y = y.astype(x.dtype)
    size = jnp.exp2(y * jnp.log2(where(x == 0, 1.0, lax.abs(x))))
    whole, odd = _floor(y) == y, _floor(y * 0.5) * 2 != y
    signed = where(x < 0, where(whole, where(odd, -size, size), jnp.nan), size)
    return where(y == 0, 1.0, where(x == 0, where(y > 0, 0.0, jnp.inf), signed))


def _rem(x, y):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return lax.rem(x, y)
    t = x / y
    return x - y * where(t < 0, -_floor(-t), _floor(t))


def _polynomial(x, *coefficients, **_):
    r = coefficients[-1]
    for c in coefficients[-2::-1]:
        r = r * x + c
    return r


def _select(which, *cases):
    if which.dtype == jnp.bool_:
        return where(which, cases[1], cases[0])
    r = cases[-1]
    for k in range(len(cases) - 2, -1, -1):
        r = where(which == k, cases[k], r)
    return r


def _convert(x, *, new_dtype, **_):
    return x != 0 if new_dtype == jnp.bool_ and x.dtype != jnp.bool_ else x.astype(new_dtype)


RULES = {
    'add_any': lambda a, b: a + b,
    'one_minus_square': lambda x, **_: 1 - x * x,
    'stop_gradient': lambda x: x,
    'copy': lambda x: x,
    'reshard': lambda x, **_: x,  # what tracing under a mesh of explicit axes adds
    'floor': lambda x: _floor(x),
    'ceil': lambda x: -_floor(-x),
    'polynomial': _polynomial,
    'rem': _rem,
    'log1p': lambda x, **_: _log1p(x),
    'expm1': lambda x, **_: _expm1(x),
    'integer_pow': _integer_pow,
    'exp': _up(lax.exp),
    'exp2': _up(lax.exp2),
    'log': _up(lax.log),
    'tanh': _up(lax.tanh),
    'log2': _up(jnp.log2),
    'logistic': _up(lax.logistic),
    'sin': _up(lax.sin),
    'cos': _up(lax.cos),
    'sqrt': _up(lax.sqrt),
    'rsqrt': _up(lax.rsqrt),
    'pow': lambda x, y: _pow(x, y),
    'is_finite': lambda x: lax.abs(x) < jnp.inf,
    'tan': lambda x, **_: jnp.sin(x) / jnp.cos(x),
    'sinh': lambda x, **_: 0.5 * (jnp.exp(x) - jnp.exp(-x)),
    'cosh': lambda x, **_: 0.5 * (jnp.exp(x) + jnp.exp(-x)),
    'convert_element_type': _convert,
    'not': lambda x: x ^ True if x.dtype == jnp.bool_ else ~x,
    'select_n': _select,
}
NATIVE = {
    'add', 'sub', 'mul', 'div', 'neg', 'abs', 'max', 'min', 'square', 'sign', 'and', 'or', 'xor', 'shift_left',
    'shift_right_logical', 'shift_right_arithmetic', 'clz', 'eq', 'ne', 'lt', 'le', 'gt', 'ge', 'clamp',
    'bitcast_convert_type', 'erf', 'round',
}  # fmt: skip
SUPPORTED = sorted(NATIVE | set(RULES) | {'cond'})


def _subjaxprs(eqn):
    p = eqn.params
    if eqn.primitive.name == 'cond':
        return p['branches']
    return [p.get('jaxpr', p.get('call_jaxpr', p.get('fun_jaxpr')))]


def _live(jaxpr):
    """The equations that reach an output. Dead code would be emitted, and an unused iota breaks layout inference."""
    live = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if any(v in live for v in eqn.outvars):
            kept.append(eqn)
            live.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    return kept[::-1]


def refusal(jaxpr) -> str | None:
    """Why a traced scalar function cannot run on tiles: its first primitive without a rule, or None."""
    for const in getattr(jaxpr, 'consts', ()):
        if getattr(const, 'ndim', 0):
            return 'it captures an array; declare it as an operand'
    for eqn in _live(getattr(jaxpr, 'jaxpr', jaxpr)):
        name = eqn.primitive.name
        if name in INLINE or name == 'cond':
            for sub in _subjaxprs(eqn):
                reason = refusal(sub)
                if reason:
                    return reason
        elif name not in NATIVE and name not in RULES:
            return f'it uses the primitive {name!r}; a kernel takes {", ".join(SUPPORTED)}'
    return None


SPECIAL = {
    'exp', 'exp2', 'log', 'log2', 'tanh', 'logistic', 'erf', 'sin', 'cos', 'tan', 'sinh', 'cosh', 'log1p', 'expm1', 'pow',
    'sqrt', 'rsqrt', 'div',
}  # fmt: skip


def special(jaxpr) -> bool:
    """Whether a traced scalar function takes results of the special function unit for each element."""

    def one(eqn):
        name = eqn.primitive.name
        if name in INLINE or name == 'cond':
            return any(map(special, _subjaxprs(eqn)))
        return name in SPECIAL and not (name == 'div' and isinstance(eqn.invars[1], jex.Literal))

    return any(map(one, _live(getattr(jaxpr, 'jaxpr', jaxpr))))


class Value(NamedTuple):
    value: Any  # perhaps Scaled or Shifted
    kind: str
    to: Callable  # kind -> the value in that larger shape
    literal: Any  # the number, where it is one that tracing already knew


COMPARE = {'lt': lax.lt, 'le': lax.le, 'gt': lax.gt, 'ge': lax.ge}
FLIPPED = {'lt': 'gt', 'le': 'ge', 'gt': 'lt', 'ge': 'le'}


class Ramp:
    """`length` whole numbers from the scalar `first` on; `iota(n)` makes 0 ... n - 1."""

    def __init__(self, iota, length, piece, first):
        self.iota, self.length, self.piece, self.first = iota, length, piece, first

    def __call__(self):
        return self.iota(self.length) + self.first

    def plus(self, scalar):
        return Ramp(self.iota, self.length, self.piece, self.first + scalar)

    def floating(self, center):
        """Less `center`, in float32: one piece is converted, constants lead from it to the others."""
        x = (self.iota(self.piece) + (self.first - center)).astype(jnp.float32)
        return jnp.concatenate([x + float(n) for n in range(0, self.length, self.piece)]) if self.piece < self.length else x


class Outer:
    """A tile row + column or row - column, formed only when something needs it as it is.

    Positions meet this way in every relative score. Small integers are converted to float32 apart, where converting the
    integer tile would cost a quarter-rate conversion an element; and a float one times a scalar is its two vectors times
    the scalar, which costs an element nothing.
    """

    def __init__(self, a, b, sign, widen, near=False, factor=None):
        self.a, self.b, self.sign, self.widen, self.near = a, b, sign, widen, near  # a, b: (vector, kind)
        self.factor = factor  # of both, a scalar

    def __call__(self):
        a, b = (self.widen(self.scaled(v), k, 'rc') for v, k in (self.a, self.b))
        return a + b if self.sign > 0 else a - b

    def scaled(self, v, by=None):
        factors = [x for x in (self.factor, by) if x is not None]
        return v * functools.reduce(lambda x, y: x * y, factors) if factors else v

    def floating(self, center):
        """In float32. Positions become distances from `center`, which a factor rounds as it would their difference."""
        near = center is not None and self.sign < 0


        def single(v):
            if near and isinstance(v, Ramp):
                return v.floating(center)
            v = v() if isinstance(v, Ramp) else v
            return (v - center if near else v).astype(jnp.float32)

        return Outer(*((single(v), k) for v, k in (self.a, self.b)), self.sign, self.widen, near)

    def times(self, scalar):
        return Outer(self.a, self.b, self.sign, self.widen, True, self.scaled(scalar))

    def compared(self, name, scalar):
        """`self < scalar` and its like as (name, row, column) with row < column: the scalar joins the column."""
        (a, kind), (b, _) = self.a, self.b
        if kind == 'r':
            return name, a, b + scalar if self.sign < 0 else scalar - b
        return (name, b, scalar - a) if self.sign > 0 else (FLIPPED[name], b, a - scalar)

    def parts(self, sign, by=None):
        """The signed vectors, times the scalar `by`, by kind."""
        return {k: self.scaled(v, by) * sign for (v, k), sign in ((self.a, sign), (self.b, sign * self.sign))}


class Shifted:
    """A tile plus a row and a column vector: who uses it may add one of them where that costs less."""

    def __init__(self, value, outer, sign, widen):
        self.value, self.outer, self.sign, self.widen = value, outer, sign, widen

    def parts(self, by=None):
        """The vectors times the scalar `by`, by kind."""
        return self.outer.parts(self.sign, by)

    def __call__(self, apart=''):
        """The tile, without the vector of kind `apart`."""
        total = self.value() if isinstance(self.value, Scaled) else self.value
        for kind, v in self.parts().items():
            if kind != apart:
                total = total + self.widen(v, kind, 'rc')
        return total


class Scaled:
    """A float tile times a known number: a chain of factors costs one multiplication, or none if the user has one."""

    def __init__(self, value, factor):
        self.value, self.factor = value, factor

    def __call__(self):
        return self.value * jnp.float32(self.factor)


LAZY = (Ramp, Outer, Shifted, Scaled)


def tile_eval(fun, operands, shape, cast, small=(), spread=None, center=None):
    """Evaluates `fun`, a function of scalars, on tiles.

    Args:
      fun: scalars -> scalar or tuple of scalars.
      operands: a list of (value, `Ramp` or thunk, dtype, kind); kind '' is a scalar, 'r' a row vector (M,), 'c' a column
        vector (N,), 'rc' a tile (M, N). Thunks are called on first use.
      shape: (M, N).
      cast: pins the layout of a tile made by broadcasting.
      small: which operands are integers below 2^22, so that their sums are exact in float32.
      spread: (value, kind, larger kind) -> the value in that shape, where rows and columns are no vectors.
      center: an integer scalar near the `small` operands' values in this tile, see `Outer.floating`.

    Returns:
      A list of `Value`s.
    """
    jaxpr = jax.make_jaxpr(fun)(*[jax.ShapeDtypeStruct((), d) for _, d, _ in operands])

    def widen(v, k, to):
        v = v() if isinstance(v, LAZY) else v
        if k == to:
            return v
        if spread:
            return spread(v, k, to)
        target = {'r': shape[:1], 'c': shape[1:], 'rc': shape}[to]
        if k == '':
            return jnp.broadcast_to(v, target)
        return cast(lax.broadcast_in_dim(v, target, {'r': (0,), 'c': (1,)}[k]))

    def run(jp, consts, ins, small=()):
        exact = {v for n, v in enumerate(jp.invars) if n in small}
        little = lambda a: abs(a.val) < 2**20 if isinstance(a, jex.Literal) else a in exact
        env = {**{v: (c, '') for v, c in zip(jp.constvars, consts)}, **dict(zip(jp.invars, ins))}

        def read(atom):
            if isinstance(atom, jex.Literal):
                return jnp.asarray(atom.val, atom.aval.dtype), ''
            v, k = env[atom]
            if callable(v):
                v = v()
                env[atom] = v, k
            return v, k

        def unread(atom):
            ramp = not isinstance(atom, jex.Literal) and isinstance(env[atom][0], Ramp)
            return env[atom] if ramp else read(atom)

        for eqn in _live(jp):
            name = eqn.primitive.name
            whole = eqn.outvars and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.integer)
            if whole and name in ('add', 'sub') and all(little(a) for a in eqn.invars):
                exact.add(eqn.outvars[0])
                a, b = (unread(x) for x in eqn.invars)
                if isinstance(a[0], Ramp) and b[1] == '':
                    env[eqn.outvars[0]] = a[0].plus(b[0] if name == 'add' else -b[0]), a[1]
                    continue
                if {a[1], b[1]} == {'r', 'c'}:
                    env[eqn.outvars[0]] = Outer(a, b, 1 if name == 'add' else -1, widen), 'rc'
                    continue
            single = eqn.outvars and eqn.outvars[0].aval.dtype == jnp.float32
            held = [None if isinstance(a, jex.Literal) else env[a][0] for a in eqn.invars]
            outer = [n for n, v in enumerate(held) if isinstance(v, Outer)]
            if spread and len(outer) == 1 and name in FLIPPED and little(eqn.invars[1 - outer[0]]):
                (n,), other = outer, eqn.invars[1 - outer[0]]
                if isinstance(other, jex.Literal) or env[other][1] == '':
                    name, row, column = held[n].compared(FLIPPED[name] if n else name, read(other)[0])
                    env[eqn.outvars[0]] = COMPARE[name](widen(row, 'r', 'rc'), widen(column, 'c', 'rc')), 'rc'
                    continue
            if single and len(outer) == 1:
                (n,) = outer
                if name == 'convert_element_type':
                    env[eqn.outvars[0]] = held[n].floating(center), 'rc'
                    continue
                if name == 'neg' and held[n].near:
                    env[eqn.outvars[0]] = held[n].times(-1.0), 'rc'
                    continue
                other = eqn.invars[1 - n] if name in ('add', 'sub', 'mul') else None
                kind = None if other is None else '' if isinstance(other, jex.Literal) else env[other][1]
                if name == 'mul' and kind == '' and held[n].near:
                    env[eqn.outvars[0]] = held[n].times(read(other)[0]), 'rc'
                    continue
                if kind == 'rc' and (name == 'add' or (name == 'sub' and n == 1)):
                    tile = env[other][0] if isinstance(env[other][0], Scaled) else read(other)[0]
                    env[eqn.outvars[0]] = Shifted(tile, held[n], 1 if name == 'add' else -1, widen), 'rc'
                    continue
            if name in ('mul', 'div') and single:
                numbers = [a.val if isinstance(a, jex.Literal) else None for a in eqn.invars]
                at = 1 if numbers[1] is not None else 0 if name == 'mul' and numbers[0] is not None else None
                if at is not None and numbers[1 - at] is None and numbers[at] != 0:
                    held, k = env[eqn.invars[1 - at]]
                    factor = float(numbers[at]) if name == 'mul' else 1 / float(numbers[at])
                    if isinstance(held, Scaled):
                        env[eqn.outvars[0]] = Scaled(held.value, held.factor * factor), k
                        continue
                    if k == 'rc':
                        env[eqn.outvars[0]] = Scaled(read(eqn.invars[1 - at])[0], factor), k
                        continue
            xs = [read(a) for a in eqn.invars]
            if name in INLINE or name == 'cond':
                args = xs[1:] if name == 'cond' else xs
                outs = [run(getattr(s, 'jaxpr', s), getattr(s, 'consts', ()), args) for s in _subjaxprs(eqn)]
                outs = outs[0] if name != 'cond' else [merge(xs[0], o) for o in zip(*outs)]
            else:
                k = ''.join(c for c in 'rc' if any(c in kk for _, kk in xs))
                vs = [widen(v, kk, k) for v, kk in xs]
                f = RULES.get(name)
                out = f(*vs, **eqn.params) if f else eqn.primitive.bind(*vs, **eqn.params)
                outs = [(v, k) for v in (out if eqn.primitive.multiple_results else [out])]
            env.update(zip(eqn.outvars, outs))
        lazy = lambda a: not isinstance(a, jex.Literal) and isinstance(env[a][0], Scaled | Shifted)
        return [env[a] if lazy(a) else read(a) for a in jp.outvars]

    def merge(which, cases):  # an elementwise cond: evaluate all branches, select
        k = ''.join(c for c in 'rc' if c in which[1] or any(c in kk for _, kk in cases))
        return _select(widen(*which, k), *[widen(v, kk, k) for v, kk in cases]), k

    outs = run(jaxpr.jaxpr, jaxpr.consts, [(v, k) for v, _, k in operands], small)
    literal = [a.val if isinstance(a, jex.Literal) else None for a in jaxpr.jaxpr.outvars]
    return [Value(v, k, functools.partial(widen, v, k), c) for (v, k), c in zip(outs, literal)]
