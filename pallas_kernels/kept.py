"""Marks what a backward pass should find rather than compute again.

Under `jax.checkpoint` with `POLICY` exactly the marked arrays are stored; elsewhere the mark does nothing. Marked are the
products of projections and what a kernel's derivative rule reads, so that norms, activations and the like are computed
twice, being cheap, and products and kernels once.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = 'kept'
POLICY = jax.checkpoint_policies.save_only_these_names(NAME)


def kept(tree):
    """The same arrays, marked."""
    return jax.tree.map(lambda x: checkpoint_name(x, NAME), tree)


def kept_once(tree):
    """As `kept`, of a kernel's outputs: XLA would run the kernel twice a turn of a loop, once for those who read it and once in
    a fusion that writes to the loop's stack."""
    return kept(jax.lax.optimization_barrier(tree))
