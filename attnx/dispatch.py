"""Picks the implementation of an op and can say why.

Every op has the forms `reference` (obvious, any dtype, every derivative) and `xla` (no quadratic memory, runs anywhere), and
may have kernels in `pallas_kernels.table`. An explicit `impl` runs or raises with the reason; `auto` takes, on this process's
platform and those of `target`, the first kernel without a reason against it, else `xla`, and `record` tells which and why.
Kernels bring their own backward pass; forward mode goes through `xla`, and higher derivatives name `reference`.
"""

import contextlib
import contextvars
import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax

from attnx.derivatives import with_forward_mode
from attnx.names import nearest
from pallas_kernels import table

FORMS = ('reference', 'xla')


class Choice(NamedTuple):
    """One implementation of an op: on which platform it would run, and the reason against it (None: it runs)."""

    impl: str
    platform: str
    reason: str | None
    function: Callable | None = None
    schedule: str = ''  # how it would run, where shapes decide that


class Spread(NamedTuple):
    """How an op is spread over the devices of a mesh."""

    how: str  # what each device does and what is sent
    whole: tuple[str, ...] = ()  # what could not be cut, so that every device does all of it, and why


class Call(NamedTuple):
    """One op call as `record` saw it."""

    op: str
    impl: str  # as asked for
    choices: tuple[Choice, ...]
    spread: Spread | None = None  # None: one device

    def chosen(self, platform: str) -> Choice:
        """What runs on `platform`: 'cpu', 'cuda' or 'tpu'."""
        if self.impl != 'auto':
            return next(c for c in self.choices if c.impl == self.impl)
        return next(c for c in self.choices if c.reason is None and c.platform in (platform, 'any'))


_recorded: contextvars.ContextVar[list[Call] | None] = contextvars.ContextVar('recorded', default=None)
_spread: contextvars.ContextVar[Spread | None] = contextvars.ContextVar('spread', default=None)


@contextlib.contextmanager
def spread(how: Spread):
    """Within: recorded calls are said to run on parts cut like this."""
    token = _spread.set(how)
    try:
        yield
    finally:
        _spread.reset(token)


@contextlib.contextmanager
def record():
    """Within: every op call is appended to the list that is yielded; trace with `jax.eval_shape` to run nothing."""
    calls: list[Call] = []
    token = _recorded.set(calls)
    try:
        yield calls
    finally:
        _recorded.reset(token)


class Seen(NamedTuple):
    """One op call as `observe` saw it."""

    op: str
    inputs: Mapping[str, Any]  # operands and options by name
    out: Any


_observed: contextvars.ContextVar[tuple[list[Seen], tuple[str, ...]] | None] = contextvars.ContextVar('observed', default=None)


@contextlib.contextmanager
def observe(figures: Collection[str] = ()):
    """Within: what every op is given and returns is appended to the list that is yielded; tracers under `jax.jit`.

    Args:
      figures: names of what ops may return beside, for `observe` alone to see.
    """
    seen: list[Seen] = []
    token = _observed.set((seen, tuple(figures)))
    try:
        yield seen
    finally:
        _observed.reset(token)


def figures() -> tuple[str, ...]:
    """What `observe`, if it sees this call, asks of ops beside what their callers do."""
    return (_observed.get() or ((), ()))[1]


def shown(op: str, forms: Mapping[str, Callable], args: tuple, kwargs: Mapping[str, Any], call: Callable):
    """`call()`, as the op call that `observe` sees; the ops inside it are its own affair."""
    if (observed := _observed.get()) is None:
        return call()
    token = _observed.set(None)
    try:
        out = call()
    finally:
        _observed.reset(token)
    observed[0].append(Seen(op, dict(zip(inspect.signature(forms['reference']).parameters, args)) | dict(kwargs), out))
    return out


def kernels(op: str) -> tuple[table.Kernel, ...]:
    return tuple(row for row in table.KERNELS if row.op == op)


def choices(
    op: str,
    forms: Mapping[str, Callable],
    args: tuple,
    kwargs: Mapping[str, Any],
    rows: tuple[table.Kernel, ...],
) -> list[Choice]:
    """Every implementation of `op` for these arguments, in the order in which `auto` considers them."""
    found = []
    for row in rows:
        try:
            module = importlib.import_module(row.module)
        except ImportError as error:
            found.append(Choice(row.impl, row.platform, f'{row.module} does not import: {error}'))
            continue
        reason = module.unsupported(*args, **kwargs)
        schedule = '' if reason or not hasattr(module, 'schedule_of') else module.schedule_of(*args, **kwargs)
        found.append(Choice(row.impl, row.platform, reason, _differentiable(row, module, forms['xla']), schedule))
    found += [Choice(name, 'any', None, forms[name]) for name in ('xla', 'reference') if name in forms]
    return found


def _differentiable(row: table.Kernel, module, plain: Callable) -> Callable:
    """A kernel with the forward mode of `plain`."""
    message = f"{row.op}: impl {row.impl!r} has first-order derivatives only; impl='reference' has higher ones"

    def call(*args, **kwargs):
        arrays, of_arrays = _of_arrays(args, kwargs)
        return with_forward_mode(of_arrays(getattr(module, row.op)), of_arrays(plain), message)(*arrays)

    return call


def run(op: str, impl: str, forms: Mapping[str, Callable], args: tuple, kwargs: Mapping[str, Any]):
    """Runs `op` by `impl`.

    Raises:
      ValueError: `impl` is unknown, or refuses these arguments; the message holds the reason and what does run.
    """
    if _observed.get() is not None:
        return shown(op, forms, args, kwargs, lambda: run(op, impl, forms, args, kwargs))
    rows = kernels(op)
    valid = ['auto', *forms, *(row.impl for row in rows)]
    if impl not in valid:
        raise ValueError(f'{op}: unknown impl {impl!r}; {nearest(impl, valid)}')
    if (calls := _recorded.get()) is not None:
        calls.append(Call(op, impl, tuple(choices(op, forms, args, kwargs, rows)), _spread.get()))
    if impl in forms:
        return forms[impl](*args, **kwargs)
    if impl == 'auto':
        rows = tuple(row for row in rows if row.platform in _platforms())
        if not rows:
            return forms['xla'](*args, **kwargs)
    options = choices(op, forms, args, kwargs, rows)
    if impl != 'auto':
        chosen = next(c for c in options if c.impl == impl)
        if chosen.reason or chosen.function is None:
            able = [c.impl for c in options if c.reason is None]
            raise ValueError(f'{op}: impl {impl!r} refuses this call: {chosen.reason}; these run: {", ".join(able)}')
        return chosen.function(*args, **kwargs)
    by_platform = {}
    for choice in options:
        if choice.reason is None and choice.platform != 'any':
            by_platform.setdefault(choice.platform, choice.function)
    if not by_platform:
        return forms['xla'](*args, **kwargs)
    return _platform_dependent(by_platform, forms['xla'], args, dict(kwargs))


_targets: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar('targets', default=())


@contextlib.contextmanager
def target(*platforms: str):
    """Within: `auto` considers kernels of these platforms too ('cuda', 'tpu'), to compile for a machine that is not here.

    What `jax.jit` has traced before keeps its choice: trace a fresh function within.
    """
    token = _targets.set(platforms)
    try:
        yield
    finally:
        _targets.reset(token)


def _platforms() -> tuple[str, ...]:
    """Platforms whose kernels are worth tracing: every branch of `platform_dependent` is traced, run or not."""
    here = jax.default_backend()
    return ('cuda' if here == 'gpu' else here, *_targets.get())


def split_arrays(tree: Any) -> tuple[list, Callable]:
    """The array leaves of `tree` (abstract ones too), and the function that puts others in their place."""
    leaves, structure = jax.tree.flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')]

    def rebuild(arrays):
        full = list(leaves)
        for i, array in zip(where, arrays):
            full[i] = array
        return jax.tree.unflatten(structure, full)

    return [leaves[i] for i in where], rebuild


def _of_arrays(args: tuple, kwargs: Mapping[str, Any]) -> tuple[list, Callable]:
    """The arrays of a call, and what makes a function of `args` and `kwargs` one of them: the rest must stay static."""
    arrays, rebuild = split_arrays((args, dict(kwargs)))

    def of_arrays(function):
        def call(*arrays):
            a, k = rebuild(arrays)
            return function(*a, **k)

        return call

    return arrays, of_arrays


def _platform_dependent(branches, default, args, kwargs):
    arrays, of_arrays = _of_arrays(args, kwargs)
    by_platform = {platform: of_arrays(function) for platform, function in branches.items()}
    # What the branches keep for a backward pass is kept on every platform, so this one keeps nothing but its arguments.
    return jax.lax.platform_dependent(*arrays, default=jax.checkpoint(of_arrays(default)), **by_platform)
