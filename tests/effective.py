"""The law `effective`: every field of a mechanism's Config changes what the mechanism computes, or is refused.

For each field other values are tried in the example config. What it computes is traced, from the initialisation to outputs,
auxiliary values and decoding states, with packed documents and dropout; what no result depends on is taken out, and the
rest is compared, constants included: a field that is ignored leaves the same program. Nothing is compiled or run.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnx.spec import Chain
from tests.laws import BATCH, LENGTH, Case, case, positions_of

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
    """Fields of which every value that is accepted computes what the example config computes."""
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
    """Do two chains of configs compute other things, in any form or part?"""
    forms = [case(name)]
    if forms[0].spec.causal == 'both':
        forms.append(case(f'{name}-bidirectional'))
    return any(
        distinct(program(form, part, examples), program(form, part, others))
        for form in forms
        for part in ((forward, decode) if form.dims.causal and form.spec.state != 'none' else (forward,))
    )


def distinct(a, b) -> bool:
    (text, consts), (other_text, other_consts) = a, b
    return (
        text != other_text
        or len(consts) != len(other_consts)
        or not all(np.array_equal(x, y) for x, y in zip(consts, other_consts))
    )


def program(form: Case, part, examples: tuple):
    """(text of the operations that results depend on, constants that they read)."""
    known = form.__dict__.setdefault('_programs', {})
    key = part.__name__, examples
    if key not in known:
        try:
            known[key] = _program(lambda: part(form, examples))
        except ValueError as error:
            known[key] = error
    if isinstance(known[key], ValueError):
        raise known[key]
    return known[key]


def _program(function):
    closed, shapes = jax.make_jaxpr(function, return_shape=True)()
    jaxpr, needed, kept = closed.jaxpr, set(), []
    variables = lambda atoms: (v for v in atoms if not hasattr(v, 'val'))  # no literals
    needed.update(variables(jaxpr.outvars))
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            kept.append(eqn)
            needed.update(variables(eqn.invars))
    consts = [(v, c) for v, c in zip(jaxpr.constvars, closed.consts) if v in needed]
    jaxpr = jaxpr.replace(eqns=kept[::-1], constvars=[v for v, _ in consts])
    text = re.sub(r'0x[0-9a-f]+', '', f'{jaxpr} {jax.tree.structure(shapes)}')  # without addresses of functions
    return text, [np.asarray(c) for _, c in consts]


def build(form: Case, examples: tuple):
    dims = dataclasses.replace(form.dims, num_layers=4)
    mixers = [form.spec.build(config, dims, rngs=nnx.Rngs(0)) for config in examples]
    return mixers[0] if len(mixers) == 1 else Chain(mixers)


def forward(form: Case, examples: tuple):
    """Outputs and auxiliary values of two packed documents, with dropout."""
    ids = jnp.repeat(jnp.array([[1] * 15 + [2] * (LENGTH - 15)], jnp.int32), BATCH, axis=0)
    ctx = form.context(jnp.asarray(form.x), ids, positions_of(ids))
    ctx = dataclasses.replace(ctx, step=jnp.int32(3))  # for what alternates
    out = build(form, examples)(jnp.asarray(form.x), dataclasses.replace(ctx, key=jax.random.key(1)))
    return out.y, dict(out.aux)


def decode(form: Case, examples: tuple):
    """Outputs and states of a prompt and a step; nothing where nothing can be decoded."""
    module, found, at = build(form, examples), [], 0
    state = module.init_state(BATCH, LENGTH, jnp.float32)
    for count in (PREFILL, 1) if state is not None else ():
        x = jnp.asarray(form.x[:, at : at + count])
        y, state = tuple(module(x, form.context(x, None), state))[:2]
        found.append((y, state))
        at += count
    return found
