"""A training step on GPUs that are not here, from shapes alone: memory, work and traffic by rules of thumb."""

import collections
import math

import jax
from flax import nnx

from attnx import models, sharding, tasks
from attnx import plan as plan_lib
from attnx.train import chips
from attnx.train import optim as optim_lib
from attnx.train.chips import Topology
from attnx.train.compiled import share
from attnx.train.config import Config
from attnx.train.program import program


def found(run: Config, task: tasks.Task, where: Topology) -> dict:
    """Memory, work and traffic by rules of thumb; see the notes that it returns."""
    model, sizes, accumulate = run.model, run.mesh, run.step.accumulate
    mesh, rules = sharding.abstract_mesh(sizes), sharding.rules(run.sharding)
    made = program(model, packed=task.packed)
    transform, _ = optim_lib.build(run.optim, run.steps, made.axes)
    lie = sharding.param_shardings(mesh, run.sharding, made.axes, {n: s.shape for n, s in made.shapes.items()})
    place = lambda shapes, lie: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, lie)
    parameters = share(place(made.shapes, lie))
    opt = jax.eval_shape(transform.init, made.shapes)
    optimizer = share(place(opt, optim_lib.state_shardings(transform, made.shapes, lie, mesh)))
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
        rate = chips.LINKS * (where.chip.link if inner <= chips.NODE else chips.NETWORK)
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
    notes += [f'nodes of {chips.NODE} GPUs by NVLink, {chips.NETWORK / 1e9:.0f} GB/s a GPU between them']
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
        'local': chips.seconds_of([(flops, moved, False)], where.chip),
        'exchanges': exchanges,
        'notes': notes,
    }
