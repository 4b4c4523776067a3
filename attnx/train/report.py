"""What a run leaves behind: the plot of its losses, and the diagnosis of a failure."""

import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
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
    axis.set(xlabel='step', ylabel='loss (nats)', title=pathlib.Path(run_dir).name)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()
    path = pathlib.Path(run_dir) / 'loss.png'
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path


def census(value: Any) -> dict:
    """Shape, dtype, numbers of NaN and Inf, and the largest finite magnitude of an array."""
    array = np.asarray(value)
    wide = array.astype(np.float32) if array.dtype.kind not in 'fc' else array
    finite = wide[np.isfinite(wide)]
    return {
        'shape': list(array.shape),
        'dtype': str(array.dtype),
        'nan': int(np.isnan(wide).sum()),
        'inf': int(np.isinf(wide).sum()),
        'max_abs': float(np.abs(finite).max()) if finite.size else None,
    }


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


def bad_tensors(stage: str, named: Iterable[tuple[str, Any]], params: Mapping[str, Any], pick=min) -> list[dict]:
    """Entries for the tensors with NaN or Inf, in the order given; `pick` tells which bad layer names a stacked one."""
    found = []
    for name, value in named:
        array = np.asarray(value)
        if array.dtype.kind != 'f' and 'float' not in str(array.dtype):
            continue
        wrong = ~np.isfinite(array.astype(np.float32))
        if wrong.any():
            repeat = int(pick(np.argwhere(wrong)[:, 0])) if 'stacks/' in name and array.ndim else 0
            layer = layer_of(name, params, repeat)
            if layer is None and (match := re.search(r'layer_(\d+)$', name)):
                layer = int(match[1])
            found.append({'stage': stage, 'tensor': name, 'layer': layer} | census(array))
    return found


def diagnose(
    *,
    step: int,
    metrics: Mapping[str, Any],
    params: Mapping[str, jax.Array],
    batch: Mapping[str, Any],
    trace: Callable[[], Iterable[tuple[str, jax.Array]]] | None,
    gradients: Callable[[], Mapping[str, jax.Array]],
) -> dict:
    """Replays a failing step and finds where its first NaN or Inf is born.

    In order: the batch, the parameters, the activations layer by layer, the loss, the gradients from the last layer to
    the first (the order in which they are computed).

    Args:
      step: the step that failed; `params` and `batch` are those it began with.
      trace: yields (name, activation) from input to output; None where the model has none.
      gradients: the gradient of the same step.

    Returns:
      JSON-able: 'step', 'loss', 'grad_norm', 'first' (stage, tensor, layer, census), 'bad' (all), 'activations'
      (largest magnitude by name).
    """
    bad = bad_tensors('batch', batch.items(), params) + bad_tensors('parameter', params.items(), params)
    sizes = {}
    for name, value in trace() if trace else ():
        sizes[name] = census(value)['max_abs']
        bad += bad_tensors('activation', [(name, value)], params)
    if not math.isfinite(loss := float(metrics['objective'])):
        bad.append({'stage': 'loss', 'tensor': 'objective', 'layer': None, 'value': str(loss)})
    found = bad_tensors('gradient', reversed(gradients().items()), params, pick=max)
    # The head's come first, then layer by layer downwards, the embeddings' last.
    outside = lambda entry: 2 if 'embed' in entry['tensor'] else 0
    rank = lambda entry: (outside(entry), 0) if entry['layer'] is None else (1, -entry['layer'])
    bad += sorted(found, key=rank)
    return {
        'step': step,
        'loss': str(float(metrics['loss'])),
        'grad_norm': str(float(metrics['grad_norm'])),
        'first': bad[0] if bad else None,
        'bad': bad[:100],
        'activations': sizes,
    }


def failure(run_dir, diagnosis: dict) -> TrainingFailure:
    """Writes run_dir/failure.json and returns the error to raise."""
    path = pathlib.Path(run_dir) / FAILURE
    path.write_text(json.dumps(diagnosis, indent=1) + '\n')
    first = diagnosis['first']
    where = 'it did not happen again in the replay'
    if first:
        layer = '' if first['layer'] is None else f' of layer {first["layer"]}'
        where = f'first bad tensor: {first["stage"]} {first["tensor"]}{layer}'
        if 'nan' in first:
            where += f' ({first["nan"]} NaN, {first["inf"]} Inf in {first["dtype"]}{first["shape"]})'
    return TrainingFailure(
        f'step {diagnosis["step"]}: loss {diagnosis["loss"]}, gradient norm {diagnosis["grad_norm"]}; {where}. '
        f'Parameters are as before this step. Report: {path}'
    )
