"""A run planned for chips that are not here: does it fit, what does a step do, how long might it take.

`plan(run, 'v5p:8x8x8')` builds the training step of `run` with its shardings, has libtpu compile it for that pod, and reads the
compiled program (`attnx.train.hlo`). `plan(run, 'h100:8')` estimates from shapes alone, and says so. Nothing is measured: step
times are rooflines over published peaks. Use `python -m attnx.plan --topology=…`.
"""

import collections
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnx import dispatch, models, sharding, tasks
from attnx import plan as plan_lib
from attnx.names import nearest
from attnx.train import hlo
from attnx.train import optim as optim_lib
from attnx.train.config import Config, completed
from attnx.train.program import check_rows, placed, program, training
from pallas_kernels import aot_tpu

# Chips --------------------------------------------------------------------------------------------------------------


class Chip(NamedTuple):
    """A device as JAX sees it; published peaks."""

    flops: float  # dense bfloat16, FLOP/s
    memory: float  # bytes that a program may use
    bandwidth: float  # of main memory, bytes/s
    link: float  # bytes/s of one link to a neighbour, each way; GPU: of all links to the others of its node, each way
    sides: tuple[str, ...]  # topologies on offer; GPU: none
    wraps: int  # a side of a multiple of this many chips is a ring
    source: str


_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x4', '8x8x8', '8x8x16', '8x16x16', '16x16x16')
_SQUARES = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CLOUD = 'cloud.google.com/tpu/docs'
CHIPS = {
    'v4': Chip(275e12, 30.75 * 2**30, 1228e9, 50e9, _CUBES, 4, f'{_CLOUD}/v4'),
    'v5e': Chip(197e12, 15.75 * 2**30, 819e9, 50e9, _SQUARES, 16, f'{_CLOUD}/v5e'),
    'v5p': Chip(459e12, 95.73 * 2**30, 2765e9, 100e9, _CUBES, 4, f'{_CLOUD}/v5p'),
    'v6e': Chip(918e12, 31.24 * 2**30, 1638e9, 100e9, _SQUARES, 16, f'{_CLOUD}/v6e'),
    'a100': Chip(312e12, 80e9, 2039e9, 300e9, (), 0, 'NVIDIA A100 80GB SXM data sheet'),
    'h100': Chip(989e12, 80e9, 3350e9, 450e9, (), 0, 'NVIDIA H100 SXM data sheet'),
    'h200': Chip(989e12, 141e9, 4800e9, 450e9, (), 0, 'NVIDIA H200 SXM data sheet'),
    'b200': Chip(2250e12, 180e9, 7700e9, 900e9, (), 0, 'NVIDIA DGX B200 data sheet'),
}
NODE, NETWORK = 8, 50e9  # GPUs that share NVLink, and bytes/s each way of a GPU's network card (400 Gbit/s)
# Shares of the peaks that a good program gets: products, main memory, links.
PRODUCTS, MEMORY, LINKS = 0.9, 0.85, 0.85


class Topology(NamedTuple):
    name: str
    chip: Chip
    kind: str  # key of CHIPS
    sides: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.sides)

    @property
    def tpu(self) -> bool:
        return bool(self.chip.sides)


def known() -> str:
    tpus = [f'{name}:{"|".join(chip.sides)}' for name, chip in CHIPS.items() if chip.sides]
    gpus = [f'{name}:<number>' for name, chip in CHIPS.items() if not chip.sides]
    return '; '.join((*tpus, *gpus))


def topology(name: str) -> Topology:
    """'v5p:8x8x8' or 'h100:8'.

    Raises:
      ValueError: it is none; with the list.
    """
    found = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)', name.lower())
    if not found or found[1] not in CHIPS:
        near = nearest(found[1] if found else name.lower().split(':')[0], tuple(CHIPS))
        raise ValueError(f'unknown topology {name!r}; {near}; topologies: {known()}')
    chip, sides = CHIPS[found[1]], tuple(map(int, found[2].split('x')))
    if (chip.sides and found[2] not in chip.sides) or min(sides) < 1:
        count = lambda side: math.prod(map(int, side.split('x')))
        valid = sorted(chip.sides, key=lambda side: abs(math.log(count(side) / max(math.prod(sides), 1))))
        near = ', '.join(f'{found[1]}:{side}' for side in valid[:3])
        raise ValueError(f'unknown topology {name!r}; nearest: {near}; topologies: {known()}')
    if not chip.sides and len(sides) > 1:
        raise ValueError(f'unknown topology {name!r}: a number of GPUs is expected, such as {found[1]}:{math.prod(sides)}')
    return Topology(name.lower(), chip, found[1], sides)


# What a plan says ---------------------------------------------------------------------------------------------------


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
    if where.tpu and (reason := aot_tpu.missing()):
        raise ValueError(f'{name}: {reason}')
    run, task = prepared(run, where)
    made = program(run.model, packed=task.packed)
    tokens = run.data.batch_size * task.length
    useful = plan_lib.flops_per_token(run.model, made.axes, made.shapes, task.length) * tokens / where.size
    found = _in_child(run, where) if where.tpu else _modelled(run, task, where)
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


def seconds_of(work: Iterator[tuple[float, float, bool]], chip: Chip) -> float:
    """A roofline over (FLOPs, bytes, background): one after another, each bound by products or by memory."""
    products, memory = PRODUCTS * chip.flops, MEMORY * chip.bandwidth
    done = list(work)
    front = sum(max(flops / products, moved / memory) for flops, moved, background in done if not background)
    return max(front, sum(moved for _, moved, _ in done) / memory)


# TPU: compiled ------------------------------------------------------------------------------------------------------


def versions() -> str:
    return f'libtpu {importlib.metadata.version("libtpu")}, jax {jax.__version__}'


def _in_child(run: Config, where: Topology) -> dict:
    """What `_compiled` finds, in a process of its own, which libtpu ends on some errors."""
    context = multiprocessing.get_context('spawn')
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, run, where.name))
    child.start()
    theirs.close()
    try:
        kind, found = mine.recv()
    except EOFError:
        kind, found = 'error', {}
    child.join()
    if kind == 'found':
        return found
    why = found or f'the compiler ended its process (code {child.exitcode}; its words stand above)'
    raise ValueError(f'{where.name}, {versions()}: {why}')


def _child(send, run: Config, name: str) -> None:
    os.environ.pop('XLA_FLAGS', None)  # of this machine, not of that one
    aot_tpu.prepare()
    try:
        send.send(('found', _compiled(run, topology(name))))
    except Exception as error:
        send.send(('error', f'{type(error).__name__}: {str(error)[:2000]}'))


def _compiled(run: Config, where: Topology) -> dict:
    options = {'chip_config_name': 'megacore'} if where.kind == 'v4' else {}
    devices = topologies.get_topology_desc(where.name, platform='tpu', **options).devices
    task = tasks.outline(run.data.task, length=run.data.length, seed=run.data.seed)
    mesh = sharding.make_mesh(run.mesh, devices)
    with sharding.use(mesh.abstract_mesh, run.sharding, run.context), dispatch.target('tpu'):
        trained = training(run, program(run.model, packed=task.packed), mesh)
        place = lambda shapes, where: jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
        )
        single, rows = NamedSharding(mesh, P()), run.data.batch_size
        key = place(jax.eval_shape(lambda: jax.random.key(0)), single)
        state = place(jax.eval_shape(lambda key: trained.init(key, None), key), trained.where)
        batch = {
            name: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype, sharding=placed(mesh, run.sharding, x.ndim + 1))
            for name, x in ((name, np.asarray(x)) for name, x in task.train[0].items())
        }
        lowered = trained.update.lower(state, batch, key)
        kept = _cache(where, lowered.as_text())
        if kept.exists():
            return json.loads(kept.read_text())
        held = {
            'parameters': _share(state['params']),
            'optimizer': _share(state['opt']),
            'batch': _share(batch),
        }
        found = _read(lowered, held, where, mesh)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f'.{os.getpid()}')
    partial.write_text(json.dumps(found))
    partial.replace(kept)
    return found


def _cache(where: Topology, text: str) -> pathlib.Path:
    """Where the findings about a program are kept: by what the compiler is given, who it is, and how it is read."""
    own = [pathlib.Path(hlo.__file__).read_text(), pathlib.Path(__file__).read_text()]
    key = hashlib.sha256('\n'.join([where.name, versions(), text, *own]).encode()).hexdigest()
    folder = jax.config.jax_compilation_cache_dir
    folder = pathlib.Path(folder) if folder else pathlib.Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser()
    return folder / 'attnx' / 'plans' / f'{key[:32]}.json'


def _share(tree: Any) -> int:
    """Bytes of the part of a pytree that one device holds."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in leaves)


def _read(lowered, held: dict[str, float], where: Topology, mesh: jax.sharding.Mesh) -> dict:
    how = f'compiled by {versions()}'
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        total = too_large(str(error))
        if total is None:
            raise
        return {'how': how, 'memory': held | {'activations and temporaries': max(total - sum(held.values()), 0)}}
    sizes = compiled.memory_analysis()
    cost = hlo.cost(compiled.as_text(), where.size)
    beyond = sizes.peak_memory_in_bytes - sizes.argument_size_in_bytes
    kept = min(cost.kept, beyond)
    memory = held | {'activations': kept, 'temporaries': beyond - kept, 'program': sizes.generated_code_size_in_bytes}
    devices = list(mesh.devices.flat)
    groups: dict[tuple, list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for c in cost.collectives:
        total = groups[c.kind, _axes(c.group, mesh.shape), len(c.group)]
        rate = LINKS * where.chip.link * _links([devices[i].coords for i in c.group], where)
        slower = max(1.0, len(c.group) / 4) if 'all-to-all' in c.kind else 1.0  # most of it passes by others
        for n, x in enumerate((1.0, c.payload, c.wire, c.wire * slower / rate)):
            total[n] += c.times * x
    kernels: collections.Counter = collections.Counter()
    for w in cost.work:
        if w.kernel:
            kernels[re.sub(r'\.\d+$', '', w.name).strip('_')] += w.times
    exchanges = sorted((kind, axes, size, *total) for (kind, axes, size), total in groups.items())
    work = ((w.times * w.flops, w.times * w.bytes, w.background) for w in cost.work)
    notes = [f'the rounds of {len(cost.unknown)} loops are unknown and count once'] if cost.unknown else []
    return {
        'how': how,
        'memory': memory,
        'flops': cost.flops,
        'moved': cost.bytes,
        'local': seconds_of(work, where.chip),
        'exchanges': exchanges,
        'kernels': dict(sorted(kernels.items())),
        'notes': notes,
    }


def too_large(message: str) -> float | None:
    """Bytes that a program would need, of the compiler's refusal; None: it refuses something else."""
    needs = re.search(r'\(([\d.]+)([KMGT])\) exceeds available HBM', message)
    return float(needs[1]) * 2 ** {'K': 10, 'M': 20, 'G': 30, 'T': 40}[needs[2]] if needs else None


def _axes(group: tuple[int, ...], shape: Mapping[str, int]) -> str:
    """The axes of the mesh along which the devices of a group differ."""
    places = np.stack(np.unravel_index(group, tuple(shape.values())))
    return ' x '.join(name for name, row in zip(shape, places) if len(set(row.tolist())) > 1) or 'none'


def _links(coords, where: Topology) -> int:
    """Links over which a device sends at once: two along each side of the torus that is a ring, else one."""
    total = 0
    for axis, side in enumerate(where.sides):
        places = {c[axis] for c in coords}
        total += 0 if len(places) == 1 else 2 if len(places) == side and side % where.chip.wraps == 0 else 1
    return max(total, 1)


# GPU: a model of shapes ---------------------------------------------------------------------------------------------


def _modelled(run: Config, task: tasks.Task, where: Topology) -> dict:
    """Memory, work and traffic by rules of thumb; see the notes that it returns."""
    model, sizes, accumulate = run.model, run.mesh, run.step.accumulate
    mesh, rules = sharding.abstract_mesh(sizes), sharding.rules(run.sharding)
    made = program(model, packed=task.packed)
    transform, _ = optim_lib.build(run.optim, run.steps, made.axes)
    lie = sharding.param_shardings(mesh, run.sharding, made.axes, {n: s.shape for n, s in made.shapes.items()})
    place = lambda shapes, lie: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, lie)
    parameters = _share(place(made.shapes, lie))
    opt = jax.eval_shape(transform.init, made.shapes)
    optimizer = _share(place(opt, optim_lib.state_shardings(transform, made.shapes, lie, mesh)))
    parts = lambda name: sharding.parts(sizes, sharding.axes_of(rules, name))
    rows, cut, tensor = run.data.batch_size // accumulate, parts('batch') * parts('length'), parts('heads')
    abstract = jax.eval_shape(lambda: models.build(model, rngs=nnx.Rngs(0)))
    residuals = plan_lib.residuals(abstract, model, rows, task.length, task.packed)
    weights = collections.Counter((x.shape, x.dtype) for x in jax.tree.leaves(abstract))
    activations = 0.0
    for x in residuals:
        if weights[x.shape, x.dtype]:
            weights[x.shape, x.dtype] -= 1
            continue
        whole = x.ndim and x.shape[-1] == model.width  # of the residual stream, which the tensor axis leaves whole
        activations += plan_lib.size(x) / cut / (1 if whole else tensor)
    outputs = model.num_classes or model.vocab_size or model.input_dim
    logits = 0 if model.num_classes else 2 * 4 * rows * task.length * outputs / cut / tensor
    tokens = run.data.batch_size * task.length
    again = {'none': 1.0, 'dots': 1.0, 'full': 4 / 3}[model.remat]
    flops = again * plan_lib.flops_per_token(model, made.axes, made.shapes, task.length) * tokens / where.size
    count = sum(s.size for s in made.shapes.values())
    gathered = 2 * count / tensor  # bfloat16 copies of what a device multiplies by
    passes = 3 if model.remat == 'full' else 2
    moved = 7 * parameters + accumulate * ((passes + 1) * gathered + 4 * activations)

    def exchange(kind, axes, times, payload):
        """A ring within a node, else over its network cards; the mesh's last axes are neighbours."""
        names = [a for a in axes if sizes[a] > 1]
        g = math.prod(sizes[a] for a in names)
        if g == 1:
            return []
        inner = math.prod([*sizes.values()][[*sizes].index(names[0]) :])
        rate = LINKS * (where.chip.link if inner <= NODE else NETWORK)
        wire = payload * (g - 1) / g * (2 if kind == 'all-reduce' else 1)
        return [(kind, ' x '.join(names), g, times, times * payload, times * wire, times * wire / rate)]

    shards = [a for a in ('fsdp', 'context') if a in sharding.axes_of(rules, 'embed')]
    copies = [a for a in ('data', 'fsdp', 'expert', 'context') if a not in shards]
    layer = 2 * rows * task.length * model.width / cut
    exchanges = [
        *exchange('all-gather', shards, passes * accumulate, gathered),
        *exchange('reduce-scatter', shards, accumulate, 2 * gathered),
        *exchange('all-reduce', copies, 1, parameters),
        *(exchange('all-reduce', ['tensor'], 2 * passes * accumulate * model.num_layers, layer) if tensor > 1 else []),
    ]
    notes = ['an analytic model of shapes, neither compiled nor measured: expect errors of tens of per cent']
    notes += [f'nodes of {NODE} GPUs by NVLink, {NETWORK / 1e9:.0f} GB/s a GPU between them']
    if parts('length') > 1:
        notes += ['what softmax attention and recurrences send along a sequence that is cut is not in it']
    return {
        'how': 'analytic model',
        'memory': {
            'parameters': parameters,
            'optimizer': optimizer,
            'activations': activations,
            'temporaries': parameters + logits,  # gradients in float32
        },
        'flops': flops,
        'moved': moved,
        'local': seconds_of(iter([(flops, moved, False)]), where.chip),
        'exchanges': exchanges,
        'notes': notes,
    }


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
