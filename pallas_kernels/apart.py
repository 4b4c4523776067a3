"""Keeps what is not finite inside its document, for recurrences that compare the tokens of a chunk all at once.

Products with masked weights are no mask: 0 · NaN is NaN. So the recurrence runs on finite numbers, and NaN is put where it
would have been: in the row of a query that is not finite, and from a token that wrote something not finite to the end of its
document.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

choose = jax.lax.cond  # on the device


def documents(run: Callable, query, key, value, beta, log_decay, initial_state, segment_ids):
    """`run(query, key, value, beta, log_decay, initial_state)`, (out [B, T, N, V], last state [B, N, H, V]), kept apart.

    Shapes as in the op; beta, log_decay and initial_state may be None. One document (segment_ids None) needs no care. What is
    hidden gets the gradient 0. A log_decay of -inf is a number here, one for each head ([N]) is not looked at.
    """
    if segment_ids is None:
        return run(query, key, value, beta, log_decay, initial_state)
    heads = value.shape[2]
    below = lambda x: x < jnp.inf

    def bad(x, good=jnp.isfinite):
        """[B, T, heads or fewer, …] -> [B, T, heads]"""
        found = ~good(x)
        found = found.any(tuple(range(3, x.ndim))) if x.ndim > 3 else found
        return jnp.repeat(found, heads // found.shape[2], axis=2)

    clean = lambda x, good=jnp.isfinite: None if x is None else jnp.where(good(x), x, 0)
    wrote = bad(key) | bad(value)
    wrote |= False if beta is None else bad(beta)
    if log_decay is not None and log_decay.ndim > 1:
        wrote |= bad(log_decay, below)
        log_decay = clean(log_decay, below)
    if initial_state is not None:
        wrote = wrote.at[:, 0].set(wrote[:, 0] | ~jnp.isfinite(initial_state).all((2, 3)))
    count = jnp.cumsum(wrote, axis=1, dtype=jnp.int32)
    begins = (segment_ids[:, 1:] != segment_ids[:, :-1])[..., None]
    before = jnp.pad(jnp.where(begins, count[:, :-1], 0), ((0, 0), (1, 0), (0, 0)))  # of earlier documents
    spoilt = count > jax.lax.cummax(before, axis=1)
    out, last = run(clean(query), clean(key), clean(value), clean(beta), log_decay, clean(initial_state))
    out = jnp.where((spoilt | bad(query))[..., None], jnp.nan, out)
    return out, jnp.where(spoilt[:, -1, :, None, None], jnp.nan, last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def where_needed(run: Callable, *arrays):
    """`run(*arrays)`, or what `documents` makes of it if its last state is not finite.

    For kernels in which a state stays spoilt once something that is not finite has entered it, 0 * NaN being NaN, whatever
    comes after: their last state tells, and inputs that are finite cost no more than a look at it. `run` is differentiable.

    arrays: query, key, value, beta, log_decay, initial_state, segment_ids.
    """
    return _either(run, arrays)[0]


def _either(run, arrays):
    result = run(*arrays)
    good = jnp.isfinite(result[1]).all()
    return choose(good, lambda: result, lambda: _documents(run, *arrays)), good


def _documents(run, *arrays):
    *floats, ids = arrays
    return documents(lambda *floats: run(*floats, ids), *floats, ids)


def _forward(run, *primals):
    leaf = lambda x: hasattr(x, 'perturbed')
    arrays = jax.tree.map(lambda x: x.value, primals, is_leaf=leaf)
    wanted = jax.tree.map(lambda x: x.perturbed, primals, is_leaf=leaf)
    result, good = _either(run, arrays)
    return result, (arrays, tuple(() if x else None for x in wanted), good)


def _backward(run, saved, cotangents):
    arrays, wanted, good = saved
    places = [i for i, x in enumerate(wanted) if x is not None]

    def pull(run):
        def of_wanted(*chosen):
            full = list(arrays)
            for i, x in zip(places, chosen):
                full[i] = x
            return run(*full)

        return jax.vjp(of_wanted, *(arrays[i] for i in places))[1](cotangents)

    found = choose(good, lambda: pull(run), lambda: pull(functools.partial(_documents, run)))
    gradients = [None if x is None else jnp.zeros_like(x) for x in arrays[:-1]] + [None]
    for i, x in zip(places, found):
        gradients[i] = x
    return tuple(gradients)


where_needed.defvjp(_forward, _backward, symbolic_zeros=True)
