"""The TPU compiler's own words about a training step: memory, work and traffic, read from the program that it makes.

libtpu partitions, fuses, schedules and places the step for a named pod; that program and the buffers that it is given are all
that a plan reads. What comes after, machine code for each instruction, takes ten times as long and changes none of it: once
the program is written down the compiler is stopped. It has a process of its own, which it ends by itself on some errors.
"""

import collections
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import pathlib
import re
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import attnx
import pallas_kernels
from attnx import catalog, dispatch, sharding, tasks
from attnx import config as config_lib
from attnx.train import chips, hlo
from attnx.train.chips import LINKS, Topology
from attnx.train.config import Config
from attnx.train.program import placed, program, training
from pallas_kernels import libtpu

PROGRAM, BUFFERS = '*.after_optimizations.txt', '*.after_optimizations-buffer-assignment.txt'
LAST = '*.after_optimizations_after_buffer_assignment.txt'  # appears when both are written


def found(run: Config, where: Topology) -> dict:
    """What the compiler makes of the step of `run`, fields of `attnx.train.topology.Found`; kept, and read again next time.

    Raises:
      ValueError: what the compiler, or tracing the step, refuses.
    """
    kept = _place(run, where)
    if kept.exists():
        return json.loads(kept.read_text())
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context('spawn')
        mine, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(theirs, run, where.name, folder))
        child.start()
        theirs.close()
        written = lambda: any(pathlib.Path(folder).glob(LAST))
        held, coords = {}, []
        given: Any = None
        try:
            kind, given = mine.recv()
            if kind == 'lowered':
                held, coords = given
                while not (written() or mine.poll(0.05)):
                    pass
                kind, given = ('written', None) if written() else mine.recv()
        except EOFError:
            child.join()
            kind, given = 'error', f'the compiler ended its process (code {child.exitcode}; its words stand above)'
        finally:
            child.kill()
            child.join()
        if kind == 'written':
            text, buffers = (next(pathlib.Path(folder).glob(name)).read_text() for name in (PROGRAM, BUFFERS))
            given = _read(text, buffers, held, coords, where, run.mesh)
    if kind == 'error' and (total := too_large(given)) is not None:
        given = {'memory': held | {'activations and temporaries': max(total - sum(held.values()), 0)}}
    elif kind == 'error':
        raise ValueError(f'{where.name}, {libtpu.versions()}: {given}')
    given |= {'how': f'compiled by {libtpu.versions()}, up to machine code'}
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f'.{os.getpid()}')
    partial.write_text(json.dumps(given))
    partial.replace(kept)
    return given


def _child(send, run: Config, name: str, folder: str) -> None:
    parent = multiprocessing.parent_process()  # compiling takes minutes: not for a plan that was stopped
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    os.environ.pop('XLA_FLAGS', None)  # of this machine, not of that one
    libtpu.prepare()
    try:
        held, coords, lowered = _lowered(run, chips.topology(name))
        send.send(('lowered', (held, coords)))
        jax.config.update('jax_enable_compilation_cache', False)  # a program that is not made is not written down
        lowered.compile({'xla_dump_to': folder})
        send.send(('error', 'the compiler wrote no program down'))
    except Exception as error:
        send.send(('error', f'{type(error).__name__}: {str(error)[:2000]}'))


def _place(run: Config, where: Topology) -> pathlib.Path:
    """Where the findings are kept: by the run, who compiles for which chips, and all that the step is made by."""
    folders = [pathlib.Path(attnx.__file__).parent, pathlib.Path(pallas_kernels.__file__).parent, *catalog.roots()[1:]]
    sources = [path.read_text() for folder in folders for path in sorted(folder.rglob('*.py'))]
    versions = [f'{name} {importlib.metadata.version(name)}' for name in ('jaxlib', 'flax', 'optax')]
    given = [where.name, libtpu.versions(), *versions, config_lib.to_json(run), *sources]
    key = hashlib.sha256('\n'.join(given).encode()).hexdigest()
    folder = os.environ.get('JAX_COMPILATION_CACHE_DIR') or os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    return pathlib.Path(folder).expanduser() / 'attnx' / 'plans' / f'{key[:32]}.json'


def _lowered(run: Config, where: Topology) -> tuple[dict, list, Any]:
    """Bytes that a device holds, coordinates of the devices, and the step, lowered."""
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
    held = {'parameters': share(state['params']), 'optimizer': share(state['opt']), 'batch': share(batch)}
    return held, [tuple(d.coords) for d in mesh.devices.flat], lowered


def share(tree: Any) -> int:
    """Bytes of the part of a pytree that one device holds."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in leaves)


def _read(text: str, buffers: str, held: dict, coords: list, where: Topology, mesh: Mapping[str, int]) -> dict:
    cost = hlo.cost(text, where.size)
    given, beyond = sizes_of(buffers)
    beyond += given - sum(held.values())
    kept = min(cost.kept, beyond)
    memory = held | {'activations': kept, 'temporaries': beyond - kept}
    groups: dict[tuple, list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for c in cost.collectives:
        total = groups[c.kind, _axes(c.group, mesh), len(c.group)]
        rate = LINKS * where.chip.link * chips.links([coords[i] for i in c.group], where)
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
    if 'collective_offload_config' in text:  # of tpu7x: inside programs of their own, which are not read
        notes.append('collectives that SparseCores carry out are not counted: communication takes more than is said')
    return {
        'memory': memory,
        'flops': cost.flops,
        'moved': cost.bytes,
        'local': chips.seconds_of(work, where.chip),
        'exchanges': exchanges,
        'kernels': dict(sorted(kernels.items())),
        'notes': notes,
    }


def sizes_of(buffers: str) -> tuple[int, int]:
    """Bytes of the arguments, and of all else that a program holds in main memory, of the compiler's list of buffers."""
    arguments = others = 0
    for size, rest in re.findall(r'^allocation \d+: size (\d+), (.*)', buffers, re.M):
        if 'thread-local' not in rest and not rest.startswith('color'):  # a part of a fusion; memory on the chip
            arguments += int(size) if 'parameter' in rest else 0
            others += 0 if 'parameter' in rest else int(size)
    return arguments, others


def too_large(message: str) -> float | None:
    """Bytes that a program would need, of the compiler's refusal; None: it refuses something else."""
    needs = re.search(r'\(([\d.]+)([KMGT])\) exceeds available HBM', message)
    return float(needs[1]) * 2 ** {'K': 10, 'M': 20, 'G': 30, 'T': 40}[needs[2]] if needs else None


def _axes(group: tuple[int, ...], shape: Mapping[str, int]) -> str:
    """The axes of the mesh along which the devices of a group differ."""
    places = np.stack(np.unravel_index(group, tuple(shape.values())))
    return ' x '.join(name for name, row in zip(shape, places) if len(set(row.tolist())) > 1) or 'none'
