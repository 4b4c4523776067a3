"""Marks what a backward pass should find rather than compute again.

Under `jax.checkpoint` with `POLICY` exactly the marked arrays are stored; elsewhere the mark does nothing. Marked are the
products of projections and what a kernel's derivative rule reads, so that norms, activations and the like are computed
twice, being cheap, and products and kernels once.
"""

import contextlib
import contextvars

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = 'kept'
POLICY = jax.checkpoint_policies.save_only_these_names(NAME)


_looped: contextvars.ContextVar[bool] = contextvars.ContextVar('looped', default=False)


@contextlib.contextmanager
def looped():
    """Within: the body of a loop is traced, whose stack takes what is kept."""
    token = _looped.set(True)
    try:
        yield
    finally:
        _looped.reset(token)


def kept(tree):
    """The same arrays, marked; in a loop's body as `kept_once`."""
    tree = jax.lax.optimization_barrier(tree) if _looped.get() else tree
    return jax.tree.map(lambda x: checkpoint_name(x, NAME), tree)


def kept_once(tree):
    """As `kept`, of the outputs of a kernel or a product: XLA would compute these twice a turn of a loop, once for those who
    read them and once in a fusion that writes to the loop's stack."""
    with looped():
        return kept(tree)
