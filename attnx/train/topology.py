"""A run planned for chips that are not here: does it fit, what does a step do, how long might it take.

`plan(run, 'v5p:8x8x8')` builds the training step of `run` with its shardings, has libtpu compile it for that pod, and reads the
compiled program (`attnx.train.hlo`). `plan(run, 'h100:8')` estimates from shapes alone, and says so. Nothing is measured: step
times are rooflines over published peaks. Use `python -m attnx.plan --topology=…`.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from attnx import plan as plan_lib
from attnx import sharding, tasks
from attnx.train import compiled, modelled
from attnx.train.chips import LINKS, MEMORY, PRODUCTS, Topology, topology
from attnx.train.config import Config, completed
from attnx.train.program import check_rows, program
from pallas_kernels import libtpu


class Exchange(NamedTuple):
    """Collectives of one kind over the same axes of the mesh, of a device and step."""

    kind: str
    axes: str  # 'fsdp x tensor'
    devices: int  # of a group
    times: float
    payload: float  # bytes of the whole arrays
    wire: float  # bytes that a device sends
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The plan of a run on a topology. Bytes, FLOPs and seconds are of a device and step."""

    topology: str
    mesh: Mapping[str, int]
    preset: str
    how: str  # who says so: the compiler, or a model of shapes
    memory: Mapping[str, float]  # what -> bytes; the sum is the peak
    capacity: float
    tokens: int  # of a step, all devices together
    useful: float  # FLOPs of the model, without what is recomputed
    peak: float  # FLOP/s of a device
    flops: float = 0.0  # of matrix products and kernels, recomputed ones too; 0: it was not compiled to the end
    moved: float = 0.0  # bytes of main memory read and written
    local: float = 0.0  # seconds of products and memory
    exchanges: tuple[Exchange, ...] = ()
    kernels: Mapping[str, float] = dataclasses.field(default_factory=dict)  # Pallas kernels -> calls
    notes: tuple[str, ...] = ()

    @property
    def needed(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity

    @property
    def communication(self) -> float:
        return sum(e.seconds for e in self.exchanges)

    @property
    def seconds(self) -> tuple[float, float]:
        """A step with all communication beside the work, and with none of it."""
        return max(self.local, self.communication), self.local + self.communication


def prepared(run: Config, where: Topology) -> tuple[Config, tasks.Task]:
    """The run with its mesh in full and its model completed, and its task; nothing is read from the data's files.

    Raises:
      ValueError: what the run would be refused for on so many devices.
    """
    task = tasks.outline(run.data.task, length=run.data.length, seed=run.data.seed)
    run = dataclasses.replace(run, model=completed(run.model, task), mesh=sharding.mesh_shape(run.mesh, where.size))
    if task.packed:
        run.model.check_packing(task.documents)
    run.model.check_inputs({*task.train[0]} - {*tasks.FIELDS})
    check_rows(run, run.mesh)
    rows = {'length': task.length, 'batch': run.data.batch_size // run.step.accumulate}
    with sharding.use(sharding.abstract_mesh(run.mesh), run.sharding, run.context):  # refuses what the preset can't use
        pass
    plan_lib.check_sharding(run.model, run.mesh, run.sharding, run.context, **rows, packed=task.packed)
    made = program(run.model, packed=task.packed)
    shapes = {name: shape.shape for name, shape in made.shapes.items()}
    sharding.param_shardings(sharding.abstract_mesh(run.mesh), run.sharding, made.axes, shapes)
    return run, task


def plan(run: Config, name: str) -> Found:
    """The plan of `run` on the topology called `name`.

    Raises:
      ValueError: an unknown topology, libtpu that is missing or fails, and what the run itself would be refused for.
    """
    where = topology(name)
    if where.tpu and (reason := libtpu.missing()):
        raise ValueError(f'{name}: {reason}')
    run, task = prepared(run, where)
    made = program(run.model, packed=task.packed)
    tokens = run.data.batch_size * task.length
    useful = plan_lib.flops_per_token(run.model, made.axes, made.shapes, task.length) * tokens / where.size
    found = compiled.found(run, where) if where.tpu else modelled.found(run, task, where)
    exchanges = tuple(Exchange(*e) for e in found.pop('exchanges', ()))
    return Found(
        topology=where.name,
        mesh=sharding.shown(run.mesh),
        preset=run.sharding,
        capacity=where.chip.memory,
        tokens=tokens,
        useful=useful,
        peak=where.chip.flops,
        exchanges=exchanges,
        **found,
    )


# What to change when it does not fit --------------------------------------------------------------------------------


def changes(run: Config, where: Topology, state: float) -> Iterator[tuple[str, Config]]:
    """(flags, the run with them): each on top of those before, the cheapest in time first; what would be refused is left out.

    state: bytes of parameters and optimizer of a device; where they alone take half of the memory, they are cut first.
    """
    sizes, model = sharding.mesh_shape(run.mesh, where.size), run.model
    remats = ('none', 'dots', 'full')
    counts = [run.step.accumulate * 2**n for n in range(1, run.data.batch_size.bit_length())]

    def cut(tensor: int) -> dict:
        """Every device that no other axis wants cuts the parameters."""
        mesh = sizes | {'data': 1, 'fsdp': where.size // (sizes['expert'] * sizes['context'] * tensor), 'tensor': tensor}
        preset = 'fsdp_tp' if tensor > 1 else {'ddp': 'fsdp', 'context': 'fsdp_context'}.get(run.sharding, run.sharding)
        return {'sharding': preset, **{f'mesh.{name}': size for name, size in mesh.items() if size != sizes[name]}}

    smaller = [{'model.remat': remat} for remat in remats[remats.index(model.remat) + 1 :]]
    smaller += [{'step.accumulate': n} for n in counts]
    whole = [cut(sizes['tensor'])] if sizes['data'] > 1 or run.sharding in ('ddp', 'context') else []
    finer = [cut(n) for n in (2, 4, 8) if n > sizes['tensor'] and sizes['context'] == 1]
    flags: dict[str, Any] = {}
    for more in (*whole, *smaller, *finer) if state >= where.chip.memory / 2 else (*smaller, *whole, *finer):
        given = flags | more
        new = dataclasses.replace(
            run,
            model=dataclasses.replace(model, remat=given.get('model.remat', model.remat)),
            step=dataclasses.replace(run.step, accumulate=given.get('step.accumulate', run.step.accumulate)),
            sharding=given.get('sharding', run.sharding),
            mesh={name: given.get(f'mesh.{name}', size) for name, size in sizes.items()},
        )
        try:
            prepared(new, where)
        except ValueError:
            continue
        flags = given
        yield ' '.join(f'--config.{name}={value}' for name, value in flags.items()), new


# The command --------------------------------------------------------------------------------------------------------


def command(run: Config, name: str, fit: bool, console) -> int:
    """Prints the plan; with `fit`, tries changes until it fits. Returns 0 if it does."""
    where = topology(name)
    found = plan(run, name)
    report(found, console)
    if found.fits:
        return 0
    state = found.memory.get('parameters', 0) + found.memory.get('optimizer', 0)
    steps = list(changes(run, where, state))
    say = lambda *words: console.print(*words, highlight=False, soft_wrap=True)
    if not fit:
        say('\nto make it fit, in this order (--fit tries them):')
        for flags, _ in steps:
            say(f'  {flags}')
        say('  more chips, a narrower model, a shorter data.length' if steps else '  more chips, or a smaller model')
        return 1
    for flags, changed in steps:
        found = plan(changed, name)
        say(f'{"fits" if found.fits else "does not fit"}, {gib(found.needed)} of {gib(found.capacity)}: {flags}')
        if found.fits:
            say('')
            report(found, console)
            say(f'\nflags: {flags}')
            return 0
    say('none of these fits: more chips, a narrower model, or a shorter data.length')
    return 1


def gib(number: float) -> str:
    return f'{number / 2**30:.2f} GiB' if number >= 2**30 / 10 else f'{number / 2**20:.2f} MiB'


def report(found: Found, console) -> None:
    from rich.table import Table

    say = lambda *words: console.print(*words, highlight=False, soft_wrap=True)
    human, devices = plan_lib.human, math.prod(found.mesh.values())
    mesh = ' x '.join(f'{name} {size}' for name, size in found.mesh.items())
    say(f'{found.topology}: {devices} devices as {mesh}, preset {found.preset!r}; {found.how}')
    state = 'fits' if found.fits else 'DOES NOT FIT'
    say(f'\nmemory a device         {state}: {gib(found.needed)} of {gib(found.capacity)}')
    for what, amount in found.memory.items():
        say(f'  {what:<22}{gib(amount):>12}')
    if not found.flops:
        return
    say('\na device and step')
    say(f'  FLOPs                 {human(found.flops)} ({human(found.useful)} of the model, the rest recomputed or masked)')
    say(f'  main memory           {human(found.moved, "B")} read and written')
    if found.kernels:
        say(f'  kernels               {", ".join(f"{name} {times:.0f}" for name, times in found.kernels.items())}')
    table = Table(box=None, pad_edge=True)
    for column in ('collective', 'over', 'devices', 'times', 'arrays', 'sent', 'time'):
        table.add_column(column, justify='left' if column in ('collective', 'over') else 'right')
    for e in found.exchanges:
        arrays, sent = human(e.payload, 'B'), human(e.wire, 'B')
        table.add_row(e.kind, e.axes, str(e.devices), f'{e.times:.0f}', arrays, sent, f'{1e3 * e.seconds:.1f} ms')
    if found.exchanges:
        console.print(table)
    low, high = found.seconds
    rate = lambda seconds: human(found.tokens / seconds)
    mfu = lambda seconds: f'{100 * found.useful / seconds / found.peak:.0f} %'
    ms = lambda seconds: f'{1e3 * seconds:.0f} ms'
    say(f'\nroofline                products and memory {ms(found.local)}, communication {ms(found.communication)}')
    say(f'  step                  {ms(low)} if all communication hides behind work, {ms(high)} if none does')
    say(f'  tokens/s              {rate(high)} to {rate(low)}')
    say(f'  MFU                   {mfu(high)} to {mfu(low)} of {human(found.peak)}FLOP/s')
    for note in found.notes:
        say(f'note: {note}')
    source = topology(found.topology).chip.source
    say(
        f'Estimated, not measured: no step was run. Peaks are published ones ({source}), of which {PRODUCTS:.0%} (products), '
        f'{MEMORY:.0%} (memory) and {LINKS:.0%} (links) are taken as reached; work outside matrix products, such as the '
        'softmax inside kernels, is not counted.'
    )
