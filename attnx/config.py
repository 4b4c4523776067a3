"""ConfigDicts end here: below this file there are frozen dataclasses only.

`build` turns a mapping into a dataclass strictly: an unknown key, a wrong type or a missing choice raises a ValueError that
names the key, what was given and the nearest valid one. Nothing that is accepted is ignored.
"""

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from attnx.names import nearest


def build(cls: type, given: Any, path: str = 'config') -> Any:
    """Builds dataclass `cls` from a mapping, recursively.

    Raises:
      ValueError: the key at fault by its full path, what was given and what is valid.
    """
    if isinstance(given, cls):
        return given
    given = as_dict(given, path)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in given:
        if key not in fields:
            raise ValueError(f'unknown key {path}.{key}; {nearest(key, fields)}')
    hints = typing.get_type_hints(cls)
    values = {key: convert(hints[key], value, f'{path}.{key}') for key, value in given.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f'{path}: {error}') from None
    except ValueError as error:
        raise error if str(error).startswith('config') else ValueError(f'{path}: {error}') from None


def convert(kind: Any, value: Any, path: str) -> Any:
    """`value` as type `kind`: ints become floats, lists become tuples, mappings become dataclasses; nothing else changes."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return convert(next(a for a in args if a is not type(None)), value, path)
    if dataclasses.is_dataclass(kind):
        return build(kind, value, path)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is tuple or origin is tuple:
        if isinstance(value, str) or not isinstance(value, tuple | list):
            raise ValueError(f"{path} = {value!r}: expected a tuple, such as ('a', 'b')")
        inner = args[0] if args else Any
        return tuple(convert(inner, convert(tuple, v, path) if isinstance(v, list) else v, path) for v in value)
    if kind is dict or origin in (dict, Mapping):
        inner = args[1] if args else Any
        return {key: convert(inner, v, f'{path}.{key}') for key, v in as_dict(value, path).items()}
    plain = origin or kind
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise ValueError(f'{path} = {value!r}: expected {plain.__name__}, was given {type(value).__name__}')
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'{path} = {value!r}: expected a finite number')
    return value


def as_dict(given: Any, path: str) -> dict:
    if hasattr(given, 'to_dict'):  # ConfigDict, FrozenConfigDict
        given = given.to_dict()
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f'{path} = {given!r}: expected a mapping of keys to values')
    return dict(given)


def to_dict(value: Any) -> Any:
    """Dataclasses as plain nested dicts, tuples kept."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: to_dict(v) for k, v in value.items()}
    return value


def flatten(given: Mapping, prefix: str = '') -> dict[str, Any]:
    """`{'a': {'b': 1}}` -> `{'a.b': 1}`; empty mappings stay as leaves."""
    flat = {}
    for key, value in given.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f'{prefix}{key}.')
        else:
            flat[f'{prefix}{key}'] = value
    return flat


def put(nested: dict, name: str, value: Any) -> None:
    """Sets `name`, as `flatten` writes it, in nested settings; ValueError where a value stands in its way."""
    # Names have strings for keys only, where those of overrides are layers.
    parts = name.split('.')
    layer = [before in ('overrides', 'mlp_overrides') and part.isdecimal() for before, part in zip(['', *parts], parts)]
    *folders, last = (int(part) if is_layer else part for part, is_layer in zip(parts, layer))
    for folder in folders:
        nested = nested.setdefault(folder, {})
        if not isinstance(nested, dict):
            raise ValueError(f'{name}: {folder!r} is a value and can not hold settings')
    nested[last] = value


def to_json(config: Any) -> str:
    """The resolved config, flat and sorted: what a run writes beside its checkpoints."""
    return json.dumps(flatten(to_dict(config)), sort_keys=True, indent=1, default=str)


def from_json(cls: type, text: str) -> Any:
    """The inverse of `to_json`: the config, from JSON alone; nothing is executed.

    Raises:
      ValueError: no flat JSON object, or what `build` refuses.
    """
    try:
        flat = json.loads(text)
    except ValueError as error:
        raise ValueError(f'not JSON: {error}') from None
    if not isinstance(flat, dict):
        raise ValueError(f'expected a JSON object of settings, got {text[:40]!r}')
    nested: dict = {}
    for name, value in flat.items():
        put(nested, name, _tuples(value))
    return build(cls, nested)


def _tuples(value: Any) -> Any:
    """JSON has lists where configs have tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def fingerprint(config: Any) -> str:
    """Equal for equal configs, in every process."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]
