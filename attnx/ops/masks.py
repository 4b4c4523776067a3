"""Masks: which keys a query sees. Small values to compose with `&`, `|`, `~`; see `pallas_kernels.elementwise`.

    masks.causal() & masks.window(1024) & masks.segments(ids)

Any function of an index is a mask too: `masks.causal() & (lambda i: i.k % 2 == 0)`. Below, q and k are positions. Where
the numbers of queries T and keys S differ, they are aligned at the end (bottom right): query r stands at r + (S - T).
Masks made of positions take `query_positions` [B, T] and `key_positions` [B, S] (int) instead, as decoding with a cache
needs; a key position below 0 marks an empty slot, which nothing sees. `~` is of the whole rule: it shows what was hidden,
empty slots and padding too. `mask & None` is the mask, since None is all pairs.
"""

import operator

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.elementwise import Index, Mask, Operand, as_mask

__all__ = [
    'Index', 'Mask', 'Operand', 'array', 'as_mask', 'block_causal', 'causal', 'dilated', 'first', 'fixed',
    'global_window', 'padding', 'prefix_lm', 'segments', 'strided', 'window',
]  # fmt: skip


def causal(query_positions=None, key_positions=None) -> Mask:
    """k <= q: a token sees itself and what came before."""
    return _of_positions(_causal, query_positions, key_positions)


def window(size: int, query_positions=None, key_positions=None, *, ahead: int | None = None) -> Mask:
    """-ahead <= q - k < size: `size` tokens looking back, self included; as many looking ahead unless said.

    With `causal() &` it is the sliding window of Mistral and Longformer's decoder (arXiv:2004.05150).
    """
    size = _count('window', 'size', size)
    ahead = size - 1 if ahead is None else _count('window', 'ahead', ahead, 0)
    return _of_positions(_window, query_positions, key_positions, size, ahead)


def dilated(size: int, rate: int, query_positions=None, key_positions=None) -> Mask:
    """q - k = 0, ±rate, …, ±rate·(size - 1): a window with gaps (Longformer, arXiv:2004.05150)."""
    return _of_positions(
        _dilated, query_positions, key_positions, _count('dilated', 'size', size), _count('dilated', 'rate', rate)
    )


def strided(stride: int, query_positions=None, key_positions=None) -> Mask:
    """(q - k) mod stride = 0. `window(stride) | strided(stride)` is Sparse Transformer's, united (arXiv:1904.10509)."""
    return _of_positions(_strided, query_positions, key_positions, _count('strided', 'stride', stride))


def fixed(block: int, summary: int, query_positions=None, key_positions=None) -> Mask:
    """k in q's block, or one of the last `summary` columns of any block (Sparse Transformer, arXiv:1904.10509)."""
    block = _count('fixed', 'block', block)
    if _count('fixed', 'summary', summary) > block:
        raise ValueError(f'masks.fixed: summary must be at most block={block}, given {summary}')
    return _of_positions(_fixed, query_positions, key_positions, block, summary)


def block_causal(block: int, query_positions=None, key_positions=None) -> Mask:
    """floor(k / block) <= floor(q / block): causal between blocks of tokens, all-to-all inside one."""
    return _of_positions(_block_causal, query_positions, key_positions, _count('block_causal', 'block', block))


def prefix_lm(prefix, query_positions=None, key_positions=None) -> Mask:
    """k <= q or k < prefix: all see the prefix, the rest is causal. prefix: int or int array [B] (arXiv:1910.10683)."""
    return causal(query_positions, key_positions) | first(prefix, key_positions)


def global_window(size: int, num_global: int, query_positions=None, key_positions=None) -> Mask:
    """A window, and the first `num_global` tokens see all and are seen by all (Longformer, arXiv:2004.05150).

    With `causal() &` it is the window with attention sinks of StreamingLLM (arXiv:2309.17453).
    """
    num_global = _count('global_window', 'num_global', num_global, 0)
    near = window(size, query_positions, key_positions)
    return near | _of_positions(_global, query_positions, key_positions, num_global)


def first(count, key_positions=None) -> Mask:
    """k < count; count: int, or int array [B]."""
    if jnp.ndim(count) == 0 and not hasattr(count, 'dtype'):
        return _of_positions(_first, None, key_positions, _count('first', 'count', count, 0))
    count = Operand(_integers('first', 'count', count, 'b'), 'b')
    if key_positions is None:
        return Mask(_before_index, (count,))
    return Mask(_before, (count, Operand(_integers('first', 'key_positions', key_positions, 'bk'), 'bk')))


def segments(query_ids, key_ids=None) -> Mask:
    """Equal ids above 0: tokens of one packed document see each other. Id 0, padding, sees nothing and is not seen.

    Args:
      query_ids: int [B, T].
      key_ids: int [B, S]; the queries' by default, which needs T = S.
    """
    key_ids = query_ids if key_ids is None else key_ids
    operands = (
        Operand(_integers('segments', 'query_ids', query_ids, 'bq'), 'bq'),
        Operand(_integers('segments', 'key_ids', key_ids, 'bk'), 'bk'),
    )
    return Mask(_segments, operands)


def padding(valid) -> Mask:
    """Keys that exist: `valid` is bool [B, S], or the number of keys of each sequence, int [B] (padding at the end)."""
    if valid is None:
        raise ValueError('masks.padding: needs valid, bool [B, S], or lengths, int [B]; given None')
    valid = jnp.asarray(valid)
    if valid.ndim == 2 and valid.dtype == jnp.bool_:
        return Mask(_value, (Operand(valid, 'bk'),))
    if valid.ndim == 1 and jnp.issubdtype(valid.dtype, jnp.integer):
        return Mask(_before_index, (Operand(valid, 'b'),))
    raise ValueError(f'masks.padding: valid is bool [B, S] or lengths int [B], given {valid.dtype}{valid.shape}')


def array(visible) -> Mask:
    """An arbitrary mask: bool [B|1, N|1, T, S], or without leading dimensions: [N|1, T, S], [T, S]."""
    if visible is None:
        raise ValueError('masks.array: needs a bool array [B|1, N|1, T, S]; given None')
    visible = jnp.asarray(visible)
    if visible.dtype != jnp.bool_ or not 2 <= visible.ndim <= 4:
        raise ValueError(
            f'masks.array: visible must be bool [B|1, N|1, T, S], given {visible.dtype}{visible.shape}'
            + ('; for additive biases: scores.bias' if jnp.issubdtype(visible.dtype, jnp.floating) else '')
        )
    return Mask(_value, (Operand(visible, 'bhqk'[-visible.ndim :]),))


def _of_positions(rule, query_positions, key_positions, *params) -> Mask:
    """The mask rule(q, k, *params) over aligned indices, or over given positions."""
    given = (query_positions, 'query_positions', 'bq'), (key_positions, 'key_positions', 'bk')
    operands = tuple(
        Operand(_integers(rule.__name__[1:], name, x, letters), letters) for x, name, letters in given if x is not None
    )
    return Mask(_positioned, operands, (rule, query_positions is not None, key_positions is not None, params))


def _positioned(i, *rest):
    *values, rule, has_query, has_key, params = rest
    q = values[0] if has_query else i.q + (i.k_len - i.q_len)
    seen = rule(q, values[-1] if has_key else i.k, *params)
    return seen & (values[-1] >= 0) if has_key else seen


# The rules: q and k are int32. Where it can be, each is a comparison of a monotone expression, so that interval
# arithmetic decides blocks exactly. Divisions see k only: q may be negative, where there are more queries than keys.


def _causal(q, k):
    return k <= q


def _window(q, k, size, ahead):
    return (q - k < size) & (q - k >= -ahead)


def _dilated(q, k, size, rate):
    far = abs(q - k)
    return (lax.rem(far, np.int32(rate)) == 0) & (far <= rate * (size - 1))


def _strided(q, k, stride):
    return lax.rem(abs(q - k), np.int32(stride)) == 0


def _fixed(q, k, block, summary):
    start = lax.div(k, np.int32(block)) * block
    return (lax.rem(k, np.int32(block)) >= block - summary) | ((start <= q) & (q < start + block))


def _block_causal(q, k, block):
    return lax.div(k, np.int32(block)) * block <= q


def _first(q, k, count):
    return k < count


def _global(q, k, count):
    return (k < count) | (q < count)


def _before_index(i, count):
    return i.k < count


def _before(i, count, key):
    return (key < count) & (key >= 0)


def _segments(i, query_id, key_id):
    return jnp.where(query_id > 0, query_id, -1) == jnp.maximum(key_id, 0)  # of pairs one comparison: ids are vectors


def _value(i, visible):
    return visible


def _count(mask, name, value, least=1) -> int:
    try:
        count = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:  # what is traced included: the program depends on it
        count = -1
    if count < least:
        raise ValueError(f'masks.{mask}: {name} must be a Python int of at least {least}, given {value!r}')
    return count


def _integers(mask, name, x, letters):
    shape = ', '.join({'b': 'B', 'q': 'T', 'k': 'S'}[c] for c in letters)
    if x is None:
        raise ValueError(f'masks.{mask}: needs {name}, int [{shape}]; given None')
    if isinstance(x, Index):
        raise ValueError(f'masks.{mask} makes a mask and is none: call it, masks.{mask}(…)')
    x = jnp.asarray(x)
    if x.ndim != len(letters) or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f'masks.{mask}: {name} must be int [{shape}], given {x.dtype}{x.shape}')
    return x.astype(jnp.int32)
