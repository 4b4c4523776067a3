"""`run(config)`: trains until done, and leaves a run directory that says everything about the run.

Running the same command again resumes it, or says that it is complete. Of a model this file knows `models.build`, the
flat view of its parameters, and its call.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from attnx import config as config_lib
from attnx import models, plan, sharding, tasks
from attnx.nn import params as params_lib
from attnx.train import checkpoint as checkpoint_lib
from attnx.train import data as data_lib
from attnx.train import heads as heads_lib
from attnx.train import metrics, report
from attnx.train import optim as optim_lib
from attnx.train import step as step_lib
from attnx.train.config import Config, completed, free


class Result(NamedTuple):
    """How a run ended: its step, 'complete', 'already complete' or 'stopped', the last evaluation, the sample."""

    step: int
    status: str
    evaluation: dict[str, float]
    sample: str | None
    message: str


class Program(NamedTuple):
    """What a config compiles to; functions over the flat parameters."""

    axes: Mapping[str, tuple]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    init: Any  # () -> parameters
    forward: Any  # (params, batch, key, step=None) -> (logits, aux)
    trace: Any  # (params, batch, key, step=None) -> yields (name, activation)
    model: Any  # params -> the module
    apply: Any  # (module, batch) -> its output, deterministic
    checked: Any  # a module of this config, or flat parameters -> flat parameters


def program(config: models.ModelConfig, *, packed: bool, seed: int) -> Program:
    """The model behind `forward`; builds it abstractly only."""
    build = lambda: models.build(config, rngs=nnx.Rngs(seed))
    abstract = jax.eval_shape(build)

    def call(model, batch, key=None, step=None, method='__call__'):
        given = {'positions': batch.get('positions'), 'segment_ids': batch.get('segment_ids') if packed else None}
        given |= {name: batch[name] for name in ('source', 'source_mask') if name in batch}
        inputs = batch['tokens'] if 'tokens' in batch else batch['inputs']
        side = {name: batch[name] for name in batch if name not in tasks.FIELDS}
        return getattr(model, method)(inputs, key=key, step=step, inputs=side, **given)

    def forward(params, batch, key, step=None):
        out = call(params_lib.from_flat(abstract, params), batch, key, step)
        return out.logits, out.aux

    def checked(given):
        flat = params_lib.to_flat(given) if isinstance(given, nnx.Module) else dict(given)
        params_lib.from_flat(abstract, flat)  # refuses other names
        for name, wanted in params_lib.to_flat(abstract).items():
            if flat[name].shape != wanted.shape:
                raise ValueError(f'initial parameter {name} has shape {flat[name].shape}, the model {wanted.shape}')
        return flat

    return Program(
        axes=params_lib.flat_axes(abstract),
        shapes=params_lib.to_flat(abstract),
        init=lambda: params_lib.to_flat(build()),
        forward=forward,
        trace=lambda params, batch, key, step=None: call(params_lib.from_flat(abstract, params), batch, key, step, 'trace'),
        model=lambda params: params_lib.from_flat(abstract, params),
        apply=call,
        checked=checked,
    )


class Stop:
    """Notes SIGTERM and SIGINT, so that the loop can save and leave. A second signal acts as usual."""

    def __init__(self, active: bool):
        self.received: str | None = None
        self._old = {}
        if active and threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number, frame):
        self.received = signal.Signals(number).name
        self.restore()

    def restore(self):
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}


@contextlib.contextmanager
def locked(run_dir: pathlib.Path):
    """Holds the run directory for this process.

    Raises:
      ValueError: another process trains in it.
    """
    with (run_dir / 'lock').open('w') as stream:
        if jax.process_index() == 0:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f'another process trains in {run_dir}; wait for it, or give another run_dir') from None
        yield


def run(config: Config, *, teacher: Any = None, initial: Any = None) -> Result:
    """Trains `config`, or resumes it.

    Args:
      teacher: a model whose logits are learnt from, with weight `config.step.distill`.
      initial: a model, or its flat parameters, to begin from (of `attnx.interop.convert`, say); the others begin at random.

    Raises:
      ValueError: a setting that can't be served, a checkpoint that can't be used or written.
      report.TrainingFailure: a NaN or Inf; run_dir/failure.json names the first bad layer and tensor.
    """
    optim_lib.schedule(config.optim, config.steps)  # these two need nothing, so they refuse before anything is made
    config.model.layers()
    if (teacher is None) != (not config.step.distill):
        raise ValueError('a teacher and its weight step.distill go together: run(config, teacher=model), distill > 0')
    if config.distributed:
        # A cluster that jax knows needs none of these; elsewhere they say who is who (JAX_COORDINATOR_ADDRESS: where).
        given = {'num_processes': 'JAX_NUM_PROCESSES', 'process_id': 'JAX_PROCESS_ID'}
        jax.distributed.initialize(**{k: int(os.environ[v]) for k, v in given.items() if v in os.environ})
    run_dir = pathlib.Path(config.run_dir).absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir), contextlib.ExitStack() as stack:
        return _Run(config, run_dir, stack, teacher, initial).run()


class _Run:
    """The parts of one run, built in an order that meets bad settings before anything costly."""

    def __init__(self, config: Config, run_dir: pathlib.Path, stack: contextlib.ExitStack, teacher=None, initial=None):
        self.run_dir = run_dir
        self.mesh = stack.enter_context(sharding.use(sharding.make_mesh(dict(config.mesh)), config.sharding))
        rows = self.mesh.shape['data'] * self.mesh.shape['fsdp']
        if config.data.batch_size % (rows * config.step.accumulate):
            raise ValueError(
                f'data.batch_size {config.data.batch_size} must be a multiple of {rows} (devices over which the mesh '
                f'spreads rows) times {config.step.accumulate} (step.accumulate)'
            )
        self.data = data_lib.open(
            config.data, run_dir=run_dir, process_index=jax.process_index(), process_count=jax.process_count()
        )
        task = self.data.task
        self.config = config = dataclasses.replace(config, model=completed(config.model, task))
        if task.packed:
            config.model.check_packing()
        config.model.check_inputs({*task.train[0]} - {*tasks.FIELDS})
        self.program = made = program(config.model, packed=task.packed, seed=config.seed)
        self.rules = sharding.rules(config.sharding)
        transform, rate = optim_lib.build(config.optim, config.steps, made.axes)
        settings = config_lib.flatten(config_lib.to_dict(config))
        self.log = metrics.Log(run_dir, config.log, settings)
        stack.callback(self.log.close)
        self.checkpoints = checkpoint_lib.Checkpoints(run_dir / 'checkpoints', config.checkpoint, settings, free=free)
        stack.callback(self.checkpoints.close)

        shapes = {name: shape.shape for name, shape in made.shapes.items()}
        where = sharding.param_shardings(self.mesh, config.sharding, made.axes, shapes)
        single = NamedSharding(self.mesh, PartitionSpec())
        self.where = {
            'params': where,
            'opt': optim_lib.state_shardings(transform, made.shapes, where, self.mesh),
            'step': single,
            'bad': single,
        }
        self.initial = () if initial is None else (made.checked(initial),)
        self._init = lambda *given: step_lib.init_state(given[0] if given else made.init(), transform)
        heads = heads_lib.projections(config.model, made.shapes)
        update = step_lib.train_step(made.forward, transform, rate, config.step, config.seed, heads)
        self.teacher, self.teach = teacher, jax.jit(lambda model, batch: made.apply(model, batch).logits)
        self.update = jax.jit(update, donate_argnums=0, out_shardings=(self.where, single))
        known = None if task.token_bytes is None else jnp.asarray(task.token_bytes)
        self.evaluate_batch = jax.jit(step_lib.eval_step(made.forward, known), out_shardings=single)
        peak = config.log.peak_flops or metrics.peak_flops(jax.devices()[0].device_kind)
        cost = plan.flops_per_token(config.model, made.axes, made.shapes, task.length)
        self.mfu_per_token = cost / (peak * self.mesh.size) if peak else None
        if jax.process_index() == 0:
            (run_dir / 'config.json').write_text(config_lib.to_json(config) + '\n')

    def put(self, batch):
        """This process's rows -> global arrays."""

        def one(value):
            names = ('batch', 'length', 'features')[: value.ndim]
            place = NamedSharding(self.mesh, sharding.partition(names, self.rules))
            return jax.make_array_from_process_local_data(place, np.ascontiguousarray(value))

        return {name: one(value) for name, value in batch.items()}

    def restore(self) -> tuple[int, Any]:
        shapes = jax.eval_shape(self._init)
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.where)
        found = self.checkpoints.restore(like)
        if found is None:
            return 0, None
        number, state, position = found
        self.data.train.set_state(position)
        return number, state

    def evaluate(self, params) -> dict[str, float]:
        return step_lib.summarise([self.evaluate_batch(params, self.put(batch)) for batch in self.data.evaluation()])

    def run(self) -> Result:
        config = self.config
        number, state = self.restore()
        artefacts = [self.run_dir / 'loss.png', self.run_dir / 'sample.txt']
        again = f'To continue it, give more steps: --config.steps={2 * max(number, config.steps)}'
        if number >= config.steps and artefacts[0].exists():
            sample = artefacts[1].read_text() if artefacts[1].exists() else None
            last = [entry for entry in metrics.read(self.run_dir) if entry['split'] == 'eval']
            message = f'{self.run_dir} is complete: {number} of {config.steps} steps. {again}, or another run_dir.'
            return Result(number, 'already complete', last[-1] if last else {}, sample, message)
        if state is None:
            # Random numbers are slow to compile and drawn once: compile them without optimizations.
            cheap = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
            state = jax.jit(self._init, out_shardings=self.where, compiler_options=cheap)(*self.initial)
        self.bad = int(state['bad'])
        self.log.open(number)
        self.progress = metrics.Progress(config.steps, number)
        for note in self.checkpoints.notes:
            self.progress.say(note)
        if number:
            self.progress.say(f'resumed {self.run_dir} at step {number}')
        stop = Stop(active=not config.distributed)
        try:
            number, state, evaluation = self.train(number, state, stop)
        finally:
            stop.restore()
            self.progress.close()
        if number < config.steps:
            message = f'stopped by {stop.received or "preemption"} at step {number} of {config.steps}, saved.'
            return Result(number, 'stopped', evaluation, None, f'{message} Run the same command again to resume.')
        sample = self.sample(state['params'])
        if jax.process_index() == 0:
            if sample is not None:
                artefacts[1].write_text(sample)
            report.plot(self.run_dir)
        return Result(number, 'complete', evaluation, sample, f'complete: {number} steps in {self.run_dir}. {again}.')

    def train(self, number: int, state, stop: Stop):
        config, pending, evaluation, profiling = self.config, None, {}, False
        if number == 0 or number >= config.steps:
            evaluation = self.checkpoint_or_evaluate(number, state, evaluate=True)
        clock, since = time.monotonic(), number
        while number < config.steps:
            if config.profile.start and number == config.profile.start:
                jax.profiler.start_trace(str(self.run_dir / 'profile'))
                profiling = True
            batch = next(self.data.train)
            arrays = self.put(batch)
            if self.teacher is not None:
                arrays['teacher_logits'] = self.teach(self.teacher, arrays)
            state, values = self.update(state, arrays)
            number += 1
            # The numbers of a step are read while the next one runs.
            self.read(pending, state)
            pending = number, values, arrays
            if profiling and number == min(config.profile.start + config.profile.steps, config.steps):
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                profiling = False
            self.checkpoints.poll()
            self.progress.advance(number)
            logs = number % config.log.every == 0 or number == config.steps
            evaluates = number == config.steps or (config.eval_every and number % config.eval_every == 0)
            saves = number == config.steps or (config.checkpoint.every and number % config.checkpoint.every == 0)
            stops = stop.received or (config.distributed and self.checkpoints.preempted(number))
            if logs or evaluates or saves or stops or number - since == 1:
                self.read(pending, state)
                pending = None
            if logs:
                numbers = {name: float(value) for name, value in values.items() if name != 'frozen'}
                numbers |= self.speed((number - since) * config.data.batch_size, time.monotonic() - clock)
                self.log.write(number, 'train', numbers)
                shown = {'eval_loss': evaluation['loss']} if evaluation else {}
                self.progress.update(number, numbers | shown)
            if evaluates or saves or stops:
                evaluation = self.checkpoint_or_evaluate(number, state, evaluates, saves or stops) or evaluation
            if evaluates or saves or logs or number == since + 1:
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
            self.checkpoints.save(number, state, self.data.train.get_state(), evaluation.get('loss'))
        return evaluation

    def read(self, pending, state) -> None:
        """Raises where the step of `pending` was not finite; the state is frozen as that step found it."""
        if pending is None:
            return
        number, values, batch = pending
        if int(values['bad']) > self.bad:
            self.bad = int(values['bad'])
            self.progress.say(f'step {number}: loss or gradient is not finite ({self.bad} so far)')
        if not bool(values['frozen']):
            return
        made, config = self.program, self.config
        key = jax.random.fold_in(jax.random.key(config.seed), state['step'])
        whole = dataclasses.replace(config.step, accumulate=1)
        names: list[str] = []

        @jax.jit
        def activations(params):
            named = list(made.trace(params, batch, key, state['step']))
            names.extend(name for name, _ in named)
            return [value for _, value in named]

        trace = lambda params: zip(names, activations(params))
        forward = functools.partial(made.forward, step=state['step'])
        grad = jax.jit(lambda params: step_lib.gradients(forward, params, batch, key, whole)[1])
        diagnosis = report.diagnose(
            step=number,
            metrics=values,
            params=state['params'],
            batch=batch,
            trace=lambda: trace(state['params']),
            gradients=lambda: grad(state['params']),
        )
        raise report.failure(self.run_dir, diagnosis)

    def sample(self, params) -> str | None:
        """Text drawn from the model; None, and a word on stderr, where there is none to draw."""
        task, how = self.data.task, self.config.sample
        if not how.tokens or not how.count or task.decode is None or task.encode is None or self.config.model.kind != 'decoder':
            return None
        if jax.process_count() > 1:
            self.progress.say('no sample: the model is spread over several processes')
            return None
        prompt = ([] if task.start is None else [task.start]) + list(task.encode(how.prompt))
        try:
            found = models.generate(
                self.program.model(params), [prompt or [0]] * how.count, max_new_tokens=how.tokens, temperature=how.temperature,
                top_k=how.top_k, top_p=how.top_p, key=jax.random.key(self.config.seed),
            )  # fmt: skip
        except ValueError as error:
            self.progress.say(f'no sample: {error}')
            return None
        return '\n--- next ---\n'.join(task.decode([*task.encode(how.prompt), *new]).rstrip() for new in found)


def tell(result: Result) -> None:
    """Prints how a run ended: its sample, its last evaluation, what to do next."""
    if jax.process_index():
        return
    if result.sample:
        print(f'--- sample ---\n{result.sample}\n--- end of sample ---')
    if result.evaluation:
        print('validation:', json.dumps({k: v for k, v in result.evaluation.items() if k not in ('step', 'split')}))
    print(result.message)
