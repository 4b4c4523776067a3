"""What goes on inside a model: the tensors of a forward pass by name, and figures per layer and head.

Both come from `Program.trace`, which runs layer after layer without a scan, under `dispatch.observe`, which shows what every
op is given and returns. So a training step pays nothing for them, and they hold for every mechanism made of these ops.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnx import dispatch
from attnx.ops import statistics
from pallas_kernels.statistics import Statistics

# Operands of ops that are [B, T, heads, …]. States are [B, heads, …].
PER_HEAD = ('query', 'key', 'value', 'beta', 'log_decay', 'out')


class Tensor(NamedTuple):
    """`name` is 'layer_3', or of an op's operand 'layer_3/softmax_attention/query'; `heads` is the axis of heads."""

    name: str
    value: jax.Array
    heads: int | None = None


def _calls(trace: Iterator, figures: Collection[str] = ()) -> Iterator[tuple[str, Any, list[tuple[str, dispatch.Seen]]]]:
    """(name, activation, [(name of an op call on the way to it, the call)]) of a trace, in order."""
    with dispatch.observe(figures) as seen:
        for name, value in trace:
            calls = []
            for call in seen:
                twins = sum(c.op == call.op for _, c in calls)
                calls.append((f'{name}/{call.op}' + (f'_{twins + 1}' if twins else ''), call))
            seen.clear()
            yield name, value, calls


def tensors(trace: Iterator) -> Iterator[Tensor]:
    """Every floating tensor that a trace shows, in the order in which it is made: op by op, then the layer's output."""
    for name, value, calls in _calls(trace):
        for where, call in calls:
            out, *rest = call.out if isinstance(call.out, tuple) else (call.out,)
            state = rest[0] if rest and call.op != 'softmax_attention' else None  # there it is the log-sum-exp
            wide = 4 if call.op != 'short_conv' else 0
            for part, array in {**call.inputs, 'out': out, 'state': state}.items():
                if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jnp.floating):
                    headed = wide and part in PER_HEAD and array.ndim >= 3
                    yield Tensor(f'{where}/{part}', array, 2 if headed else 1 if wide and part == 'state' else None)
        yield Tensor(name, value)


def _softmax(call: dispatch.Seen) -> Mapping[str, jax.Array]:
    given = {name: call.inputs[name] for name in ('query', 'key', 'mask', 'score', 'scale')}
    if call.inputs['return_stats']:
        return statistics.of_op(call.out, **given)
    return statistics.softmax(**given, sinks=call.inputs['sinks'])  # on a mesh the op has none


FIGURES: dict[str, Callable[[dispatch.Seen], Mapping[str, jax.Array]]] = {
    'softmax_attention': _softmax,
    'gated_linear': lambda call: statistics.recurrence(call.inputs['log_decay'], call.out[1]),
    'delta_rule': lambda call: statistics.recurrence(call.inputs['log_decay'], call.out[1]),
}


def figures(
    trace: Iterator, only: Collection[str] = FIGURES, names: Collection[str] = Statistics._fields
) -> dict[str, jax.Array]:
    """'layer_3/softmax_attention/entropy' -> float32 [heads], for every call of an op of `only`.

    names: which figures ops of softmax attention are asked for.
    """
    found = {}
    for _, _, calls in _calls(trace, names):
        for where, call in calls:
            if call.op in only:
                found |= {f'{where}/{name}': value for name, value in FIGURES[call.op](call).items()}
    return found


def update_ratios(before: Mapping[str, jax.Array], after: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """'update_ratio/<parameter>' -> |after - before| / |before|, one number a layer for stacked parameters; 0 / 0 is 0."""

    def norm(name, value):
        axes = tuple(range(1 if 'stacks/' in name else 0, value.ndim))
        return jnp.sqrt(jnp.sum(jnp.square(value.astype(jnp.float32)), axis=axes))

    found = {}
    for name, old in before.items():
        change, size = norm(name, after[name].astype(jnp.float32) - old.astype(jnp.float32)), norm(name, old)
        found[f'update_ratio/{name}'] = jnp.where(change > 0, change / size, 0)
    return found
