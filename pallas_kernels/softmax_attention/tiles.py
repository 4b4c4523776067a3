"""Tile sizes by shape class: the table, and choices pinned in a file over it.

The figures behind the table are in README.md. `tune` writes the file; `pin` makes it hold in this process. Programs that
`jax.jit` has traced before keep the tiles that they were traced with, so pin first.
"""

import contextlib
import contextvars
import dataclasses
import json
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Forward:
    consumers: int  # consumer warpgroups, 64 query rows each
    keys: int  # keys a step
    stages: int  # key and value tiles in flight
    registers: tuple[int, int]  # consumer, producer
    turns: bool = True  # consumers issue in turns
    buffers: int = 2  # query tiles in flight
    polynomial: int = 0  # of the keys, whose exponentials leave the special function unit alone (`common.exp2`)


@dataclasses.dataclass(frozen=True)
class Backward:
    queries: int  # query rows a step; a block owns 128 keys
    stages: int  # query tiles in flight
    registers: tuple[int, int]


class Call(NamedTuple):
    """What the choice of forward tiles may depend on, of one call; widths padded as the kernel pads them."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    Hv: int
    masked: bool = True
    special: bool = False  # the score needs the special function unit too

    @property
    def name(self) -> str:
        return name(Forward, self.H, self.Hv, self.special)


_pinned: dict = {}
_within: contextvars.ContextVar[dict | None] = contextvars.ContextVar('within', default=None)
_asked: list[list] = []


def name(kind: type, H: int, Hv: int, special: bool = False) -> str:
    return f'{kind.__name__} H={H} Hv={Hv}' + ' special' * special


def forward(call: Call) -> Forward:
    for asked in _asked:
        asked.append(call)
    wide = max(call.H, call.Hv)
    if wide <= 64:
        default = Forward(3, 128, 2, (160, 32))
    elif wide <= 128:
        default = Forward(2, 128, 2, (240, 24), polynomial=24 if call.special else 0)
    else:
        default = Forward(2, 64, 2, (240, 24), buffers=1)
    return _chosen(call.name, default)


@contextlib.contextmanager
def asked():
    """Within: a list that gets every `Call` that is traced."""
    _asked.append([])
    try:
        yield _asked[-1]
    finally:
        _asked.pop()


def backward(H: int, Hv: int) -> Backward:
    default = Backward(128 if max(H, Hv) <= 64 else 64, 2, (240, 24))
    return _chosen(name(Backward, H, Hv), default)


def _chosen(key: str, default):
    return (_within.get() or _pinned).get(key, default)


@contextlib.contextmanager
def within(choices: dict):
    """Within, in this thread: these tiles instead of those pinned, unless there are none, for what is traced."""
    token = _within.set(choices)
    try:
        yield
    finally:
        _within.reset(token)


def to_json(choices: dict) -> str:
    """{name: `Forward` or `Backward`} as text."""
    return json.dumps({key: dataclasses.asdict(value) for key, value in sorted(choices.items())}, indent=1)


def from_json(text: str, source: str = 'tiles') -> dict:
    """Reads what `to_json` wrote.

    Raises:
      ValueError: no JSON; an entry that is none of these classes, or has other fields. `source` names it.
    """
    choices = {}
    for key, fields in json.loads(text).items():
        kind = {'Forward': Forward, 'Backward': Backward}.get(key.split()[0])
        try:
            if kind is None:
                raise TypeError('expected "Forward H=.. Hv=.." or "Backward H=.. Hv=.."')
            choices[key] = kind(**{**fields, 'registers': tuple(fields['registers'])})
        except (TypeError, KeyError) as error:
            raise ValueError(f'{source}: {key!r}: {error}') from error
    return choices


def pinned() -> dict:
    """What `pin` was last given."""
    return dict(_pinned)


def pin(choices: dict | None) -> None:
    """From now on these tiles hold instead of the table's; None or {}: the table again."""
    _pinned.clear()
    _pinned.update(choices or {})
