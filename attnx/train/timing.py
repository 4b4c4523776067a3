"""Times a training step: how a model at a shape is compiled on some devices, and what its steps take.

`lower` traces, `compiled` compiles, `measure` runs. Tracing is Python's, one thread at a time; programs may be compiled side by
side, in threads, and are timed one after another.
"""

import dataclasses
import statistics
import tempfile
import time
from typing import Any, NamedTuple

ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """A model, a shape and how it is trained."""

    name: str
    model: dict[str, Any]  # of ModelConfig
    length: int
    batch: int  # rows of a step, a device
    accumulate: int = 1
    kind: str = 'peer'  # peer: beside PyTorch; plain; scaling; overhead
    preset: str = 'ddp'
    mesh: str = 'data'  # the axis that all devices of a scaling row are on
    grow: str = 'batch'  # what of a scaling row grows with the devices: batch or length
    context: str = 'auto'
    compiler: dict[str, Any] = dataclasses.field(default_factory=dict)  # options of XLA, by name


def named(model: dict[str, Any]) -> dict[str, Any]:
    """The model with those of its mixers that its pattern names."""
    return model | {'mixers': {name: mixer for name, mixer in model['mixers'].items() if name in model['pattern']}}


def figures(row: Row, rounds: list[float], devices: int, length: int, flops: float, peak: float | None) -> dict[str, Any]:
    """What rounds of so many seconds a step mean; the median counts."""
    seconds = statistics.median(rounds)
    tokens = row.batch * (devices if row.grow == 'batch' else 1) * length
    found = {'devices': devices, 'length': length, 'batch': tokens // length, 'step_ms': 1e3 * seconds}
    found |= {'rounds_ms': [round(1e3 * s, 3) for s in rounds], 'tokens_per_second': tokens / seconds}
    return found | ({'mfu': flops * tokens / seconds / (peak * devices)} if peak else {})


def timed(step, wait, steps: int) -> list[float]:
    """Seconds a step, of each round."""
    for _ in range(2):
        step()
    wait()
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        rounds.append((time.perf_counter() - start) / steps)
    return rounds


class Prepared(NamedTuple):
    """A training step, lowered or compiled, and what it starts from."""

    row: Row
    who: str
    devices: int
    length: int
    init: Any  # key -> state
    update: Any  # (state, batch, key) -> (state, metrics)
    batch: Any  # () -> a batch on the devices
    flops: float  # a token
    lower_s: float  # that tracing and lowering took
    compile_s: float = 0.0


def lower(row: Row, devices: int, dtype: str, who: str = 'attnx') -> Prepared:
    """The training step for the first `devices` devices; of who 'bare' without what an update can do without."""
    import jax
    import numpy as np
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    from attnx import config, models, plan, sharding
    from attnx.train import optim, program
    from attnx.train import step as step_lib

    began = time.perf_counter()
    grown = {'batch': row.batch, 'length': row.length}
    grown[row.grow] *= devices
    given = config.build(models.ModelConfig, named(row.model) | {'max_length': grown['length'], 'dtype': dtype})
    made = program.program(given, packed=False)
    mesh = sharding.make_mesh({row.mesh: devices}, jax.devices()[:devices])
    transform, rate = optim.build(optim.Config(warmup=10, schedule='constant'), 1000, made.axes)
    settings = step_lib.Config(accumulate=row.accumulate)

    def least(state, batch, key):
        """What an update can't do without."""
        key = jax.random.fold_in(key, state['step'])
        _, grads, _ = step_lib.gradients(made.forward, state['params'], batch, key, settings)
        updates, opt = transform.update(grads, state['opt'], state['params'])
        return state | {'params': optax.apply_updates(state['params'], updates), 'opt': opt, 'step': state['step'] + 1}, {}

    def batch():
        tokens = np.random.default_rng(0).integers(0, given.vocab_size, (grown['batch'], grown['length'] + 1), dtype=np.int32)
        arrays = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'weights': np.ones(tokens[:, 1:].shape, np.float32)}
        return jax.device_put(arrays, place)

    step = least if who == 'bare' else step_lib.train_step(made.forward, transform, rate, settings)
    begin, key = lambda key: step_lib.init_state(made.init(key), transform), jax.eval_shape(jax.random.key, 0)
    with sharding.use(mesh, row.preset, row.context):
        where = sharding.param_shardings(mesh, row.preset, made.axes, {name: s.shape for name, s in made.shapes.items()})
        opt, single = optim.state_shardings(transform, made.shapes, where, mesh), NamedSharding(mesh, PartitionSpec())
        where = {'params': where, 'opt': opt, 'step': single, 'bad': single}
        place = NamedSharding(mesh, sharding.partition(('batch', 'length'), sharding.rules(row.preset)))
        like = lambda tree, where: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)
        shapes = like(jax.eval_shape(begin, key), where)
        fields = {'tokens': 'int32', 'targets': 'int32', 'weights': 'float32'}
        rows = {n: jax.ShapeDtypeStruct((grown['batch'], grown['length']), t, sharding=place) for n, t in fields.items()}
        options = row.compiler or None
        update = jax.jit(step, donate_argnums=0, out_shardings=(where, single), compiler_options=options)
        update, init = update.lower(shapes, rows, key), jax.jit(begin, out_shardings=where).lower(key)
    flops = plan.flops_per_token(given, made.axes, made.shapes, grown['length'])
    return Prepared(row, who, devices, grown['length'], init, update, batch, flops, time.perf_counter() - began)


def compiled(lowered: Prepared) -> Prepared:
    began = time.perf_counter()
    update, init = lowered.update.compile(), lowered.init.compile()
    return lowered._replace(update=update, init=init, compile_s=time.perf_counter() - began)


def measure(prepared: Prepared, steps: int) -> dict[str, Any]:
    """Times the step; of who 'saving' also what one checkpoint costs, milliseconds: all of it, and the part in which
    nothing runs."""
    import jax
    import numpy as np

    from attnx.train import metrics

    key, last = jax.random.key(0), {}
    state, batch = prepared.init(key), prepared.batch()

    def step():
        nonlocal state
        state, last['metrics'] = prepared.update(state, batch, key)

    wait = lambda: jax.block_until_ready((state, last))
    rounds = timed(step, wait, steps)
    saved = saving(lambda: state, step, wait, statistics.median(rounds)) if prepared.who == 'saving' else {}
    loss = float(last['metrics']['loss']) if last['metrics'] else None
    assert loss is None or np.isfinite(loss), 'the loss is not finite'
    kind, length = jax.devices()[0].device_kind, prepared.length
    found = figures(prepared.row, rounds, prepared.devices, length, prepared.flops, metrics.peak_flops(kind))
    m = prepared.update.memory_analysis()
    needed = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    found |= {'device': kind, 'loss': loss, 'flops_per_token': prepared.flops, 'bytes': needed}
    return found | {'lower_s': round(prepared.lower_s, 1), 'compile_s': round(prepared.compile_s, 1)} | saved


def saving(state, step, wait, seconds: float) -> dict[str, float]:
    """What a checkpoint adds to the steps that run while it is written, sealed and the one before last removed."""
    from attnx.train import checkpoint

    costs, stalls = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = checkpoint.Checkpoints(folder, checkpoint.Config(), {})
        for number in range(ROUNDS + 1):  # the first one opens what the others find open
            before, began, count = checkpoints.stalled, time.perf_counter(), 0
            checkpoints.save(number, state(), {})
            while number not in checkpoints.steps():
                step()
                wait()  # the device works on nothing else; else steps would be queued without end
                checkpoints.poll()
                count += 1
            costs.append(time.perf_counter() - began - count * seconds)
            stalls.append(checkpoints.stalled - before)
        checkpoints.close()
    return {'save_ms': 1e3 * statistics.median(costs[1:]), 'stall_ms': 1e3 * statistics.median(stalls[1:])}
