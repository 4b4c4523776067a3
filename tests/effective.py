"""The law `effective`: every field of a mechanism's Config changes what the mechanism does, or is refused.

For each field other values are tried in the example config; the output, auxiliary values or the decoding states must
differ, packed documents and dropout included. Nothing is compiled: the mechanisms run op by op.
"""

import dataclasses
import re
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnx.nn import to_flat
from attnx.spec import Chain
from tests.laws import BATCH, LENGTH, WIDTH, Case, case, positions_of

PREFILL = 17
# Other values where none can be made up, of fields that many mechanisms share.
VALUES = {'masks': (('window', 3),), 'scores': (('softcap', 0.5),)}
# field -> settings under which it takes effect, of fields that many mechanisms share; see Spec.variants.
SETTINGS = {
    'rope.scaling': {'rope.factor': 2.0, 'rope.original_length': 8},
    'rope.factor': {'rope.scaling': 'linear', 'rope.factor': 2.0},
    'rope.original_length': {'rope.scaling': 'yarn', 'rope.factor': 4.0, 'rope.original_length': 16},
}


def ignored(name: str) -> list[str]:
    """Fields of which every value that is accepted gives what the example config gives."""
    here, found = case(name), []
    spec = here.spec
    known = dict.fromkeys(path for config in spec.examples for path, _ in fields(config))
    for path in known:
        accepted = changed = False
        for number, config in enumerate(spec.examples):
            if changed or not any(p == path for p, _ in fields(config)):
                continue
            settings = {**SETTINGS, **spec.variants}.get(path, {})
            own = settings.get(path)
            base = config
            for other, value in settings.items():
                if other != path:
                    base = replace(base, other, value, quiet=True)
            try:
                base = dataclasses.replace(base)
            except ValueError:
                base = config
            for value in [own] if path in settings else alternatives(base, path):
                try:
                    trial = replace(base, path, value)
                    changed = differs(name, put(spec.examples, number, base), put(spec.examples, number, trial))
                except ValueError:
                    continue
                accepted = True
                if changed:
                    break
        if accepted and not changed:
            found.append(path)
    return found


def put(examples: tuple, number: int, config) -> tuple:
    return (*examples[:number], config, *examples[number + 1 :])


def fields(config, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """('rope.base', 10000.0) …, those of nested dataclasses one by one."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f'{prefix}{field.name}.')
        else:
            yield prefix + field.name, value


def get(config, path: str):
    for part in path.split('.'):
        config = getattr(config, part)
    return config


def replace(config, path: str, value, quiet: bool = False):
    """The config with another value; `quiet` does not check it, as several are being set."""
    first, _, rest = path.partition('.')
    inner = replace(getattr(config, first), rest, value, quiet) if rest else value
    if not quiet:
        return dataclasses.replace(config, **{first: inner})
    copy = object.__new__(type(config))
    for field in dataclasses.fields(config):
        object.__setattr__(copy, field.name, inner if field.name == first else getattr(config, field.name))
    return copy


def alternatives(config, path: str) -> list:
    """Other values of a field, by its type; strings from the message that refuses a wrong one."""
    value = get(config, path)
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [v for v in dict.fromkeys((value + 1, 2 * value, value // 2, value - 1, 1, 2, 3, 4, 8)) if v != value]
    if isinstance(value, float):
        return [v for v in dict.fromkeys((value + 0.5, 2 * value, value / 2, 0.1, 0.5, 2.0)) if v != value]
    if isinstance(value, str):
        try:
            replace(config, path, '?')
        except ValueError as error:
            valid = re.search(r'valid: (.*)', str(error))
            return [v for v in valid.group(1).split(', ') if v != value] if valid else []
        return ['other']
    if path in VALUES:
        return [VALUES[path]]
    raise AssertionError(f'no other value of {path} = {value!r} can be made up: give one in Spec.variants')


def differs(name: str, examples: tuple, others: tuple) -> bool:
    """Do two chains of configs differ in any form or part?"""
    forms = [case(name)]
    if forms[0].spec.causal == 'both':
        forms.append(case(f'{name}-bidirectional'))
    for form in forms:
        for part in (forward, decode):
            if distinct(part(form, examples), part(form, others)):
                return True
    return False


def distinct(a, b) -> bool:
    """Not bit-equal: what runs the same operations on the same numbers is."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return True
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
    return any(x.shape != y.shape or not np.array_equal(x, y, equal_nan=True) for x, y in pairs)


def _built(form: Case, examples: tuple):
    """The module, with the same noise on parameters of the same name and shape."""
    dims = dataclasses.replace(form.dims, num_layers=4)
    mixers = [form.spec.build(config, dims, rngs=nnx.Rngs(0)) for config in examples]
    module = mixers[0] if len(mixers) == 1 else Chain(mixers)
    moved = [
        v + 0.1 * np.random.default_rng(zlib.crc32(k.encode())).standard_normal(v.shape).astype(v.dtype)
        for k, v in to_flat(module).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(module), moved)


def _memo(function):
    def run(form: Case, examples: tuple):
        known = form.__dict__.setdefault('_effects', {})
        key = function.__name__, examples
        if key not in known:
            with jax.disable_jit():
                try:
                    known[key] = jax.tree.map(np.asarray, function(form, examples))
                except ValueError as error:
                    known[key] = error
        if isinstance(known[key], ValueError):
            raise known[key]
        return known[key]

    return run


@_memo
def forward(form: Case, examples: tuple):
    """Outputs and auxiliary values of two packed documents, with dropout."""
    ids = np.repeat([[1] * 15 + [2] * (LENGTH - 15)], BATCH, axis=0).astype(np.int32)
    ctx = form.context(form.x, jnp.asarray(ids), positions_of(ids))
    out = _built(form, examples)(jnp.asarray(form.x), dataclasses.replace(ctx, key=jax.random.key(1)))
    assert out.y.shape == (BATCH, LENGTH, WIDTH)
    return out.y, dict(out.aux)


@_memo
def decode(form: Case, examples: tuple):
    """Outputs and states of a prompt and a step; None where nothing can be decoded."""
    module = _built(form, examples)
    state = module.init_state(BATCH, LENGTH, jnp.float32)
    if state is None or form.spec.state == 'none' or not form.dims.causal:
        return ()
    found, at = [], 0
    for count in (PREFILL, 1):
        x = form.x[:, at : at + count]
        y, state = tuple(module(jnp.asarray(x), form.context(x, None), state))[:2]
        found.append((y, state))
        at += count
    return found
