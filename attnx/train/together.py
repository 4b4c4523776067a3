"""Runs that differ in their seeds alone, trained as one program. See `run_together`."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from attnx.train import metrics
from attnx.train import step as step_lib
from attnx.train.config import Config, check, check_batched
from attnx.train.loop import Run
from attnx.train.process import Stop, locked, writable


def run_together(configs: Sequence[Config]) -> list[dict[str, float]] | None:
    """Trains runs that differ in their seeds alone as one program, batched by `jax.vmap`.

    It is quicker where one small model leaves the device idle. A run begins with the same parameters and sees the same rows
    as alone; its numbers differ by rounding, since batched products may sum in another order. Runs are saved at their end
    only: those cut short begin again. One that meets a NaN or Inf is left undone; `run` then says where it is from.
    tokens_per_second is that of all runs together.

    Returns:
      the last evaluation of each, empty where it was left undone; None: a signal stopped them.

    Raises:
      ValueError: the runs differ in more than run_dir, seed and data.seed, ask for what runs alone have (health, profile,
        tune, compiler, distillation, rewinding), or are spread over several processes.
    """
    own = lambda c: dataclasses.replace(c, run_dir='-', seed=0, data=dataclasses.replace(c.data, seed=0))
    if len({repr(own(config)) for config in configs}) != 1:
        raise ValueError('runs that are batched may differ in run_dir, seed and data.seed only')
    check(configs[0])
    check_batched(configs[0])
    with contextlib.ExitStack() as stack:
        runs = []
        for config in configs:
            run_dir = pathlib.Path(config.run_dir).absolute()
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(writable(run_dir))
            stack.enter_context(locked(run_dir))
            runs.append(Run(config, run_dir, stack))
        first, config = runs[0], configs[0]
        if jax.process_count() > 1:
            raise ValueError(f'runs are batched in one process; there are {jax.process_count()}')
        undone = {k: run for k, run in enumerate(runs) if (run.checkpoints.latest() or 0) < config.steps}
        if not undone:
            return [run.evaluated(config.steps) for run in runs]
        stop = Stop(active=True)
        stack.callback(stop.restore)
        for run in undone.values():
            run.note()
            run.log.open(None)
        keys = jnp.stack([run.key for run in runs])
        state = jax.jit(jax.vmap(first._init, in_axes=(0, None)))(keys, None)
        update = jax.jit(jax.vmap(first.update), donate_argnums=0)
        evaluate_batch = jax.jit(jax.vmap(first.evaluate_batch))

        def evaluate(number):
            batches = zip(*(run.data.evaluation() for run in runs), strict=True)
            sums = jax.device_get([evaluate_batch(state['params'], _stacked(batch)) for batch in batches])
            found = [step_lib.summarise([{n: v[k] for n, v in s.items()} for s in sums]) for k in range(len(runs))]
            for k, run in undone.items():
                run.log.write(number, 'eval', found[k])
            return found

        found = evaluate(0)
        clock, since = time.monotonic(), 0
        for number in range(1, config.steps + 1):
            state, values = update(state, _stacked([next(run.data.train) for run in runs]), keys)
            logs = number % config.log.every == 0 or number == config.steps
            evaluates = number == config.steps or (config.eval_every and number % config.eval_every == 0)
            if logs or number == 1:
                values = jax.device_get(values)
                undone = {k: run for k, run in undone.items() if not values['frozen'][k]}
            if logs:
                speed = first.speed((number - since) * config.data.batch_size * len(runs), time.monotonic() - clock)
                for k, run in undone.items():
                    run.log.write(number, 'train', {n: float(v[k]) for n, v in values.items() if n != 'frozen'} | speed)
            if evaluates:
                found = evaluate(number)
            if stop.received or not undone:
                break
            if logs or evaluates or number == 1:
                clock, since = time.monotonic(), number
        if stop.received and number < config.steps:
            return None
        for k, run in undone.items():
            mine = jax.tree.map(lambda v, k=k: v[k], state)
            run.log.sync()
            run.checkpoints.save(number, mine, {'data': run.data.train.get_state(), 'rewinds': 0}, found[k]['loss'])
            run.checkpoints.wait()
            run.progress = metrics.Progress(config.steps, config.steps)
            run.finish(mine['params'])
            run.progress.close()
        return [run.evaluated(config.steps) for run in runs]


def _stacked(batches):
    """Batches of several runs as one, the run as its leading axis."""
    return {name: jnp.asarray(np.stack([batch[name] for batch in batches])) for name in batches[0]}
