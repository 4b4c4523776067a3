"""`run(config)`: trains until done, and leaves a run directory that says everything about the run.

Running the same command again resumes it, or says that it is complete. Of a model this file knows the functions of
`attnx.train.program`.
"""

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from attnx import config as config_lib
from attnx import plan, sharding
from attnx.train import checkpoint as checkpoint_lib
from attnx.train import data as data_lib
from attnx.train import health, metrics, report
from attnx.train import step as step_lib
from attnx.train.config import Config, check, free, served
from attnx.train.diagnosis import diagnose
from attnx.train.process import Stop, locked, writable
from attnx.train.program import check_compiler, check_rows, placed, program, training
from attnx.train.sample import draw
from pallas_kernels.softmax_attention import tiles as tiles_lib


class Result(NamedTuple):
    """How a run ended: its step, 'complete', 'already complete' or 'stopped', the last evaluation, the sample."""

    step: int
    status: str
    evaluation: dict[str, float]
    sample: str | None
    message: str


class Step(NamedTuple):
    """A step whose numbers have not been read yet."""

    number: int
    values: Mapping[str, jax.Array]
    batch: Mapping[str, jax.Array]
    position: int  # batches taken so far, this one included


def run(config: Config, *, task=None, teacher: Any = None, initial: Any = None, until: int | None = None) -> Result:
    """Trains `config`, or resumes it.

    Args:
      task: what `config.data` describes, where it was built before.
      teacher: a model whose logits are learnt from, with weight `config.step.distill`.
      initial: a model, or its flat parameters, to begin from (of `attnx.interop.convert`, say); the others begin at random.
      until: a step at which to evaluate, save and return as 'stopped'; a later call goes on as if there had been no pause.

    Raises:
      ValueError: a setting that can't be served, a checkpoint that can't be used or written.
      report.TrainingFailure: a NaN or Inf; run_dir/failure.json names the first bad layer and tensor.
    """
    if (teacher is None) != (not config.step.distill):
        raise ValueError('a teacher and its weight step.distill go together: run(config, teacher=model), distill > 0')
    if config.distributed:
        # A cluster that jax knows needs none of these; elsewhere they say who is who (JAX_COORDINATOR_ADDRESS: where).
        given = {'num_processes': 'JAX_NUM_PROCESSES', 'process_id': 'JAX_PROCESS_ID'}
        try:
            known: dict[str, Any] = {k: int(os.environ[v]) for k, v in given.items() if v in os.environ}
            jax.distributed.initialize(**known)
        except ValueError as error:
            names = 'JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID'
            raise ValueError(f'distributed: {error}; start the processes by SLURM or Open MPI, or set {names}') from None
    check(config)
    check_compiler(config.compiler)
    run_dir = pathlib.Path(config.run_dir).absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    with writable(run_dir), locked(run_dir), contextlib.ExitStack() as stack:
        return Run(config, run_dir, stack, task, teacher, initial).run(until)


class Run:
    """The parts of one run, built in an order that meets bad settings before anything costly."""

    def __init__(self, config: Config, run_dir: pathlib.Path, stack, task=None, teacher=None, initial=None):
        self.run_dir = run_dir
        self.mesh = stack.enter_context(sharding.use(sharding.make_mesh(config.mesh), config.sharding, config.context))
        check_rows(config, self.mesh.shape)
        index, count = sharding.row_share(self.mesh, config.sharding)
        self.share = {'process_index': index, 'process_count': count}
        self.data = data_lib.open(config.data, task=task, run_dir=run_dir, **self.share)
        task = self.data.task
        self.config = config = served(config, task)
        shape = {'length': task.length, 'batch': config.data.batch_size // config.step.accumulate}
        plan.check_sharding(config.model, self.mesh.shape, config.sharding, config.context, **shape, packed=task.packed)
        self.program = made = program(config.model, packed=task.packed)
        tiles = self.tuned(stack) if config.tune else {}
        self.where, self._init, self.update = training(config, made, self.mesh)
        settings = config_lib.flatten(config_lib.to_dict(config))
        self.log = metrics.Log(run_dir, config.log, settings)
        stack.callback(self.log.close)
        # What decides the order of sums, and so the bits. A sum over two devices has none; over more it depends on how
        # processes share them out.
        layout = {'devices': self.mesh.size, 'sharding': config.sharding}
        layout |= {'processes': jax.process_count()} if self.mesh.size > 2 else {}
        layout |= {f'mesh.{axis}': size for axis, size in self.mesh.shape.items()}
        layout |= {f'tiles.{name}': tiles_lib.to_json({name: choice}) for name, choice in tiles.items()}
        self.checkpoints = checkpoint_lib.Checkpoints(
            config.checkpoint.folder or run_dir / 'checkpoints', config.checkpoint, settings, free=free, layout=layout
        )
        stack.callback(self.checkpoints.close)

        single = NamedSharding(self.mesh, PartitionSpec())
        self.key = jax.random.key(config.seed)
        self.initial = None if initial is None else made.checked(initial)
        self.teacher, self.teach = teacher, jax.jit(lambda model, batch: made.apply(model, batch).logits)
        known = None if task.token_bytes is None else jnp.asarray(task.token_bytes)
        self.evaluate_batch = jax.jit(step_lib.eval_step(made.forward, known), out_shardings=single)
        peak = config.log.peak_flops or metrics.peak_flops(jax.devices()[0].device_kind)
        cost = plan.flops_per_token(config.model, made.axes, made.shapes, task.length)
        self.mfu_per_token = cost / (peak * self.mesh.size) if peak else None

    def note(self):
        """Writes the config down, once it is known to be that of the run."""
        if jax.process_index() == 0:
            (self.run_dir / 'config.json').write_text(config_lib.to_json(self.config) + '\n')

    def sampled(self) -> bool:
        """Whether the sample in the run directory was drawn as the config says."""
        try:
            written = json.loads((self.run_dir / 'config.json').read_text())
        except (OSError, ValueError):
            return False
        of_sample = lambda flat: {name: value for name, value in flat.items() if name.startswith('sample.')}
        return of_sample(written) == of_sample(json.loads(config_lib.to_json(self.config)))

    def tuned(self, stack: contextlib.ExitStack) -> dict:
        """Pins the tiles of this run's attention until it ends: those of its run_dir, or else the fastest, timed now."""
        from pallas_kernels.softmax_attention import tune  # slow: it brings the kernel

        stack.callback(tiles_lib.pin, tiles_lib.pinned())

        def calls():
            batch = self.put(next(self.data.evaluation()))
            with tiles_lib.asked() as found:
                jax.eval_shape(self.program.forward, self.program.shapes, batch, None)
            jax.clear_caches()  # what was traced with the tiles of the table
            return found

        return tune.replay_or_tune(self.run_dir / 'tiles.json', calls, checkpoint_lib.agreed)

    def put(self, batch):
        """This process's rows -> global arrays."""

        def one(value):
            place = placed(self.mesh, self.config.sharding, value.ndim)
            shape = (len(value) * self.share['process_count'], *value.shape[1:])
            return jax.make_array_from_process_local_data(place, np.ascontiguousarray(value), shape)

        return {name: one(value) for name, value in batch.items()}

    def restore(self) -> tuple[int, Any]:
        """(step, state) of the newest checkpoint, with the data put where it stood; (0, None) without any."""
        shapes = jax.eval_shape(self._init, self.key, self.initial)
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.where)
        found = self.checkpoints.restore(like, lambda saved: self.data.train.set_state(saved['data']))
        if found is None:
            return 0, None
        number, state, saved = found
        self.rewinds = saved['rewinds']
        return number, state

    def init(self):
        # Random numbers are slow to compile and drawn once: compile them without optimizations.
        cheap = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
        return jax.jit(self._init, out_shardings=self.where, compiler_options=cheap)(self.key, self.initial)

    def evaluate(self, params, data: data_lib.Data | None = None) -> dict[str, float]:
        batches = (data or self.data).evaluation()
        return step_lib.summarise([self.evaluate_batch(params, self.put(batch)) for batch in batches])

    def run(self, until: int | None = None) -> Result:
        config = self.config
        self.rewinds = 0
        number, state = self.restore()
        artefacts = [self.run_dir / 'loss.png', self.run_dir / 'sample.txt']
        again = f'To continue it, give more steps: --config.steps={2 * max(number, config.steps)}'
        if number >= config.steps and artefacts[0].exists():
            sample = artefacts[1].read_text() if artefacts[1].exists() else None
            if not self.sampled():
                self.progress = metrics.Progress(config.steps, number)
                sample = self.finish(state['params'])
                self.progress.close()
                self.note()
            last = [entry for entry in metrics.read(self.run_dir) if entry['split'] == 'eval']
            message = f'{self.run_dir} is complete: {number} of {config.steps} steps. {again}, or another run_dir.'
            return Result(number, 'already complete', last[-1] if last else {}, sample, message)
        self.note()
        self.log.open(None if state is None else number)
        state = self.init() if state is None else state
        self.bad = int(state['bad'])
        self.progress = metrics.Progress(config.steps, number)
        for note in self.checkpoints.notes:
            self.progress.say(note)
        if number:
            self.progress.say(f'resumed {self.run_dir} at step {number}')
        stop = Stop(active=not config.distributed)
        try:
            number, state, evaluation = self.train(number, state, stop, until)
        finally:
            stop.restore()
            self.progress.close()
        if number < config.steps:
            why = stop.received or ('until' if until and number >= until else 'preemption')
            message = f'stopped by {why} at step {number} of {config.steps}, saved.'
            return Result(number, 'stopped', evaluation, None, f'{message} Run the same command again to resume.')
        sample = self.finish(state['params'])
        return Result(number, 'complete', evaluation, sample, f'complete: {number} steps in {self.run_dir}. {again}.')

    def finish(self, params) -> str | None:
        """Draws and writes the sample, plots the losses."""
        sample = draw(self.config, self.data.task, lambda: self.program.model(params), self.progress.say)
        if jax.process_index() == 0:
            if sample is not None:
                (self.run_dir / 'sample.txt').write_text(sample)
            report.plot(self.run_dir)
        return sample

    def train(self, number: int, state, stop: Stop, until: int | None = None):
        config, pending, profiling = self.config, None, False
        evaluation = self.evaluated(number)
        if not evaluation and (number == 0 or number >= config.steps):
            evaluation = self.checkpoint_or_evaluate(number, state, evaluate=True)
        if 0 < config.profile.start < number:
            self.progress.say(f'no profile: the run is past step {config.profile.start}')
        clock, since, stalled = time.monotonic(), number, self.checkpoints.stalled
        end = min(config.steps, until or config.steps)
        while number < end:
            if config.profile.start and number == config.profile.start:
                jax.profiler.start_trace(str(self.run_dir / 'profile'))
                profiling = True
            arrays = self.put(next(self.data.train))
            if self.teacher is not None:
                arrays['teacher_logits'] = self.teach(self.teacher, arrays)
            watched = config.health.every and (number + 1) % config.health.every == 0
            before = jax.tree.map(jnp.copy, state['params']) if watched else None
            state, values = self.update(state, arrays, self.key)
            number += 1
            # The numbers of a step are read while the next one runs.
            failed = self.read(pending)
            pending = Step(number, values, arrays, self.data.train.step)
            if profiling and number == min(config.profile.start + config.profile.steps, config.steps):
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                profiling = False
            self.checkpoints.poll()
            self.progress.advance(number)
            logs = number % config.log.every == 0 or number == config.steps
            evaluates = number == end or (config.eval_every and number % config.eval_every == 0)
            saves = number == config.steps or (config.checkpoint.every and number % config.checkpoint.every == 0)
            stops = stop.received or number == end < config.steps or (config.distributed and self.checkpoints.preempted(number))
            if not failed and (logs or evaluates or saves or stops or watched or number - since == 1):
                failed, pending = self.read(pending), None
            if failed:
                number, state = self.rewind(failed, state)
                pending, evaluation = None, self.evaluated(number)
                clock, since = time.monotonic(), number
                continue
            if logs:
                numbers = {name: float(value) for name, value in values.items() if name != 'frozen'}
                numbers |= self.speed((number - since) * config.data.batch_size, time.monotonic() - clock)
                numbers['stalled_seconds'] = self.checkpoints.stalled - stalled
                stalled = self.checkpoints.stalled
                self.log.write(number, 'train', numbers)
                shown = {'eval_loss': evaluation['loss']} if evaluation else {}
                self.progress.update(number, numbers | shown)
            if watched:
                self.log.write(number, 'health', self.health(before, state['params']))
            if evaluates or saves or stops:
                evaluation = self.checkpoint_or_evaluate(number, state, evaluates, saves or stops) or evaluation
            if evaluates or saves or logs or watched or number == since + 1:
                clock, since = time.monotonic(), number
            if stops:
                break
        self.checkpoints.wait()
        return number, state, evaluation

    def speed(self, rows: int, seconds: float) -> dict[str, float]:
        if not rows:
            return {}
        rate = rows * self.data.task.length / max(seconds, 1e-9)
        return {'tokens_per_second': rate} | ({'mfu': rate * self.mfu_per_token} if self.mfu_per_token else {})

    def checkpoint_or_evaluate(self, number, state, evaluate=False, save=False) -> dict[str, float]:
        evaluation = self.evaluate(state['params']) if evaluate else {}
        if evaluation:
            self.log.write(number, 'eval', evaluation)
            text = '  '.join(f'{name} {value:.4f}' for name, value in evaluation.items())
            self.progress.say(f'step {number}/{self.config.steps}  validation: {text}')
        if save:
            self.log.sync()
            data = {'data': self.data.train.get_state(), 'rewinds': self.rewinds}
            self.checkpoints.save(number, state, data, evaluation.get('loss'))
        return evaluation

    def evaluated(self, number: int) -> dict[str, float]:
        """The last evaluation in the log, if there is one of this step."""
        found = [entry for entry in metrics.read(self.run_dir) if entry['split'] == 'eval' and entry['step'] == number]
        return {name: value for name, value in found[-1].items() if name not in ('step', 'split')} if found else {}

    def health(self, before, after) -> dict[str, list]:
        """Figures of layers and heads after an update of `before` to `after`; see attnx.train.health."""
        batch = self.put(next(self.data.evaluation()))
        if not hasattr(self, '_health'):
            single = NamedSharding(self.mesh, PartitionSpec())

            def figures(before, after, batch):
                batch = jax.tree.map(lambda x: x[: self.config.health.rows], batch)
                return health.figures(self.program.trace(after, batch, None)) | health.update_ratios(before, after)

            self._health = jax.jit(figures, out_shardings=single)
        return {name: np.asarray(value).tolist() for name, value in self._health(before, after, batch).items()}

    def read(self, step: Step | None) -> Step | None:
        """Reads a step's numbers; the step itself if the state is frozen as it found it."""
        if step is None:
            return None
        if int(step.values['bad']) > self.bad:
            self.bad = int(step.values['bad'])
            if not bool(step.values['frozen']):
                most = self.config.step.max_non_finite
                rows = ', '.join(map(str, self.data.rows(step.position - 1)))
                self.progress.say(
                    f'step {step.number}: loss or gradient is not finite; skipped ({self.bad} of {most}); training rows {rows}'
                )
        return step if bool(step.values['frozen']) else None

    def rewind(self, failed: Step, state) -> tuple[int, Any]:
        """The state to go on from after a step that was not finite; the data stay past its batch.

        Raises:
          TrainingFailure: the policy is another one, or there were too many.
        """
        failure = report.failure(self.run_dir, self.diagnose(failed, state))
        policy = self.config.step
        if policy.non_finite != 'rewind' or self.rewinds >= policy.max_non_finite:
            raise failure
        count, position = self.rewinds + 1, self.data.train.get_state() | {'step': failed.position}
        self.checkpoints.wait()
        number, state = self.restore()
        self.data.train.set_state(position)
        self.log.open(number)
        state = self.init() if state is None else state
        self.rewinds, self.bad = count, int(state['bad'])
        self.progress.say(f'{failure} Rewound to step {number}, past that batch ({count} of {policy.max_non_finite}).')
        return number, state

    def diagnose(self, failed: Step, state) -> dict:
        rows = self.data.rows(failed.position - 1)
        return diagnose(self.program, self.config, self.mesh, self.key, failed, state, rows)


def tell(result: Result) -> None:
    """Prints how a run ended: its sample, its last evaluation, what to do next."""
    if jax.process_index():
        return
    if result.sample:
        print(f'--- sample ---\n{metrics.printable(result.sample)}\n--- end of sample ---')
    if result.evaluation:
        print('validation:', json.dumps({k: v for k, v in result.evaluation.items() if k not in ('step', 'split')}))
    print(result.message)


def command(config: Config, *, task=None, traceback: bool = False) -> int:
    """Runs, says how it ended, and returns the exit code: 0 complete, 1 NaN or Inf, 2 bad input, 143 stopped."""
    try:
        result = run(config, task=task)
    except ValueError as error:
        if traceback:
            raise
        print(f'error: {metrics.printable(str(error))}', file=sys.stderr)
        return 2
    except report.TrainingFailure as failure:
        print(f'training failed: {metrics.printable(str(failure))}', file=sys.stderr)
        return 1
    tell(result)
    return 143 if result.status == 'stopped' else 0
