"""Nothing that a config accepts is silently ignored: every field of every Config changes something, or is refused."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import models
from attnx.train import optim, step

TRIED = {  # where neither a number near the default nor a word of the comment is another valid value
    'masks': [(('window', 3),)],
    'scores': [(('softcap', 3.0),)],
    'pattern': [('gla',)],
    'overrides': [{0: 'gla'}],
    'mixers': [{'gqa': {'kind': 'gqa', 'num_heads': 2}}],
    'cross': ['mha'],
    'dtype': ['bfloat16'],
    'impl': ['reference'],
    'aux_weights': [{'balance_loss': 0.5}],
    'no_decay': [('*kernel*',)],
    'adam_learning_rate': [1e-4],
    'clip_norm': [None],
    'decay': [7],
}


def others(cls, field: str, value):
    """Values other than `value` that a field may take: numbers near it, and the words of the comment beside a string."""
    if field in TRIED:
        return TRIED[field]
    if isinstance(value, bool) or field == 'tie_embeddings':
        return [value is False]
    if isinstance(value, int):
        return [n for n in (value + 1, 2 * value, value // 2, value - 1, 0, 1, 2, 3, 4, 8) if n != value]
    if isinstance(value, float):
        return [x for x in (value / 2, 2 * value, 0.5, 0.25, 1.5, 0.0) if x != value]
    source = ''.join(inspect.getsource(c) for c in cls.__mro__[:-1])
    comment = re.search(rf'^ *{field}: .* # (.*)$', source, re.M)
    return [word for word in re.findall(r'\w+', comment[1]) if word != value] if comment else []


def replaced(base, field: str, values) -> list:
    """`base` with each of the values that its class accepts."""
    found = []
    for value in values:
        try:
            found.append(dataclasses.replace(base, **{field: value}))
        except ValueError:
            continue
    return found


def changes(base):
    """(field's path, configs in which it alone differs), fields of configs inside included."""
    for f in dataclasses.fields(base):
        value = getattr(base, f.name)
        if dataclasses.is_dataclass(value):
            for path, inner in changes(value):
                yield f'{f.name}.{path}', replaced(base, f.name, inner)
        else:
            yield f.name, replaced(base, f.name, others(type(base), f.name, value))


def program(function, *arguments) -> str:
    """All that a function computes, its constants included."""
    jaxpr = jax.make_jaxpr(function)(*arguments)
    return f'{jaxpr}{[np.asarray(c).tobytes() for c in jaxpr.consts]}'


def without_effect(base, trace):
    """Fields some value of which was accepted, while none changed what `trace` computes."""
    want, silent = trace(base), []
    for path, configs in changes(base):
        accepted, seen = False, False
        for config in configs:
            try:
                got = trace(config)
            except ValueError:
                continue
            accepted = True
            if seen := got != want:
                break
        if accepted and not seen:
            silent.append(path)
    return silent


KEY = jax.eval_shape(lambda: jax.random.key(0))
IDS = jax.ShapeDtypeStruct((2, 16), jnp.int32)


MODELS = {
    'decoder': {'positions': 'learned', 'max_length': 32},
    'encoder': {'kind': 'encoder', 'num_classes': 3, 'input_dim': 4, 'vocab_size': 0, 'tie_embeddings': False},
    'encoder_decoder': {'kind': 'encoder_decoder', 'encoder': models.StackConfig(num_layers=1)},
}


@pytest.mark.parametrize('name', MODELS)
def test_models(name):
    base = models.ModelConfig(**({'vocab_size': 12, 'width': 16, 'num_layers': 1, 'pattern': ('gqa',)} | MODELS[name]))

    def trace(config):
        def run(tokens, source, ids, key):
            model = models.build(config, rngs=nnx.Rngs(0))
            both = {'source': source} if config.kind == 'encoder_decoder' else {}

            return model(tokens, segment_ids=ids, key=key, **both).logits, model

        shape, dtype = ((2, 16, config.input_dim), jnp.float32) if config.input_dim else ((2, 16), jnp.int32)
        tokens = jax.ShapeDtypeStruct(shape, dtype)
        return program(run, tokens, tokens, IDS, KEY) + str(config.dims(causal=True, num_layers=1).max_length)

    assert not without_effect(base, trace)


@pytest.mark.parametrize('schedule', optim.SCHEDULES)
@pytest.mark.parametrize('kind', optim.OPTIMIZERS)
def test_optimizers(kind, schedule):
    axes = {'layers/0/kernel': ('embed', 'mlp'), 'embedding': ('vocab', 'embed'), 'layers/0/scale': ('embed',)}
    params = {name: jnp.ones((4,) * len(names)) for name, names in axes.items()}

    def trace(config):
        transform, rate = optim.build(config, 1000, axes)

        def update(params, number):
            return transform.update(params, transform.init(params), params), rate(number)

        return program(update, params, jnp.int32(3)) + str([float(rate(n)) for n in (0, 500, 950, 999)])

    assert not without_effect(optim.Config(kind=kind, schedule=schedule, floor=0.0 if schedule == 'constant' else 0.1), trace)


@pytest.fixture
def tiny_model():
    params = {'embedding': jnp.ones((5, 4))}
    def forward(p, b, key, step=None):
        return p['embedding'][b['tokens']] @ p['embedding'].T, {'balance_loss': p['embedding'].sum()}

    tokens = jnp.zeros((8, 6), jnp.int32)
    return forward, params, {'tokens': tokens, 'targets': tokens, 'weights': jnp.ones((8, 6))}


def test_steps(tiny_model):
    forward, params, batch = tiny_model

    def trace(config):
        transform, rate = optim.build(optim.Config(), 1000, {'embedding': ('vocab', 'embed')})
        update = step.train_step(forward, transform, rate, config)
        return program(update, step.init_state(params, transform), batch, jax.random.key(0))

    assert not without_effect(step.Config(non_finite='skip'), trace)
