"""`attnx.explain`: which implementation of an op runs, on each platform, and why others do not."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnx import catalog, dispatch
from attnx.dispatch import Call, nearest
from attnx.spec import Context, Dims, side_input

PLATFORMS = ('cpu', 'cuda', 'tpu')


def explain(what: str, *args: Any, **kwargs: Any) -> str:
    """Says what runs and why.

    `explain('softmax_attention', query, key, value, mask=…)`: an op on arrays or `jax.ShapeDtypeStruct`s; nothing is computed.
    `explain('gla', width=512, length=2048, batch=1, dtype=jnp.bfloat16, num_heads=4)`: a mechanism; further names are fields
    of its Config. With `mesh={'context': 4}, preset='context'`: also how it is spread over the devices of such a mesh.

    Raises:
      ValueError: `what` is neither an op nor a mechanism; or what the op or mechanism itself refuses.
    """
    from attnx import ops

    public = [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))]
    if what in public:
        arrays, rebuild = dispatch.split_arrays((args, kwargs))

        def call(arrays):
            a, k = rebuild(arrays)
            return getattr(ops, what)(*a, **k)

        with dispatch.record() as calls:
            jax.eval_shape(call, arrays)
        return describe(calls)
    names = catalog.scan()
    if what not in names:
        raise ValueError(f'unknown op or mechanism {what!r}; {nearest(what, [*public, *names])}')
    if args:
        known = 'width, length, batch, dtype, causal, mesh, preset'
        raise ValueError(f'explain({what!r}) takes keywords: {known} and fields of its Config')
    return describe(calls_of(what, **kwargs))


def calls_of(
    mechanism: str,
    *,
    width: int = 512,
    length: int = 2048,
    batch: int = 1,
    dtype: Any = jnp.bfloat16,
    causal: bool | None = None,
    mesh: Mapping[str, int] | None = None,
    preset: str = 'ddp',
    **fields: Any,
) -> list[Call]:
    """The op calls of one layer of `mechanism`, traced abstractly; on a mesh of these sizes, if any."""
    from attnx import config as config_lib
    from attnx import sharding

    spec = catalog.get(mechanism)
    config = config_lib.build(spec.config, fields, f'config of {mechanism}')
    causal = spec.causal != 'bidirectional' if causal is None else causal
    dims = Dims(width=width, causal=causal, max_length=length, dtype=dtype)
    if not mesh:
        return layer_calls(spec, config, dims, length, batch)[0]
    with sharding.use(sharding.abstract_mesh(mesh), preset):
        return layer_calls(spec, config, dims, length, batch)[0]


def layer_calls(
    spec, config, dims: Dims, length: int, batch: int, *, packed: bool = False, impl: str = 'auto', shared: Any = None
) -> tuple[list[Call], dict]:
    """The op calls of one layer in training, and what it publishes (abstract).

    shared: what earlier layers published, abstract; none by default.
    """
    x = jax.ShapeDtypeStruct((batch, length, dims.width), dims.dtype)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32) if packed else None
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    memory = x if 'memory' in spec.needs else None
    inputs = {name: side_input(kind, batch, length) for name, kind in spec.inputs.items()}

    def run(x, ids, memory, inputs, shared):
        mixer = spec.build(config, dims, rngs=nnx.Rngs(0))
        ctx = Context(segment_ids=ids, memory=memory, inputs=inputs, shared=shared, impl=impl)
        return dict(mixer(x, ctx).shared)

    with dispatch.record() as calls:
        published = jax.eval_shape(run, x, ids, memory, inputs, {'embedding': x, 'fixed': rows, **(shared or {})})
    return calls, published


def describe(calls: list[Call]) -> str:
    """One paragraph per distinct call."""
    paragraphs = []
    for call in calls:
        lines = [f'{call.op} (impl={call.impl!r})']
        lines += [f'  on {platform}: {call.chosen(platform).impl}' for platform in PLATFORMS]
        if call.spread:
            lines += [f'  spread: {call.spread.how}', *(f'    not cut: {why}' for why in call.spread.whole)]
        for choice in call.choices:
            runs = f'runs, {choice.schedule}' if choice.schedule else 'runs'
            state = runs if choice.reason is None else f'refused: {choice.reason}'
            lines.append(f'    {choice.impl} ({choice.platform}): {state}')
        paragraphs.append('\n'.join(lines))
    return '\n'.join(dict.fromkeys(paragraphs)) or 'no op with a choice of implementations: plain XLA'


def summary(calls: list[Call], platform: str) -> str:
    """'gated_linear: xla' for a table."""
    spread = lambda call: f' ({call.spread.how})' if call.spread else ''
    found = dict.fromkeys(f'{call.op}: {call.chosen(platform).impl}{spread(call)}' for call in calls)
    return ', '.join(found) or 'plain XLA'
