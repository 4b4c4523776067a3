"""What the TPU kernels share: where they can't run, and the types of what they return."""

import math

import jax
from jax.sharding import AxisType


def partitioned() -> str | None:
    """The reason against a kernel where the compiler would have to cut it over a mesh, which it can't; or None."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {n: s for n, s, t in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types) if t != AxisType.Manual}
    if math.prod(sizes.values()) == 1:
        return None
    return f'the compiler does not partition a TPU kernel over the mesh {sizes}; call it inside jax.shard_map or use "xla"'


def out_type(shape, dtype, like) -> jax.ShapeDtypeStruct:
    """The type of a result that varies over the mesh axes over which the array `like` does (inside `jax.shard_map`)."""
    kind = getattr(jax.typeof(like), 'manual_axis_type', None)
    if kind is None or not kind.varying:
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)

