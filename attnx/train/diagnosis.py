"""After a step that was not finite: the same step again, in parts, to find where it began."""

import dataclasses
import functools

import jax
from jax.sharding import NamedSharding, PartitionSpec

from attnx.train import health, report
from attnx.train import step as step_lib


def diagnose(made, config, mesh, key, failed, state, rows) -> dict:
    """What `report.diagnose` finds of the step `failed` from `state`.

    made: the run's `attnx.train.program`. failed: a `loop.Step`. key: of the run. rows: where the step's data come from.
    """
    key = jax.random.fold_in(key, state['step'])
    whole = dataclasses.replace(config.step, accumulate=1)
    single = NamedSharding(mesh, PartitionSpec())
    jit = lambda function: jax.jit(function, out_shardings=single)
    given = state['params'], failed.batch, key, state['step']

    def activations(params, batch, key, step):
        traced = made.trace(params, batch, key, step)
        found = [report.census(t.name, t.value, t.heads) for t in health.tensors(traced)]
        return [one for one in found if one is not None]

    def gradients(params, batch, key, step):
        forward = functools.partial(made.forward, step=step)
        return report.censuses(step_lib.gradients(forward, params, batch, key, whole)[1])

    return report.diagnose(
        step=failed.number,
        metrics=failed.values,
        shapes=made.shapes,
        params=jit(report.censuses)(state['params']),
        batch=jit(report.censuses)(failed.batch),
        trace=lambda: jit(activations)(*given),
        gradients=lambda: jit(gradients)(*given),
        rows=rows,
    )
