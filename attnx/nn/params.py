"""Parameters, and the flat view of a module that the training step, the optimizer and checkpoints see."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import core

from attnx import axes as axes_lib


def param(value: jax.Array, axes: tuple[str | None, ...]) -> nnx.Param:
    """A parameter with one logical axis name per dimension. Scalars have shape [1]: a 0-d parameter can't be stacked."""
    axes_lib.check(axes, value.shape)
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float, dtype: Any = jnp.float32) -> jax.Array:
    return scale * jax.random.normal(rngs.params(), shape, dtype)


def _name(path) -> str:
    return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', None)))) for k in path)


def to_flat(module: nnx.Module) -> dict[str, jax.Array]:
    """`{'stacks/0/layers/2/mixer/query/kernel': array}`, in the module's own leaf order."""
    # The last key is the Variable's own, `value`.
    return {_name(path[:-1]): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(module)[0]}


def from_flat(like: nnx.Module, flat: dict[str, jax.Array]) -> Any:
    """The inverse of `to_flat`; `like` is a module of the same structure, abstract or not.

    Raises:
      ValueError: names are missing or unknown.
    """
    names = list(to_flat(like))
    if missing := [n for n in names if n not in flat]:
        raise ValueError(f'parameters missing: {", ".join(missing[:5])}{" …" if len(missing) > 5 else ""}')
    if unknown := [n for n in flat if n not in set(names)]:
        raise ValueError(f'parameters not of this model: {", ".join(unknown[:5])}{" …" if len(unknown) > 5 else ""}')
    return jax.tree.unflatten(jax.tree.structure(like), [flat[n] for n in names])


def flat_axes(module: nnx.Module) -> dict[str, tuple[str | None, ...]]:
    """Parameter name -> logical axis names."""
    leaves = jax.tree_util.tree_flatten_with_path(module, is_leaf=lambda v: isinstance(v, nnx.Variable))[0]
    return {_name(path): tuple(v.get_metadata()['out_sharding']) for path, v in leaves if isinstance(v, nnx.Variable)}


def stack(build, keys: jax.Array) -> nnx.Module:
    """build(key) of every key, stacked on a leading 'layers' dimension with its axis name kept. keys: [layers, …].

    Within `jit` one after another: random numbers of a batch of keys take XLA twice as long to compile, and are the same. Else
    operation by operation, so that other models with arrays of these shapes need not compile them again.
    """
    make = nnx.transform_metadata(build, in_axes=0, out_axes=0, partition='layers')
    return jax.lax.map(make, keys) if isinstance(keys, core.Tracer) else jax.vmap(make)(keys)
