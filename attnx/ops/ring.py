"""Keys and values that go round a ring of devices (arXiv:2310.01889). See `attend`.

What a device reads from each part is merged,

    lse = log Σ_i exp lse_i      out = Σ_i exp(lse_i - lse) out_i,

and the backward pass goes round once more with the keys' gradients, from out and lse of the whole
(`attnx.ops.softmax_backward`), so that no device ever holds more keys than its own and one that passes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnx.ops.parallel import shift
from pallas_kernels.kept import kept


class Place:
    """Which tokens a device works on: its own part, or halves r and 2 P - 1 - r of parts."""

    def __init__(self, axis: str, size: int, zigzag: bool):
        self.axis, self.size, self.zigzag = axis, size, zigzag
        halves = [2 * r for r in range(size)], [2 * r + 1 for r in range(size)]
        home = lambda c: min(c, 2 * size - 1 - c)
        self.perms = [[(c // 2, home(c)) for c in some] for some in halves]

    def starts(self, device, length: int):
        """Index of the first token of each piece of a device's work."""
        if not self.zigzag:
            return [device * (length // self.size)]
        half = length // (2 * self.size)
        return [device * half, (2 * self.size - 1 - device) * half]

    def out(self, x, axis: int) -> list:
        """The pieces of this device's work, from its part."""
        if not self.zigzag:
            return [x]
        even, odd = (lax.ppermute(y, self.axis, perm) for y, perm in zip(jnp.split(x, 2, axis), self.perms))
        low = lax.axis_index(self.axis) % 2 == 0  # even halves below P stay even
        return [jnp.where(low, even, odd), jnp.where(low, odd, even)]

    def back(self, pieces, axis: int):
        """This device's part, from the pieces of all."""
        if not self.zigzag:
            return pieces[0]
        low = lax.axis_index(self.axis) % 2 == 0
        even, odd = jnp.where(low, *pieces), jnp.where(low, *pieces[::-1])
        returned = (lax.ppermute(y, self.axis, [(b, a) for a, b in perm]) for y, perm in zip((even, odd), self.perms))
        return jnp.concatenate(list(returned), axis)


class _Round(NamedTuple):
    """What is static of a ring: `pair(q, k, v, floating, rest, q0, k0, known) -> (out, lse)` and the way round."""

    pair: Any
    place: Place
    legs: tuple[int, int]
    pairs: tuple[tuple[int, int], ...]
    lengths: tuple[int, int]

    def keys_of(self, step):
        """The device whose keys are here at this step."""
        return (lax.axis_index(self.place.axis) - step) % self.place.size

    def __hash__(self):
        return id(self.pair)

    def __eq__(self, other):
        return self is other


def attend(part, place: Place, pairs, legs, lengths, q, k, v, arrays, seed, fewer):
    """Outputs (float32) and lse, a tuple of each, one for each piece of this device's queries.

    Args:
      part: `part(q, k, v, arrays, None, seed, q0, k0, known)` attends one piece of queries to one of keys, from these indices
        on: (out, lse), or `known` with that part's gradients.
      pairs: which pieces of queries meet which of keys on some device.
      legs: how many devices on, and how many back, keys go.
      lengths: T and S of the whole.
      q, k, v: this device's part of [B, T, N, H], [B, S, K, H], [B, S, K, Hv].
      arrays: of the mask and the score; the floating ones get gradients.
      fewer: int32 [2] in place of legs, the same on all devices, where the mask is known only when it runs; or None.
    """
    floats = [jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in arrays]
    floating, rest = ([x for x, f in zip(arrays, floats) if f is kind] for kind in (True, False))

    def pair(q, k, v, floating, rest, q0, k0, known=None):
        arrays, seed, _ = rest
        floating, arrays = iter(floating), iter(arrays)
        return part(q, k, v, [next(floating if f else arrays) for f in floats], None, seed, q0, k0, known)

    static = _Round(pair, place, legs, pairs, lengths)
    pieces = (tuple(place.out(x, 1)) for x in (q, k, v))
    return _go_round(static, *pieces, floating, (rest, seed, fewer))


def _merge(a, b):
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = jnp.logaddexp(lse_a, lse_b)
    share = lambda part: jnp.where(lse == -jnp.inf, 0, jnp.exp(part - lse))
    weighted = lambda out, part: out * jnp.moveaxis(share(part), 1, 2)[..., None]
    return weighted(out_a, lse_a) + weighted(out_b, lse_b), lse


def _pass(tree, axis: str, by: int):
    """`shift` of all arrays as one: XLA has one transfer at a time on its way beside the products."""
    leaves, structure = jax.tree.flatten(tree)
    bits = [lax.bitcast_convert_type(x, jnp.uint16).ravel() for x in leaves]
    parts = jnp.split(shift(jnp.concatenate(bits), axis, by), np.cumsum([x.size for x in bits])[:-1])
    whole = lambda part, x: part.reshape(*x.shape, *[x.dtype.itemsize // 2] * (x.dtype.itemsize > 2))
    return jax.tree.unflatten(structure, [lax.bitcast_convert_type(whole(p, x), x.dtype) for p, x in zip(parts, leaves)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _go_round(ring: _Round, q, k, v, floating, rest):
    axis, queries = ring.place.axis, ring.place.starts(lax.axis_index(ring.place.axis), ring.lengths[0])

    def step(by, number, carry):
        found, k, v = carry
        passed = _pass((k, v), axis, by)
        keys = ring.place.starts(ring.keys_of(by * number), ring.lengths[1])
        found = list(found)
        for a, b in ring.pairs:
            out, lse = ring.pair(q[a], k[b], v[b], floating, rest, queries[a], keys[b])
            found[a] = _merge(found[a], (out.astype(lse.dtype), lse))
        return found, *passed

    dtype = jnp.promote_types(q[0].dtype, jnp.float32)
    rows = lambda x: (x.shape[0], x.shape[2], x.shape[1])
    empty = [(jnp.zeros((*x.shape[:3], v[0].shape[3]), dtype), jnp.full(rows(x), -jnp.inf, dtype)) for x in q]
    on, back = ring.legs if rest[2] is None else rest[2]
    found, _, _ = lax.fori_loop(0, on + 1, functools.partial(step, 1), (empty, k, v))
    if not isinstance(back, int) or back:
        found, _, _ = lax.fori_loop(1, back + 1, functools.partial(step, -1), (found, *_pass((k, v), axis, -1)))
    return tuple(out for out, _ in found), tuple(lse for _, lse in found)


def _go_round_fwd(ring, q, k, v, floating, rest):
    found = kept(_go_round(ring, q, k, v, floating, rest))
    return found, (q, k, v, floating, rest, *found)


def _go_round_bwd(ring, saved, cotangents):
    q, k, v, floating, rest, outs, lses = saved
    douts, dlses = cotangents
    axis, queries = ring.place.axis, ring.place.starts(lax.axis_index(ring.place.axis), ring.lengths[0])
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), tree)
    add = lambda total, part: jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, part)
    as_given = lambda tree, like: jax.tree.map(lambda g, x: g.astype(x.dtype), tree, like)

    def step(by, number, carry):
        dq, dfloating, k, v, dk, dv = carry
        *passed, dk, dv = _pass((k, v, dk, dv), axis, by)  # gradients go a step behind their keys
        dq, dk, dv = list(dq), list(dk), list(dv)
        keys = ring.place.starts(ring.keys_of(by * number), ring.lengths[1])
        for a, b in ring.pairs:
            known = outs[a], lses[a]
            part = lambda *args, a=a, b=b, known=known: ring.pair(*args, rest, queries[a], keys[b], known)
            dx, dy, dz, more = jax.vjp(part, q[a], k[b], v[b], floating)[1]((douts[a], dlses[a]))
            dq[a], dk[b], dv[b], dfloating = add(dq[a], dx), add(dk[b], dy), add(dv[b], dz), add(dfloating, more)
        return tuple(dq), dfloating, *passed, tuple(dk), tuple(dv)

    def home(tree, by):
        ways = [lambda x, n=n: _pass(x, axis, n) if n else x for n in range(ring.place.size)]
        tree = as_given(tree, (k, v))
        return ways[by % len(ways)](tree) if isinstance(by, int) else lax.switch(by % len(ways), ways, tree)

    on, back = ring.legs if rest[2] is None else rest[2]
    start = zeros(q), zeros(floating), k, v, zeros(k), zeros(v)
    dq, dfloating, _, _, *gradients = lax.fori_loop(0, on + 1, functools.partial(step, 1), start)
    gradients = home(tuple(gradients), -on)
    if not isinstance(back, int) or back:
        start = dq, dfloating, *_pass((k, v), axis, -1), zeros(k), zeros(v)
        dq, dfloating, _, _, *more = lax.fori_loop(1, back + 1, functools.partial(step, -1), start)
        gradients = add(gradients, home(tuple(more), back))
    return as_given(dq, q), *gradients, as_given(dfloating, floating), None


_go_round.defvjp(_go_round_fwd, _go_round_bwd)
