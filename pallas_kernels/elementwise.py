"""Masks and scores as values: elementwise functions of indices with declared operands.

A `Mask` says which (query, key) pairs see each other, a `Score` edits their scaled logits. Both are pytrees whose
functions are static and whose operand arrays are data, so they pass through `jax.jit`, `jax.vmap` and `jax.grad`. A
fused kernel can't gather, so each operand declares how it is indexed, one letter per dimension:

    b batch   h query head   q query position   k key position   d difference

`d` reads a strip of length T + S - 1 at `k - q + (T - 1)`; relative to the bottom-right aligned diagonal, entry `x` is
for a key `x - (S - 1)` tokens ahead of its query. A `b` or `h` dimension of size 1 broadcasts. Examples: 'bq' a row
vector, 'bk' a column vector, 'h' a number per head, 'hqk' a dense tile, 'hd' a Toeplitz strip per head, '' one number.

Functions are elementwise: they get `Index` and operand values as scalars or as arrays that broadcast against each
other, and use jnp or lax functions of scalars only. The same function is traced into kernels, into tiles of the
blockwise form, into the quadratic reference, and (its jaxpr) into interval arithmetic, which finds empty and full
blocks (`pallas_kernels.blocks`).
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LETTERS = 'bhqkd'


class Index(NamedTuple):
    """Where an element is: int32 scalars or broadcastable arrays, and the lengths as Python ints.

    `h` is the query head. Bottom-right aligned positions are `q + (k_len - q_len)` and `k`.
    """

    b: Any
    h: Any
    q: Any
    k: Any
    q_len: int
    k_len: int


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """An array and how it is indexed: one letter of 'bhqkd' per dimension, each once at most, d without q and k."""

    array: Any
    index: str = ''


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """Which keys a query sees: `fn(i: Index, *operand_values, *params) -> bool`.

    Attributes:
      fn: hashable elementwise function; give a module-level function (or one kept) to avoid recompiling.
      operands: `Operand`s, or `Mask`s whose value is then their boolean.
      params: hashable Python values.
    """

    fn: Callable
    operands: tuple['Operand | Mask', ...] = ()
    params: tuple[Hashable, ...] = ()

    def __and__(self, other):
        return self if other is None else Mask(_and, (self, as_mask(other)))

    def __rand__(self, other):
        return self if other is None else Mask(_and, (as_mask(other), self))

    def __or__(self, other):
        return Mask(_or, (self, _given(other)))

    def __ror__(self, other):
        return Mask(_or, (_given(other), self))

    def __invert__(self):
        return Mask(_not, (self,))


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """One step of a score: `fn(s, i: Index, *operand_values, *params) -> s`."""

    fn: Callable
    operands: tuple[Operand | Mask, ...] = ()
    params: tuple[Hashable, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """What happens to the scaled logits: `parts`, applied in order. `a >> b` applies a, then b."""

    parts: tuple[Term, ...] = ()

    def __rshift__(self, other):
        return self if other is None else Score(self.parts + as_score(other).parts)

    def __rrshift__(self, other):
        return self if other is None else Score(as_score(other).parts + self.parts)


jax.tree_util.register_dataclass(Operand, data_fields=['array'], meta_fields=['index'])
jax.tree_util.register_dataclass(Mask, data_fields=['operands'], meta_fields=['fn', 'params'])
jax.tree_util.register_dataclass(Term, data_fields=['operands'], meta_fields=['fn', 'params'])
jax.tree_util.register_dataclass(Score, data_fields=['parts'], meta_fields=[])


def _and(i, a, b):
    return a & b


def _or(i, a, b):
    return a | b


def _not(i, a):
    return ~a


def as_mask(x) -> Mask | None:
    """None, a `Mask`, or a plain `lambda i: i.k <= i.q`."""
    if x is None or isinstance(x, Mask):
        return x
    if isinstance(x, Score | Term):
        raise ValueError('a mask is wanted, a score was given; pass it as score=')
    if callable(x):
        return Mask(x)
    raise ValueError(f'a mask is None, a Mask or a function of an Index, given {_what(x)}; for an array: masks.array')


def _given(x) -> Mask | None:
    if x is None:
        raise ValueError('mask | None: None stands for all pairs, and so would the whole; leave it out')
    return as_mask(x)


def as_score(x) -> Score | None:
    """None, a `Score`, or a plain `lambda s, i: s - abs(i.q - i.k)`."""
    if x is None or isinstance(x, Score):
        return x
    if isinstance(x, Term):
        return Score((x,))
    if isinstance(x, Mask):
        raise ValueError('a score is wanted, a mask was given; pass it as mask=')
    if callable(x):
        return Score((Term(x),))
    raise ValueError(
        f'a score is None, a Score or a function of a logit and an Index, given {_what(x)}; for an array: bias='
    )


def _what(x):
    return f'an array of shape {x.shape}' if hasattr(x, 'shape') else f'{type(x).__name__} {x!r}'


def flatten(value: Mask | Score) -> tuple[list[Operand], Callable]:
    """The operands of a mask or score, and one function over their flat values.

    Returns:
      (operands, call): `call(i, values)` for a mask, `call(s, i, values)` for a score, values in `operands`' order.
    """
    if isinstance(value, Score):
        pieces = [(part, _flatten_node(part)) for part in value.parts]

        def call(s, i, values):
            values = list(values)
            for part, (operands, arguments) in pieces:
                mine, values = values[: len(operands)], values[len(operands) :]
                s = part.fn(s, i, *arguments(i, mine), *part.params)
            return s

        return [o for _, (operands, _) in pieces for o in operands], call
    operands, arguments = _flatten_node(value)
    return operands, lambda i, values: value.fn(i, *arguments(i, values), *value.params)


def _flatten_node(node):
    """The leaves below a node, and (i, leaf values) -> the values of the node's own operands."""
    pieces = [([x], None) if isinstance(x, Operand) else flatten(x) for x in node.operands]

    def arguments(i, values):
        values, out = list(values), []
        for operands, call in pieces:
            mine, values = values[: len(operands)], values[len(operands) :]
            out.append(mine[0] if call is None else call(i, mine))
        return out

    return [o for operands, _ in pieces for o in operands], arguments


def check(value: Mask | Score | None, B: int, N: int, T: int, S: int, name: str = 'mask') -> None:
    """Raises ValueError where an operand does not fit queries [B,T,N,.] and keys [B,S,.,.], or the function is wrong.

    The function is traced on scalars: a mask must return one boolean, a score one floating number.
    """
    if value is None:
        return
    sizes = {'b': B, 'h': N, 'q': T, 'k': S, 'd': T + S - 1}
    operands, call = flatten(value)
    for o in operands:
        shape, letters = jnp.shape(o.array), o.index
        twice = len(set(letters)) != len(letters) or ('d' in letters and set(letters) & {'q', 'k'})
        if twice or set(letters) - set(LETTERS):
            raise ValueError(f"{name}: operand index {letters!r}: letters of 'bhqkd', each once, d without q and k")
        want = tuple(sizes[c] for c in letters)
        fits = len(shape) == len(want) and all(
            n == w or (n == 1 and c in 'bh') for n, w, c in zip(shape, want, letters)
        )
        if not fits:
            raise ValueError(
                f'{name}: an operand indexed {letters!r} has shape {shape}, expected {want} '
                f'for B={B}, N={N}, T={T}, S={S} (b and h may be 1; d is T + S - 1)'
            )
    scalars = [jax.ShapeDtypeStruct((), jnp.result_type(o.array)) for o in operands]
    logit = [jax.ShapeDtypeStruct((), jnp.float32)] if isinstance(value, Score) else []
    index = [jax.ShapeDtypeStruct((), jnp.int32)] * 4
    run = lambda logit, index, values: call(*logit, Index(*index, T, S), values)
    out = jax.eval_shape(run, logit, index, scalars)
    kind, what = (jnp.floating, 'floating number') if logit else (jnp.bool_, 'boolean')
    good = getattr(out, 'shape', None) == () and jnp.issubdtype(out.dtype, kind)
    if not good:
        raise ValueError(f'{name}: the function must return one {what} per pair, it returns {out}')
