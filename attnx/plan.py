"""Before a run: what it costs, what will run, and what would be refused. Needs no device and computes nothing.

    python -m attnx.plan --config=configs/base.py [--config.model.width=512 …] [--platform=cuda]
    python -m attnx.plan --config=configs/sizes.py:7b --topology=v5p:8x8x4 [--fit]     a step on chips that are not here
"""

import os

if __name__ != 'attnx.plan':  # as a command: said before jax looks for devices, and refused before it is imported
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    from attnx.train import early

    early.plan()

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app, flags
from flax import nnx

from attnx import dispatch, explanation, sharding
from attnx.models import ModelConfig, build
from attnx.models.config import Layer, units
from attnx.nn import flat_axes, to_flat
from attnx.spec import Dims, side_input


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer. FLOPs count a multiply-add as two; training costs three times the forward pass."""

    index: int
    name: str
    parameters: int  # of the mixer
    train_flops: float  # of the mixer, a token
    state_bytes_token: float  # growth of the decode state by one more token, one sequence
    state_bytes: int  # decode state of one sequence at full length
    calls: tuple[dispatch.Call, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    layers: tuple[LayerPlan, ...]
    parameters: int  # of the whole model
    train_flops: float  # of the whole model, a token
    state_bytes: int  # of all layers, one sequence at full length
    memory: dict[str, int]  # what training holds -> bytes, all devices together
    refused: tuple[str, ...]  # what would be refused


def size(tree: Any) -> int:
    """Bytes of the arrays of a pytree, abstract ones too."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def plan_layer(
    index: int, layer: Layer, dims: Dims, length: int, batch: int, *, packed: bool, impl: str, shared: dict
) -> LayerPlan:
    """Adds to `shared` what the layer publishes. Raises ValueError with what the mechanism or its ops refuse."""
    mixer = jax.eval_shape(lambda: layer.spec.build(layer.config, dims, rngs=nnx.Rngs(0)))
    count = sum(v.size for v in to_flat(mixer).values())
    state = lambda n: size(jax.eval_shape(lambda: mixer.init_state(1, n, dims.dtype)))
    options = {'packed': packed, 'impl': impl, 'shared': shared}
    calls, published = explanation.layer_calls(layer.spec, layer.config, dims, length, batch, **options)
    shared |= published
    return LayerPlan(
        index=index,
        name=layer.name,
        parameters=count,
        train_flops=3 * (2 * count + layer.spec.flops(layer.config, dims, length)),
        state_bytes_token=(state(2 * length) - state(length)) / length,
        state_bytes=state(length),
        calls=tuple(calls),
    )


def groups(config: ModelConfig) -> list[tuple[str, tuple[Layer, ...], bool]]:
    """(what they are, layers, whether causal) of every stack of the model."""
    found = [('layer', config.layers(), config.kind != 'encoder')]
    if config.kind == 'encoder_decoder':
        found += [('encoder layer', config.encoder_layers(), False)]
        found += [('cross layer', (config.mixer(config.cross),) * config.num_layers, True)]
    return found


def layers_once(config: ModelConfig):
    """Yields (what it is called, the layer, its Dims, its group) of every stack, layers that are alike once."""
    for what, layers, causal in groups(config):
        dims, seen = config.dims(causal=causal, num_layers=len(layers)), set()
        for index, layer in enumerate(layers):
            if (layer.name, layer.mlp) not in seen:
                seen.add((layer.name, layer.mlp))
                yield f'{what} {index} ({layer.name})', layer, dims, what


def uneven(what: str, why: str, sizes: Mapping[str, int], nearest: Mapping[str, int]) -> ValueError:
    return ValueError(f'{what}: {why}; mesh {sharding.shown(sizes)}; the nearest mesh that works: {sharding.shown(nearest)}')


def cut_heads(layer: Layer) -> int:
    """The heads that the tensor axis must divide, as the layer's Config has them; 0: it does not say."""
    heads = getattr(layer.config, 'op_heads', getattr(layer.config, 'num_heads', 0))
    cut = {'softmax_attention', 'gated_linear', 'delta_rule'} & {*layer.spec.ops}  # ops that the axis cuts
    return heads or 0 if cut else 0


def check_numbers(config: ModelConfig, sizes: Mapping[str, int], preset: str, length: int) -> None:
    """What numbers alone say of a mesh, a size of -1 included: tokens, experts and heads that it does not divide, mechanisms
    that must see the whole sequence. Needs no jax (`attnx.light`).

    Raises:
      ValueError: as `check_sharding`.
    """
    sizes = {name: sizes.get(name, 1) for name in sharding.MESH_AXES}
    context, expert = (max(sizes[axis], 1) for axis in ('context', 'expert'))
    tensor = max(sizes['tensor'], 1) if 'heads' in sharding.rules(preset) else 1
    if length % context:
        low = length - length % context
        why = f'it does not divide over the context axis (lengths {max(low, context)} and {low + context} do)'
        raise uneven(f'length {length}', why, sizes, sharding.fitting(sizes, 'context', length))
    for named, layer, _, _ in layers_once(config):
        mlp, limits = layer.mlp or config.mlp, layer.spec.limits
        if mlp.kind == 'moe' and mlp.experts % expert:
            nearest = sharding.fitting(sizes, 'expert', mlp.experts)
            raise uneven(named, f'{mlp.experts} experts do not divide over the expert axis', sizes, nearest)
        if (heads := cut_heads(layer)) % tensor:
            why = f'{heads} heads are not divisible over the {tensor} devices of tensor'
            raise uneven(named, why, sizes, sharding.fitting(sizes, 'tensor', heads))
        if context > 1 and 'context' in limits:
            why = f'it can not serve a sequence that is cut: {limits["context"]}'
            raise uneven(named, why, sizes, sharding.fitting(sizes, 'context', 1))


def check_sharding(
    config: ModelConfig,
    sizes: Mapping[str, int],
    preset: str,
    context: str = 'auto',
    *,
    length: int,
    batch: int,
    packed: bool = True,
) -> None:
    """Whether a mesh cuts `config` evenly: tokens, heads, experts, rows. Needs no device and takes no memory.

    Raises:
      ValueError: the layer at fault, what does not divide or can't be served and why, and the nearest mesh that works.
    """
    sizes = {name: sizes.get(name, 1) for name in sharding.MESH_AXES}
    shared = {what: {} for what, _, _ in groups(config)}  # what layers publish
    if math.prod(sizes.values()) == 1:
        return
    check_numbers(config, sizes, preset, length)
    for named, layer, dims, what in layers_once(config):

        def whole(sizes, layer=layer, dims=dims, shared=shared[what]):
            """What one layer's ops could not cut."""
            options = {'packed': packed, 'impl': config.impl, 'shared': shared}
            with sharding.use(sharding.abstract_mesh(sizes), preset, context):
                calls, published = explanation.layer_calls(layer.spec, layer.config, dims, length, batch, **options)
            shared |= published
            return [(call.op, why) for call in calls if call.spread for why in call.spread.whole]

        if found := whole(sizes):
            smaller = [{**sizes, axis: d} for axis in ('tensor', 'context') for d in range(sizes[axis] - 1, 0, -1)]
            smaller = [{**s, 'data': s['data'] * math.prod(sizes.values()) // math.prod(s.values())} for s in smaller]
            able = (s for s in smaller if math.prod(s.values()) == math.prod(sizes.values()) and not whole(s))
            raise uneven(f'{named}: {found[0][0]}', found[0][1], sizes, next(able, {'data': 1}))


def shardings(config: ModelConfig, sizes: Mapping[str, int], preset: str, *, length: int, batch: int) -> str:
    """Where everything lies: parameters, constrained activations, and how each op is spread. Needs no device."""
    mesh = sharding.abstract_mesh(sizes)
    model = jax.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    axes, flat = flat_axes(model), to_flat(model)
    where = sharding.param_shardings(mesh, preset, axes, {name: v.shape for name, v in flat.items()})
    shape = lambda dims: f'[{", ".join(map(str, dims))}]'
    cuts = lambda spec: ', '.join('.' if e is None else e if isinstance(e, str) else ' x '.join(e) for e in spec)
    given = {'tokens': jax.ShapeDtypeStruct((batch, length), jnp.int32)}
    given['segment_ids'] = given['tokens']
    with sharding.use(mesh, preset), dispatch.record() as calls, sharding.record() as found:
        jax.eval_shape(lambda model, given: model(**given).logits, model, given)
    lines = [f'{preset} on mesh {sharding.shown(sizes)}', '', 'parameters']
    lines += [f'  {name}  {shape(flat[name].shape)} {axes[name]}: {cuts(where[name].spec)}' for name in flat]
    lines += ['', 'activations', *(f'  {shape(dims)} {names}: {cuts(spec)}' for names, dims, spec in dict.fromkeys(found))]
    lines += ['', 'ops', *dict.fromkeys(f'  {call.op}: {call.spread.how}' for call in calls if call.spread)]
    return '\n'.join(lines) + '\n'


def plan(
    config: ModelConfig,
    *,
    length: int,
    batch: int,
    packed: bool = True,
    documents: int = 1,
    optimizer: Callable[[dict], Any] = lambda axes: optax.adamw(1e-3),
    accumulate: int = 1,
    mesh: Mapping[str, int] | None = None,
    preset: str = 'ddp',
    context: str = 'auto',
) -> Plan:
    """The plan of training `config` on `batch` rows of `length` tokens.

    documents: most documents of a packed row.
    optimizer: axes of the flat parameters -> the optax transformation, whose state is counted.
    mesh, preset, context: how it is spread over devices; a size of -1 counts as 1.
    """
    config = dataclasses.replace(config, max_length=config.max_length or length)
    refused, planned = [], {}

    def attempt(what, function):
        try:
            return function()
        except (ValueError, TypeError) as error:
            refused.append(f'{what}: {error}')
            return None

    if packed:
        attempt('packing', lambda: config.check_packing(documents))
    on_mesh = contextlib.nullcontext
    sizes = {name: max(n, 1) for name, n in (mesh or {}).items()}
    if math.prod(sizes.values()) > 1:
        rows = {'length': length, 'batch': max(batch // accumulate, 1), 'packed': packed}
        if attempt('mesh', lambda: check_sharding(config, sizes, preset, context, **rows) or True):
            on_mesh = lambda: sharding.use(sharding.abstract_mesh(sizes), preset, context)
    layers = []
    for what, members, is_causal in groups(config):
        dims, shared = config.dims(causal=is_causal, num_layers=len(members)), {}
        for index, layer in enumerate(members):
            key = (what, layer.name)
            if key not in planned:
                options = {'packed': packed, 'impl': config.impl, 'shared': shared}
                make = lambda i=index, l=layer, d=dims, o=options: plan_layer(i, l, d, length, batch, **o)
                with on_mesh():
                    planned[key] = attempt(f'{what} {index} ({layer.name})', make)
            if planned[key] is not None:
                layers.append(dataclasses.replace(planned[key], index=index))
    model = attempt('model', lambda: jax.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))
    count, flops, memory = 0, 0.0, {}
    if model is not None:
        flat = to_flat(model)
        count = sum(v.size for v in flat.values())
        flops = flops_per_token(config, flat_axes(model), flat, length)
        memory['parameters'] = size(flat)
        memory['gradients'] = size(flat)
        memory['optimizer'] = size(jax.eval_shape(optimizer(flat_axes(model)).init, flat))
        rows = max(batch // accumulate, 1)
        kept = attempt('activations', lambda: activations(model, config, rows, length, packed))
        if kept is not None:
            memory['activations'] = kept
        if not config.num_classes:
            memory['logits'] = 2 * 4 * rows * length * (config.vocab_size or config.input_dim)
    return Plan(
        layers=tuple(layers),
        parameters=count,
        train_flops=flops,
        state_bytes=sum(l.state_bytes for l in layers),
        memory=memory,
        refused=tuple(refused),
    )


def flops_per_token(config: ModelConfig, axes: Mapping, shapes: Mapping, length: int) -> float:
    """Training FLOPs a token: 6 per parameter of a matrix product, and 3 times what the mixing itself costs.

    axes, shapes: of the flat parameters. Tables that are only looked up cost nothing.
    """
    count, visited, rows = 0, {}, 2 if config.fixed else 1  # of the experts of a layer a token visits some
    for stack, layers, pattern in (('body', config.layers(), config.pattern), ('encoder', *_encoder(config))):
        for i, (unit, _) in enumerate(units(layers, len(pattern))):
            for j, layer in enumerate(unit):
                mlp, experts = layer.mlp or config.mlp, getattr(layer.config, 'num_experts', 0)
                visited[f'{stack}/stacks/{i}/layers/{j}/mlp'] = mlp.top_k / mlp.experts
                visited[f'{stack}/stacks/{i}/layers/{j}/mixer'] = layer.config.top_k / experts if experts else 1
    for name, names in axes.items():
        leaf, matrix = name.rsplit('/', 1)[-1], len([a for a in names if a != 'layers']) > 1
        looked_up = leaf == 'table' or (leaf == 'embedding' and not config.tied)
        share = visited[name.rsplit('/', 1)[0]] if 'expert' in names else 1
        share *= rows if name.startswith('body/') else 1
        count += share * shapes[name].size if matrix and not looked_up else 0
    mixing = 0.0
    for _, layers, causal in groups(config):
        dims = config.dims(causal=causal, num_layers=len(layers))
        mixing += sum(layer.spec.flops(layer.config, dims, length) for layer in layers)
    return 6.0 * count + 3.0 * rows * mixing


def _encoder(config: ModelConfig) -> tuple[tuple[Layer, ...], tuple]:
    return (config.encoder_layers(), config.encoder.pattern) if config.kind == 'encoder_decoder' else ((), ('',))


def activations(model, config: ModelConfig, batch: int, length: int, packed: bool) -> int:
    """Bytes that the forward pass keeps for the backward pass."""
    return max(size(residuals(model, config, batch, length, packed)) - size(model), 0)


def residuals(model, config: ModelConfig, batch: int, length: int, packed: bool) -> list[jax.ShapeDtypeStruct]:
    """What `jax.vjp` of the model keeps, its parameters among it; the model may be abstract."""
    dtype, shape = (jnp.float32, (batch, length, config.input_dim)) if config.input_dim else (jnp.int32, (batch, length))
    tokens = jax.ShapeDtypeStruct(shape, dtype)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32) if packed else None
    source = tokens if config.kind == 'encoder_decoder' else None
    kinds = {name: kind for _, name, kind in config.side_inputs() if name != 'tokens'}
    inputs = {name: side_input(kind, batch, length) for name, kind in kinds.items()}
    run = lambda model, tokens, ids, source, inputs: model(tokens, segment_ids=ids, source=source, inputs=inputs).logits
    pulls = lambda *a: jax.vjp(lambda m: run(m, *a[1:]), a[0])[1]
    return jax.tree.leaves(jax.eval_shape(pulls, model, tokens, ids, source, inputs))


def human(number: float, unit: str = '') -> str:
    for scale, prefix in ((1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if abs(number) >= scale:
            return f'{number / scale:.3g} {prefix}{unit}'
    return f'{number:.3g} {unit}'.rstrip()


def report(found: Plan, platform: str, console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ('layer', 'mixer', 'parameters', 'train FLOPs/token', 'state/token', 'state/sequence', f'runs on {platform}'):
        table.add_column(column, justify='left' if column in ('mixer', f'runs on {platform}') else 'right')
    for layer in found.layers:
        table.add_row(
            str(layer.index),
            layer.name,
            human(layer.parameters),
            human(layer.train_flops),
            human(layer.state_bytes_token, 'B'),
            human(layer.state_bytes, 'B'),
            explanation.summary(list(layer.calls), platform),
        )
    console.print(table)
    refusals = dict.fromkeys(
        f'  {call.op}: {choice.impl} ({choice.platform}) refused: {choice.reason}'
        for layer in found.layers
        for call in layer.calls
        for choice in call.choices
        if choice.reason
    )
    if refusals:
        console.print('\nImplementations that refuse:\n' + '\n'.join(refusals), highlight=False)
    console.print(f'\nparameters              {human(found.parameters)}', highlight=False)
    console.print(f'training FLOPs a token  {human(found.train_flops)}', highlight=False)
    console.print(f'decode state, sequence  {human(found.state_bytes, "B")}', highlight=False)
    for what, amount in found.memory.items():
        console.print(f'memory: {what:<15} {human(amount, "B")}', highlight=False)
    console.print(f'memory: total           {human(sum(found.memory.values()), "B")} (all devices together)', highlight=False)
    for line in found.refused:
        console.print(f'REFUSED  {line}', style='bold red', highlight=False)


def main(argv) -> int:
    from rich.console import Console

    from attnx import config as config_lib
    from attnx import tasks
    from attnx.train import config as train_config
    from attnx.train import optim

    run = config_lib.build(train_config.Config, flags.FLAGS.config, 'config')
    if flags.FLAGS.topology:
        from attnx.train import topology

        return topology.command(run, flags.FLAGS.topology, flags.FLAGS.fit, Console(width=max(Console().width, 110)))
    task = tasks.outline(run.data.task, length=run.data.length, seed=run.data.seed)
    found = plan(
        train_config.completed(run.model, task),
        length=task.length,
        batch=run.data.batch_size,
        packed=task.packed,
        documents=task.documents,
        optimizer=lambda axes: optim.build(run.optim, run.steps, axes)[0],
        accumulate=run.step.accumulate,
        mesh=run.mesh,
        preset=run.sharding,
        context=run.context,
    )
    report(found, flags.FLAGS.platform, Console(width=max(Console().width, 110)))
    return 1 if found.refused else 0


if __name__ == '__main__':

    def _main(argv):
        try:
            return main(argv)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2

    app.run(_main, flags_parser=lambda argv: argv)  # parsed above
