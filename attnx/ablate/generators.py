"""Arms that follow from a rule, name -> settings of the base: a layer swapped at every depth, placements, grids."""

import dataclasses
import itertools
import random
from collections.abc import Callable, Mapping
from typing import Any

from attnx import config as config_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patterns:
    """Every placement of `count` layers of the second mixer among layers of the first."""

    mixers: tuple
    count: int

    def __post_init__(self):
        if len(self.mixers) != 2:
            raise ValueError(f'patterns places one mixer among another; mixers are {self.mixers}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random:
    """`num` different combinations of a grid."""

    grid: Mapping
    num: int
    seed: int = 0


def swapped_in(given) -> tuple[str, str]:
    """What a swap's arms call the mixer, and its name in the model: `given` is a name, or a mixer's settings."""
    return (given, given) if isinstance(given, str) else (given['kind'], f'{given["kind"]} swapped in')


def _swap(given, base: Mapping) -> dict[str, dict]:
    if not isinstance(given, str) and 'kind' not in config_lib.as_dict(given, 'generate.swap'):
        raise ValueError(f"generate: swap takes a mixer's name, or its settings with its kind; given {given!r}")
    name, put = swapped_in(given)
    others, pattern = dict(base['model'].get('overrides') or {}), base['model']['pattern']
    names = {i: others.get(i, pattern[i % len(pattern)]) for i in range(base['model']['num_layers'])}
    change = {} if name == put else {'model.mixers': {**(base['model'].get('mixers') or {}), put: given}}
    return {f'layer {i}: {name}': {'model.overrides': {**others, i: put}, **change} for i in names if names[i] != put}


def _patterns(given, base: Mapping) -> dict[str, dict]:
    asked, layers, found = config_lib.build(Patterns, given, 'generate.patterns'), base['model']['num_layers'], {}
    if not 0 <= asked.count <= layers:
        raise ValueError(f'generate: patterns places {asked.count} layers among {layers}')
    for chosen in itertools.combinations(range(layers), asked.count):
        pattern = tuple(asked.mixers[i in chosen] for i in range(layers))
        found[' '.join(pattern)] = {'model.pattern': pattern}
    return found


def _combinations(grid: Any) -> list[dict]:
    grid = config_lib.as_dict(grid, 'generate.grid')
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def _by_settings(changes: list[dict]) -> dict[str, dict]:
    return {', '.join(f'{k.rsplit(".", 1)[-1]}={v}' for k, v in c.items()): c for c in changes}


def _grid(given, base: Mapping) -> dict[str, dict]:
    return _by_settings(_combinations(given))


def _random(given, base: Mapping) -> dict[str, dict]:
    asked = config_lib.build(Random, given, 'generate.random')
    combinations = _combinations(asked.grid)
    if not 0 <= asked.num <= len(combinations):
        raise ValueError(f'generate: random asks for {asked.num} of {len(combinations)} combinations')
    return _by_settings(random.Random(asked.seed).sample(combinations, asked.num))


GENERATORS: dict[str, Callable[[Any, Mapping], dict[str, dict]]] = {
    'swap': _swap, 'patterns': _patterns, 'grid': _grid, 'random': _random,
}  # fmt: skip


def generated(entry: Mapping, base: Mapping) -> dict[str, dict]:
    """Arms of one generator.

    {'swap': 'gqa'}: for every layer, the base with that layer swapped; {'swap': {'kind': 'gqa', …}} for one with settings.
    {'patterns': {'mixers': ('gla', 'gqa'), 'count': 2}}: see `Patterns`. {'grid': {setting: values, …}}: every combination.
    {'random': {'grid': …, 'num': 8, 'seed': 0}}: see `Random`.

    Raises:
      ValueError: an unknown generator, or key of one.
    """
    if len(entry) != 1 or next(iter(entry)) not in GENERATORS:
        raise ValueError(f'generate: {dict(entry)!r} is not one of {", ".join(GENERATORS)} with what it takes')
    ((kind, given),) = entry.items()
    return GENERATORS[kind](given, base)
