"""Forward-mode derivatives for functions that have their own backward pass.

`jax.custom_vjp` takes forward mode away from a function, and under `jax.jit` JAX says so only while it lowers, where nothing
can name another way. `with_forward_mode` gives it back.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero


def once(tree, message: str):
    """The identity on a tree of arrays; TypeError(message) where a derivative of it is taken."""

    @jax.custom_jvp
    def identity(x):
        return x

    @identity.defjvp
    def _(primals, tangents):
        raise TypeError(message)

    floating = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return jax.tree.map(lambda x: identity(x) if floating(x) else x, tree)


def with_forward_mode(function: Callable, plain: Callable, first_order: str = '') -> Callable:
    """`function`, reverse mode by its own backward pass, forward mode by that of `plain`.

    Both take the same trees of arrays and return the same; `function` is a `jax.custom_vjp`, `plain` anything that
    `jax.jvp` takes, loops of traced length included. Holds under jit, vmap, scan, checkpoint and shard_map. Derivatives of
    derivatives are those of `function`'s own rules; with `first_order` they raise a TypeError that says so.

    The tangent L(dx) is the solution y2 of the linear system y1 = dx, y2 - L(y1) = 0, because
    `jax.lax.custom_linear_solve` is where JAX lets a linear map bring its own transpose with every transformation: the
    transposed system x2 = c2, x1 = c1 + Lᵀ(c2) takes one backward pass, and c1 is zero as nobody reads y1. JAX would
    read the system's matrix for derivatives of L alone; these exist nowhere, so the identity stands there.
    """

    def call(*args):
        leaves, tree = jax.tree.flatten(args)
        on_leaves = lambda f: lambda *leaves: f(*jax.tree.unflatten(tree, leaves))
        return _differentiable(on_leaves(function), on_leaves(plain), first_order)(*leaves)

    return call


def _differentiable(function, plain, first_order):
    def rule(primals, tangents):
        primals = once(primals, first_order) if first_order else primals
        active = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]
        x, dx = ([y[i] for i in active] for y in (primals, tangents))

        def of_active(f):
            return lambda *x: f(*(x[active.index(i)] if i in active else p for i, p in enumerate(primals)))

        out, pull = jax.vjp(of_active(function), *x)
        leaves, tree = jax.tree.flatten(out)

        # Each is one call in the trace: JAX lowers the insides of a solve without the mesh axes that they vary over.
        @jax.jit
        def solve(b):
            _, dy = jax.jvp(of_active(plain), tuple(x), tuple(b[0]))
            return b[0], jax.tree.leaves(dy)

        @jax.jit
        def transposed(c):
            return list(pull(jax.tree.unflatten(tree, c[1]))), c[1]

        solution = lax.custom_linear_solve(
            lambda y: y,
            (dx, _zeros(leaves, dx)),
            solve=lambda _, b: solve(b),
            transpose_solve=lambda _, c: transposed(c),
        )
        return out, jax.tree.unflatten(tree, solution[1])

    call = jax.custom_jvp(function)
    call.defjvp(rule, symbolic_zeros=True)
    return call


def _zeros(like, dx):
    """Zeros that depend on dx for all that JAX can tell: it transposes a solve only if no part of b is known.

    The first choice drops what would be the transposed sum over all of x, or XLA adds up as many constant zeros, compiling.
    """
    none = lambda x, like: lax.select(jnp.zeros(like.shape, bool), x, jnp.zeros_like(like))
    one = min(dx, key=jnp.size).ravel()[0]
    one = none(one, one)
    return [none(jnp.broadcast_to(one.astype(x.dtype), x.shape), x) for x in like]
