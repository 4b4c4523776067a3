"""Meshes, and the mapping from logical axis names to mesh axes.

A preset maps logical names to mesh axes; what it does not name is replicated. Inside `use(mesh, preset)` activations are
constrained by name and ops run on each device's own rows, heads and tokens (`attnx.ops.parallel`); without it `constrain` is
the identity, so modules work anywhere.
"""

import contextlib
import contextvars
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnx import axes as axes_lib
from attnx.dispatch import nearest

# Slowest first: devices that are neighbours on the last axis are neighbours in the machine.
MESH_AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')

_DATA = {'batch': ('data', 'fsdp', 'expert'), 'expert': 'expert'}  # every device of these three has rows of its own
_TENSOR = {'heads': 'tensor', 'kv_heads': 'tensor', 'mlp': 'tensor', 'vocab': 'tensor'}
PRESETS = {
    'ddp': _DATA,
    'fsdp': {**_DATA, 'embed': 'fsdp'},
    'fsdp_tp': {**_DATA, 'embed': 'fsdp', **_TENSOR},
    'context': {**_DATA, 'length': 'context'},
    'fsdp_context': {**_DATA, 'embed': ('fsdp', 'context'), 'length': 'context'},
}
CONTEXT_METHODS = ('auto', 'gather', 'ring', 'heads')  # of softmax attention over the context axis

_rules: contextvars.ContextVar[Mapping | None] = contextvars.ContextVar('rules', default=None)
_method: contextvars.ContextVar[str] = contextvars.ContextVar('method', default='auto')
_recorded: contextvars.ContextVar[list[tuple] | None] = contextvars.ContextVar('recorded', default=None)


@contextlib.contextmanager
def record():
    """Within: (names, shape, spec) of every constrained activation is appended to the list that is yielded."""
    found: list[tuple] = []
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


def check(sizes: Mapping[str, int], preset: str = 'ddp', context: str = 'auto') -> None:
    """Raises ValueError for an axis, a preset or a context method that is unknown, or a size that no mesh has."""
    for name in sizes:
        if name not in MESH_AXES:
            raise ValueError(f'unknown mesh axis {name!r}; {nearest(name, MESH_AXES)}')
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f'mesh {dict(sizes)}: at most one size may be -1, the others are >= 1')
    rules(preset)
    if context not in CONTEXT_METHODS:
        raise ValueError(f'unknown context method {context!r}; {nearest(context, CONTEXT_METHODS)}')


def check_effect(sizes: Mapping[str, int], preset: str, context: str) -> None:
    """Raises ValueError for a preset or a context method that these sizes leave without effect."""
    mapping = rules(preset)
    needed = {f'sharding {preset!r}': {axis for name in set(mapping) - set(_DATA) for axis in axes_of(mapping, name)}}
    needed |= {} if context == 'auto' else {f'context {context!r}': {'context'}}
    for what, axes in needed.items():
        if axes and all(sizes.get(axis, 1) == 1 for axis in axes):
            named = ' and '.join(sorted(axes))
            raise ValueError(f'{what} cuts over {named}, which the mesh {dict(sizes)} leaves at 1; give mesh.{min(axes)}')


def mesh_shape(sizes: Mapping[str, int] | None, count: int) -> dict[str, int]:
    """Every mesh axis with its size, over `count` devices; absent axes have size 1, one size may be -1 = the rest.

    Raises:
      ValueError: an unknown axis, or sizes whose product is not the number of devices; names the nearest mesh that fits.
    """
    sizes = dict(sizes or {'data': -1})
    check(sizes)
    full = {name: sizes.get(name, 1) for name in MESH_AXES}
    free = [name for name, size in full.items() if size == -1]
    fixed = math.prod(size for size in full.values() if size != -1)
    if free:
        full[free[0]] = max(count // fixed, 1)
    if math.prod(full.values()) != count:
        fitting, rest = {}, count
        for name in reversed(MESH_AXES):  # the axes that cost most to lose come first
            if name not in free and name != 'data':
                fitting[name] = max(d for d in range(1, full[name] + 1) if rest % d == 0)
                rest //= fitting[name]
        last = free[0] if free else 'data'
        nearest_one, *others = [shown({**fitting, last: rest}), *_tilings(full, last, count)]
        others = [str(other) for other in others if other != nearest_one][:2]
        also = f'; also {" and ".join(others)}' if others else ''
        raise ValueError(f'mesh {sizes} does not tile {count} devices; the nearest that does: {nearest_one}{also}')
    return full


def _tilings(full: Mapping[str, int], last: str, count: int) -> list[dict[str, int]]:
    """Meshes of `count` devices over the axes that `full` cuts by, the most alike first; `last` takes the rest."""
    axes = [name for name in MESH_AXES if full[name] > 1 and name != last]
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    found = [dict(zip(axes, parts)) for parts in itertools.product(divisors, repeat=len(axes)) if count % math.prod(parts) == 0]
    unlike = lambda sizes: sum(abs(math.log(sizes[name] / full[name])) for name in axes)
    return [shown({**sizes, last: count // math.prod(sizes.values())}) for sizes in sorted(found, key=unlike)]


def shown(sizes: Mapping[str, int]) -> dict[str, int]:
    """The axes that cut something, or may (-1), in the order of the mesh."""
    return {name: sizes[name] for name in MESH_AXES if sizes.get(name, 1) != 1} or {'data': 1}


def make_mesh(sizes: Mapping[str, int] | None = None, devices=None) -> jax.sharding.Mesh:
    """A mesh over `devices` (default: all of all processes). Raises ValueError as `mesh_shape` does.

    On a torus of TPUs an axis takes whole axes of the torus where it can, else parts of them.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = tuple(mesh_shape(sizes, len(devices)).values())
    laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(laid, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh without devices, to trace under; -1 counts as 1."""
    full = tuple(max(sizes.get(name, 1), 1) for name in MESH_AXES)
    mesh_shape(sizes, math.prod(full))
    return AbstractMesh(full, MESH_AXES, axis_types=(AxisType.Auto,) * len(full))


def fitting(sizes: Mapping[str, int], axis: str, count: int) -> dict[str, int]:
    """The nearest mesh whose `axis` divides `count`: what it gives up goes to 'data'."""
    size = math.gcd(sizes[axis], count)
    return {**sizes, axis: size, 'data': sizes['data'] * (sizes[axis] // size) if sizes['data'] > 0 else -1}


def rules(preset: str) -> dict:
    if preset not in PRESETS:
        raise ValueError(f'unknown sharding preset {preset!r}; {nearest(preset, PRESETS)}')
    return PRESETS[preset]


def _check_used(sizes: Mapping[str, int], preset: str) -> None:
    uses = lambda mapping: {axis for target in mapping.values() for axis in _tuple(target)}
    for name, size in sizes.items():
        if size > 1 and name not in uses(rules(preset)):
            able = [other for other, mapping in PRESETS.items() if name in uses(mapping)]
            without = shown({**sizes, name: 1, 'data': sizes['data'] * size})
            raise ValueError(
                f'sharding {preset!r} has no use for mesh axis {name!r} of size {size}: its devices would all do the same; '
                f'give sharding {" or ".join(map(repr, able))}, or mesh {without}'
            )


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh | AbstractMesh, preset: str, context: str = 'auto'):
    """Within: `constrain` acts, ops run on each device's part, and `jax.set_mesh(mesh)` holds.

    What `jax.jit` has traced before under an equal mesh keeps its preset and method: trace a fresh function within.

    context: how softmax attention crosses the context axis, see `attnx.ops.parallel`; 'auto' picks for each call.

    Raises:
      ValueError: the preset or the method is unknown, or the preset leaves an axis of the mesh unused.
    """
    check({}, preset, context)
    _check_used(mesh.shape, preset)
    tokens = _rules.set(rules(preset)), _method.set(context)
    enter = jax.sharding.use_abstract_mesh if isinstance(mesh, AbstractMesh) else jax.set_mesh
    try:
        with enter(mesh):
            yield mesh
    finally:
        _rules.reset(tokens[0])
        _method.reset(tokens[1])


def active() -> tuple[Mapping[Any, int], Mapping, str] | None:
    """(mesh sizes, rules, context method) where several devices share the work; None elsewhere, inside shard_map too."""
    mapping, mesh = _rules.get(), jax.sharding.get_abstract_mesh()
    if mapping is None or mesh.empty or mesh.size == 1 or any(t == AxisType.Manual for t in mesh.axis_types):
        return None
    return mesh.shape, mapping, _method.get()


def _tuple(target) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else tuple(target or ())


def axes_of(mapping: Mapping, name: str) -> tuple[str, ...]:
    """The mesh axes to which `mapping` sends a logical name."""
    return _tuple(mapping.get(name))


def partition(names: tuple[str | None, ...], mapping: Mapping) -> P:
    """Logical names -> PartitionSpec; a mesh axis is used once, by the first name that maps to it."""
    used, entries = set(), []
    for name in names:
        target = tuple(t for t in _tuple(mapping.get(name) if name else None) if t not in used)
        used.update(target)
        entries.append(target if len(target) > 1 else target[0] if target else None)
    return P(*entries)


def parts(sizes: Mapping[str, int], entry) -> int:
    """Into how many parts an entry of a PartitionSpec cuts its dimension."""
    return math.prod(sizes[axis] for axis in _tuple(entry))


def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Constrains an activation by logical names; the identity without a mesh and inside shard_map.

    A dimension that its mesh axes do not divide stays whole: one token that is decoded, an odd number of prompts.
    """
    found = active()
    if found is None:
        return x
    sizes, mapping, _ = found
    axes_lib.check(names, x.shape)
    spec = P(*(e if n % parts(sizes, e) == 0 else None for n, e in zip(x.shape, partition(names, mapping))))
    if (recorded := _recorded.get()) is not None:
        recorded.append((names, x.shape, spec))
    return jax.lax.with_sharding_constraint(x, spec)


def param_shardings(
    mesh: jax.sharding.Mesh | AbstractMesh, preset: str, axes: dict[str, tuple], shapes: dict[str, tuple]
) -> dict:
    """Flat dict name -> NamedSharding.

    Raises:
      ValueError: a dimension is not divisible by its mesh axes; names the parameter, the dimension, the sizes, and the
        nearest mesh that works.
    """
    mapping, found = rules(preset), {}
    for name, names in axes.items():
        spec = partition(names, mapping)
        for dim, entry in enumerate(spec):
            size = shapes[name][dim]
            if size % parts(mesh.shape, entry):
                smaller, rest = dict(mesh.shape), size
                for axis in _tuple(entry):
                    smaller = fitting(smaller, axis, rest)
                    rest //= smaller[axis]
                raise ValueError(
                    f'parameter {name}: dimension {dim} ({names[dim]}) of size {size} is not divisible by the '
                    f'{parts(mesh.shape, entry)} parts that preset {preset!r} cuts it into on mesh {shown(mesh.shape)}; '
                    f'the nearest mesh that works: {shown(smaller)}'
                    # Ids that no token has cost little: a table may be taller than the vocabulary.
                    + (f'; or model.vocab_size {size + -size % parts(mesh.shape, entry)}' if names[dim] == 'vocab' else '')
                )
        found[name] = NamedSharding(mesh, spec)
    return found


def row_share(mesh: jax.sharding.Mesh, preset: str) -> tuple[int, int]:
    """(index, count): this process's devices hold block `index` of `count` equal blocks of the batch's rows.

    Raises:
      ValueError: they hold rows that are no such block; cut the batch over whole processes.
    """
    spec = partition(('batch',), rules(preset))
    total = parts(mesh.shape, spec[0])
    where = NamedSharding(mesh, spec).devices_indices_map((total,))
    mine = sorted({(s[0].start or 0) for d, s in where.items() if d.process_index == jax.process_index()})
    size = len(mine)
    if total % size or mine[0] % size or mine != list(range(mine[0], mine[0] + size)):
        raise ValueError(
            f'process {jax.process_index()} would hold parts {mine} of the {total} into which mesh {shown(mesh.shape)} cuts '
            'the batch; they must be a block of neighbours: give mesh sizes of which a process has whole rows'
        )
    return mine[0] // size, total // size
