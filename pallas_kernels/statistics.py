"""Per-head statistics of softmax attention, for watching a training run: from rows that every form has, so that forms agree.

A logit that grows without bound, an entropy that falls to 0 or a sink that takes all the weight shows a head in trouble
steps before the loss does.
"""

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Statistics(NamedTuple):
    """Float32 [N], over the batch and the rows that see something; None: not asked for. No gradient flows through them.

    max_logit: the largest visible logit, after the score; -inf where no row sees anything.
    entropy: mean entropy of a row's weights, its sink's included, in nats, before dropout.
    sink_mass: mean weight of the sink; 0 without one.
    """

    max_logit: jax.Array | None = None
    entropy: jax.Array | None = None
    sink_mass: jax.Array | None = None


def asked(return_stats: bool | Collection[str]) -> tuple[str, ...]:
    """Which `Statistics` an op's `return_stats` asks for: all, none, or those of these names.

    Raises:
      ValueError: a name that is none of them.
    """
    fields = Statistics._fields
    names = (fields if return_stats else ()) if isinstance(return_stats, bool) else return_stats
    if isinstance(names, str) or any(name not in fields for name in names):
        raise ValueError(f'return_stats: expected True, False or some of {fields}, given {return_stats!r}')
    return tuple(name for name in fields if name in names)


def of_rows(names: tuple[str, ...], lse, top, mean, sinks) -> Statistics:
    """Those of these names, from float [B, N, T]: log-sum-exp; largest logit, for max_logit; sum over keys of weight times
    logit, for the entropy; and sinks [N] or None."""
    constant = lambda x: lax.stop_gradient(x).astype(jnp.float32)
    lse, sink = constant(lse), -jnp.inf if sinks is None else constant(sinks)[:, None]
    seen = lse != -jnp.inf
    count = jnp.maximum(seen.sum((0, 2)), 1)
    average = lambda x: jnp.where(seen, x, 0.0).sum((0, 2)) / count
    mass = jnp.exp(sink - lse)
    found = {
        'max_logit': lambda: constant(top).max((0, 2)),
        'entropy': lambda: average(lse - constant(mean) - jnp.where(mass > 0, mass * sink, 0.0)),
        'sink_mass': lambda: average(mass),
    }
    return Statistics(**{name: found[name]() for name in names})
