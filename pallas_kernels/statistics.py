"""Per-head statistics of softmax attention, for watching a training run: from rows that every form has, so that forms agree.

A logit that grows without bound, an entropy that falls to 0 or a sink that takes all the weight shows a head in trouble
steps before the loss does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Statistics(NamedTuple):
    """Float32 [N], over the batch and the rows that see something. No gradient flows through them.

    max_logit: the largest visible logit, after the score; -inf where no row sees anything.
    entropy: mean entropy of a row's weights, its sink's included, in nats, before dropout.
    sink_mass: mean weight of the sink; 0 without one.
    """

    max_logit: jax.Array
    entropy: jax.Array
    sink_mass: jax.Array


def of_rows(lse, top, mean, sinks) -> Statistics:
    """From float [B, N, T]: log-sum-exp, largest logit, sum over keys of weight times logit; and sinks [N] or None."""
    lse, top, mean = (lax.stop_gradient(x).astype(jnp.float32) for x in (lse, top, mean))
    seen = lse != -jnp.inf
    count = jnp.maximum(seen.sum((0, 2)), 1)
    average = lambda x: jnp.where(seen, x, 0.0).sum((0, 2)) / count
    entropy, mass = lse - mean, jnp.zeros_like(lse)
    if sinks is not None:
        sink = lax.stop_gradient(sinks).astype(jnp.float32)[:, None]
        mass = jnp.exp(sink - lse)
        entropy -= mass * sink
    return Statistics(top.max((0, 2)), average(entropy), average(mass))
