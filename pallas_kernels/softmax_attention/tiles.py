"""Tile sizes by shape class: the table, and choices pinned in a file over it.

The figures behind the table are in README.md. `tune` writes the file; `pin` makes it hold in this process. Programs that
`jax.jit` has traced before keep the tiles that they were traced with, so pin first.
"""

import dataclasses
import json


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


_pinned: dict = {}


def name(kind: type, H: int, Hv: int, special: bool = False) -> str:
    return f'{kind.__name__} H={H} Hv={Hv}' + ' special' * special


def forward(H: int, Hv: int, special: bool = False) -> Forward:
    """Tiles for head widths H and Hv (multiples of 64); `special`: the score needs the special function unit too."""
    wide = max(H, Hv)
    if wide <= 64:
        default = Forward(3, 128, 2, (160, 32))
    elif wide <= 128:
        default = Forward(2, 128, 2, (240, 24))
    else:
        default = Forward(2, 64, 2, (240, 24), buffers=1)
    return _pinned.get(name(Forward, H, Hv, special), default)


def backward(H: int, Hv: int) -> Backward:
    default = Backward(128 if max(H, Hv) <= 64 else 64, 2, (240, 24))
    return _pinned.get(name(Backward, H, Hv), default)


def save(path: str, choices: dict) -> None:
    """Writes {name: `Forward` or `Backward`} as JSON."""
    with open(path, 'w') as file:
        json.dump({key: dataclasses.asdict(value) for key, value in sorted(choices.items())}, file, indent=1)


def load(path: str) -> dict:
    """Reads what `save` wrote.

    Raises:
      ValueError: an entry that is none of these classes, or has other fields.
    """
    with open(path) as file:
        found = json.load(file)
    choices = {}
    for key, fields in found.items():
        kind = {'Forward': Forward, 'Backward': Backward}.get(key.split()[0])
        try:
            if kind is None:
                raise TypeError('expected "Forward H=.. Hv=.." or "Backward H=.. Hv=.."')
            choices[key] = kind(**{**fields, 'registers': tuple(fields['registers'])})
        except (TypeError, KeyError) as error:
            raise ValueError(f'{path}: {key!r}: {error}') from error
    return choices


def pin(choices: dict | None) -> None:
    """From now on these tiles hold instead of the table's; None or {}: the table again."""
    _pinned.clear()
    _pinned.update(choices or {})
