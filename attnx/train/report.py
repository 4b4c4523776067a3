"""What a run leaves behind: the plot of its losses, and the diagnosis of a failure."""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnx.train import metrics

FAILURE = 'failure.json'


class TrainingFailure(RuntimeError):
    """The loss or a gradient became NaN or Inf; the message names the first bad tensor and the report's file."""


def plot(run_dir) -> pathlib.Path:
    """Draws run_dir/loss.png: training and validation loss by step."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    entries = metrics.read(run_dir)
    figure, axis = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for split, style in (('train', {'linewidth': 1, 'alpha': 0.8}), ('eval', {'marker': 'o', 'markersize': 3})):
        points = [(e['step'], e['loss']) for e in entries if e['split'] == split and isinstance(e.get('loss'), float)]
        if points:
            axis.plot(*zip(*points), label={'train': 'training', 'eval': 'validation'}[split], **style)
    axis.set(xlabel='step', ylabel='loss (nats)')
    axis.set_title(metrics.printable(pathlib.Path(run_dir).name), parse_math=False)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()
    path = pathlib.Path(run_dir) / 'loss.png'
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Census:
    """What is not finite in one array: small arrays, so that they can leave a jitted function and any mesh."""

    nan: Any  # how many
    inf: Any
    max_abs: Any  # largest finite magnitude; -1: nothing is finite
    along: list  # per axis, bool [its size]: where something is not finite
    name: str = dataclasses.field(metadata={'static': True})
    shape: tuple = dataclasses.field(metadata={'static': True})
    dtype: str = dataclasses.field(metadata={'static': True})
    heads: int | None = dataclasses.field(default=None, metadata={'static': True})  # axis of heads


def census(name: str, value: Any, heads: int | None = None) -> Census | None:
    """The census of an array of floats; None of others. Traceable."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return None
    wide = jnp.asarray(value).astype(jnp.float32)
    wrong = ~jnp.isfinite(wide)
    return Census(
        nan=jnp.sum(jnp.isnan(wide)),
        inf=jnp.sum(jnp.isinf(wide)),
        max_abs=jnp.max(jnp.where(wrong, -1, jnp.abs(wide)), initial=-1),
        along=[jnp.any(wrong, axis=tuple(a for a in range(wide.ndim) if a != axis)) for axis in range(wide.ndim)],
        name=name,
        shape=tuple(value.shape),
        dtype=str(value.dtype),
        heads=heads,
    )


def censuses(named: Mapping[str, Any]) -> list[Census]:
    return [found for name, value in named.items() if (found := census(name, value)) is not None]


def _where(flags: Any, limit: int = 64) -> list[int]:
    return np.flatnonzero(np.asarray(flags))[:limit].tolist()


def layer_of(name: str, params: Mapping[str, Any], repeat: int = 0) -> int | None:
    """The layer, counted from 0, of a parameter '…stacks/<stack>/layers/<place>/…' in repeat `repeat` of its stack.

    `params` maps every name to its stacked array: repeats and places before it count. None outside the stacks.
    """
    match = re.search(r'^(.*)stacks/(\d+)/layers/(\d+)/', name)
    if not match:
        return None
    prefix, stack, place = match[1], int(match[2]), int(match[3])

    def size(number):  # (repeats, layers in the unit)
        head = f'{prefix}stacks/{number}/layers/'
        inside = [n for n in params if n.startswith(head)]
        places = [int(n[len(head) :].split('/')[0]) for n in inside]
        return (params[inside[0]].shape[0], 1 + max(places)) if inside else (0, 0)

    before = sum(math.prod(size(number)) for number in range(stack))
    return before + repeat * size(stack)[1] + place


def bad_tensors(stage: str, found: Iterable[Census], shapes: Mapping[str, Any], pick=min) -> list[dict]:
    """Entries for the tensors with NaN or Inf, in the order given; `pick` tells which bad layer names a stacked one."""
    bad = []
    for one in found:
        if not (int(one.nan) or int(one.inf)):
            continue
        stacked = stage in ('parameter', 'gradient') and 'stacks/' in one.name
        layer = layer_of(one.name, shapes, pick(_where(one.along[0])) if stacked else 0)
        if layer is None and (match := re.search(r'layer_(\d+)', one.name)):
            layer = int(match[1])
        entry = {'stage': stage, 'tensor': one.name, 'layer': layer, 'shape': list(one.shape), 'dtype': one.dtype}
        entry |= {'nan': int(one.nan), 'inf': int(one.inf), 'max_abs': float(one.max_abs) if one.max_abs >= 0 else None}
        if stage in ('batch', 'activation') and one.along:
            entry['rows'] = _where(one.along[0])
        if one.heads is not None:
            entry['heads'] = _where(one.along[one.heads])
        bad.append(entry)
    return bad


def diagnose(
    *,
    step: int,
    metrics: Mapping[str, Any],
    shapes: Mapping[str, Any],
    params: Iterable[Census],
    batch: Iterable[Census],
    trace: Callable[[], Iterable[Census]],
    gradients: Callable[[], Iterable[Census]],
    rows: list[int] | None = None,
) -> dict:
    """Replays a failing step and finds where its first NaN or Inf is born.

    In order: the batch, the parameters, the activations from input to output (operands and results of every op, then
    each layer's output), the loss, the gradients from the last layer to the first (the order in which they are computed).

    Args:
      step: the step that failed; `params` and `batch` are those it began with.
      shapes: parameter name -> anything with the shape of its stacked array.
      trace: the activations, from input to output.
      gradients: the gradient of the same step.
      rows: training rows of which the batch was made.

    Returns:
      JSON-able: 'step', 'loss', 'grad_norm', 'first' (stage, tensor, layer, census, rows of the batch and heads where
      known), 'bad' (all), 'training_rows' (of the rows that are bad, or of the whole batch), 'activations' (largest
      magnitude by name).
    """
    bad = bad_tensors('batch', batch, shapes) + bad_tensors('parameter', params, shapes)
    sizes = {}
    for one in trace():
        sizes[one.name] = float(one.max_abs) if one.max_abs >= 0 else None
        bad += bad_tensors('activation', [one], shapes)
    if not math.isfinite(loss := float(metrics['objective'])):
        bad.append({'stage': 'loss', 'tensor': 'objective', 'layer': None, 'value': str(loss)})
    found = bad_tensors('gradient', reversed(list(gradients())), shapes, pick=max)
    # The head's come first, then layer by layer downwards, the embeddings' last.
    outside = lambda entry: 2 if 'embed' in entry['tensor'] else 0
    rank = lambda entry: (outside(entry), 0) if entry['layer'] is None else (1, -entry['layer'])
    bad += sorted(found, key=rank)
    first = bad[0] if bad else None
    if rows is not None and first and 'rows' in first:
        rows = [rows[row] for row in first['rows']]
    return {
        'step': step,
        'loss': str(float(metrics['loss'])),
        'grad_norm': str(float(metrics['grad_norm'])),
        'first': first,
        'training_rows': rows,
        'bad': bad[:100],
        'activations': sizes,
    }


def _few(numbers: list[int]) -> str:
    return ', '.join(map(str, numbers[:4])) + (f' and {len(numbers) - 4} more' if len(numbers) > 4 else '')


def failure(run_dir, diagnosis: dict) -> TrainingFailure:
    """Writes run_dir/failure.json and returns the error to raise."""
    path = pathlib.Path(run_dir) / FAILURE
    if jax.process_index() == 0:
        path.write_text(json.dumps(diagnosis, indent=1) + '\n')
    first = diagnosis['first']
    where = 'it did not happen again in the replay'
    if first:
        layer = '' if first['layer'] is None else f' of layer {first["layer"]}'
        where = f'first bad tensor: {first["stage"]} {first["tensor"]}{layer}'
        if first.get('heads'):
            where += f', heads {_few(first["heads"])}'
        if 'nan' in first:
            where += f' ({first["nan"]} NaN, {first["inf"]} Inf in {first["dtype"]}{first["shape"]})'
    if diagnosis['training_rows']:
        where += f'; training rows {_few(diagnosis["training_rows"])}'
    return TrainingFailure(
        f'step {diagnosis["step"]}: loss {diagnosis["loss"]}, gradient norm {diagnosis["grad_norm"]}; {where}. '
        f'Parameters are as before this step. Report: {path}'
    )
