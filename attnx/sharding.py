"""Meshes, and the mapping from logical axis names to mesh axes.

A mesh has the axes `data, fsdp, tensor, context`; a preset maps logical names to them. Inside `use(mesh, preset)` activations
are constrained by name; without it `constrain` is the identity, so modules work anywhere.
"""

import contextlib
import contextvars
import math

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnx import axes as axes_lib
from attnx.dispatch import nearest

MESH_AXES = ('data', 'fsdp', 'tensor', 'context')

_TENSOR = {'heads': 'tensor', 'kv_heads': 'tensor', 'mlp': 'tensor', 'vocab': 'tensor'}
PRESETS = {
    'ddp': {'batch': ('data', 'fsdp')},
    'fsdp': {'batch': ('data', 'fsdp'), 'embed': 'fsdp'},
    'fsdp_tp': {'batch': ('data', 'fsdp'), 'embed': 'fsdp', **_TENSOR},
    'context': {'batch': ('data', 'fsdp'), 'embed': 'fsdp', 'length': 'context'},
}

_rules: contextvars.ContextVar[dict | None] = contextvars.ContextVar('rules', default=None)


def make_mesh(sizes: dict[str, int] | None = None, devices=None) -> jax.sharding.Mesh:
    """A mesh over `devices` with the given axis sizes; absent axes have size 1, one size may be -1 = the rest.

    Raises:
      ValueError: an unknown axis, or sizes whose product is not the number of devices; names the nearest that fit.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(sizes or {'data': -1})
    for name in sizes:
        if name not in MESH_AXES:
            raise ValueError(f'unknown mesh axis {name!r}; {nearest(name, MESH_AXES)}')
    full = {name: sizes.get(name, 1) for name in MESH_AXES}
    free = [name for name, size in full.items() if size == -1]
    fixed = math.prod(size for size in full.values() if size != -1)
    if len(free) > 1 or fixed < 1:
        raise ValueError(f'mesh {sizes}: at most one size may be -1, the others are >= 1')
    if free:
        full[free[0]] = max(len(devices) // fixed, 1)
    if math.prod(full.values()) != len(devices):
        divisors = [d for d in range(1, len(devices) + 1) if len(devices) % d == 0]
        raise ValueError(f'mesh {sizes} does not tile {len(devices)} devices; sizes must be divisors: {divisors}')
    shape = tuple(full.values())
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def rules(preset: str) -> dict:
    if preset not in PRESETS:
        raise ValueError(f'unknown sharding preset {preset!r}; {nearest(preset, PRESETS)}')
    return PRESETS[preset]


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh, preset: str):
    """Within: `constrain` acts, and `jax.set_mesh(mesh)` holds."""
    token = _rules.set(rules(preset))
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _rules.reset(token)


def partition(names: tuple[str | None, ...], mapping: dict) -> P:
    """Logical names -> PartitionSpec; a mesh axis is used once, by the first name that maps to it."""
    used, entries = set(), []
    for name in names:
        target = mapping.get(name) if name else None
        target = (target,) if isinstance(target, str) else tuple(target or ())
        target = tuple(t for t in target if t not in used)
        used.update(target)
        entries.append(target if len(target) > 1 else target[0] if target else None)
    return P(*entries)


def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Constrains an activation by logical names; the identity without a mesh and inside shard_map."""
    mapping, mesh = _rules.get(), jax.sharding.get_abstract_mesh()
    if mapping is None or mesh.empty or any(t == AxisType.Manual for t in mesh.axis_types):
        return x
    axes_lib.check(names, x.shape)
    return jax.lax.with_sharding_constraint(x, partition(names, mapping))


def param_shardings(mesh: jax.sharding.Mesh, preset: str, axes: dict[str, tuple], shapes: dict[str, tuple]) -> dict:
    """Flat dict name -> NamedSharding.

    Raises:
      ValueError: a dimension is not divisible by its mesh axes; names the parameter, the dimension and the sizes.
    """
    mapping, found = rules(preset), {}
    for name, names in axes.items():
        spec = partition(names, mapping)
        for dim, entry in enumerate(spec):
            parts = math.prod(mesh.shape[a] for a in ((entry,) if isinstance(entry, str) else entry or ()))
            if shapes[name][dim] % parts:
                raise ValueError(
                    f'parameter {name}: dimension {dim} ({names[dim]}) of size {shapes[name][dim]} is not divisible '
                    f'by the {parts} parts that preset {preset!r} cuts it into on mesh {dict(mesh.shape)}'
                )
        found[name] = NamedSharding(mesh, spec)
    return found
