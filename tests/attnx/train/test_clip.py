"""QK-clip, and that figures of heads come from the op's own pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx import config as config_lib
from attnx import models
from attnx.ops import statistics
from attnx.train import clip, health, optim, step
from attnx.train.program import program

BATCH = {'tokens': jnp.arange(24).reshape(2, 12) % 7}
BATCH |= {'targets': BATCH['tokens'], 'weights': jnp.ones((2, 12))}

GQA = {'kind': 'gqa', 'num_heads': 4, 'num_kv_heads': 2}


def made(**change):
    given = {'vocab_size': 7, 'width': 16, 'num_layers': 3, 'pattern': ('a', 'b'), 'max_length': 12}
    given['mixers'] = {'a': GQA, 'b': {'kind': 'mha', 'num_heads': 2, 'bias': True}}
    config = config_lib.build(models.ModelConfig, given | change)
    return config, program(config, packed=False)


def large(params):
    """Logits in the tens, biases too."""
    grow = lambda name: 8.0 if '/query/' in name or '/key/' in name else 1.0
    return {name: (value + 0.1 * ('bias' in name)) * grow(name) for name, value in params.items()}


def logits(made, params):
    found = jax.jit(lambda params: health.figures(made.trace(params, BATCH, None)))(params)
    return {name: np.asarray(value) for name, value in found.items() if name.endswith('max_logit')}


def test_heads_beyond_the_limit_come_to_it():
    config, model = made()
    params = large(model.init(jax.random.key(0)))
    before = logits(model, params)
    limit = float(np.median(np.concatenate(list(before.values()))))
    clipped, count = jax.jit(lambda p: clip.hook(config, model.shapes, model.trace, limit)(p, BATCH, 0))(params)
    assert count == sum((v > limit).sum() for v in before.values()) > 0
    first = 'layer_0/softmax_attention/max_logit'  # later layers are given other activations
    np.testing.assert_allclose(logits(model, clipped)[first], np.minimum(before[first], limit), rtol=1e-4)
    changed = {name.split('/')[-2] for name in params if not np.array_equal(params[name], clipped[name])}
    assert changed == {'query', 'key'}


def test_step_clips_when_due_and_counts():
    config, model = made(num_layers=1, pattern=('a',), mixers={'a': GQA})
    transform, rate = optim.build(optim.Config(schedule='constant', warmup=0, learning_rate=1e-6), 10, model.axes)
    settings = step.Config(qk_clip=1.0, qk_clip_every=2)
    hook = clip.hook(config, model.shapes, model.trace, 1.0)
    update = jax.jit(step.train_step(model.forward, transform, rate, settings, clip=hook))
    state = step.init_state(large(model.init(jax.random.key(0))), transform)
    state, metrics = update(state, BATCH, jax.random.key(0))
    assert metrics['qk_clipped'] == 0 and max(v.max() for v in logits(model, state['params']).values()) > 2
    state, metrics = update(state, BATCH, jax.random.key(0))
    assert metrics['qk_clipped'] > 0 and max(v.max() for v in logits(model, state['params']).values()) < 1.001


def test_refused_where_it_would_do_nothing():
    for mixers in ({'a': {'kind': 'gla', 'num_heads': 2}}, {'a': {'kind': 'gqa', 'qk_norm': True}}):
        config, model = made(pattern=('a',), mixers=mixers)
        with pytest.raises(ValueError, match=r'qk_clip 1\.0: no layer has logits'):
            clip.hook(config, model.shapes, model.trace, 1.0)
    with pytest.raises(ValueError, match='set qk_clip'):
        step.Config(qk_clip_every=2)


def test_an_op_is_asked_for_what_is_read_alone():
    _, model = made(num_layers=1, pattern=('a',), mixers={'a': GQA})
    params = large(model.init(jax.random.key(0)))
    every = health.figures(model.trace(params, BATCH, None))
    for names in (('max_logit',), ('entropy', 'sink_mass')):
        found = health.figures(model.trace(params, BATCH, None), names=names)
        assert found.keys() == {f'layer_0/softmax_attention/{name}' for name in names}
        for name, value in found.items():
            np.testing.assert_allclose(value, every[name], rtol=1e-5)
    calls = [call for _, _, calls in health._calls(model.trace(params, BATCH, None)) for _, call in calls]
    assert not any(call.inputs['return_stats'] for call in calls)


def test_figures_are_of_the_ops_own_pass(monkeypatch):
    _, model = made(num_layers=1, pattern=('a',), mixers={'a': GQA})
    params = large(model.init(jax.random.key(0)))
    calls = [call for _, _, calls in health._calls(model.trace(params, BATCH, None)) for _, call in calls]
    found = health.figures(model.trace(params, BATCH, None))
    given = {name: calls[0].inputs[name] for name in ('query', 'key', 'mask', 'score', 'scale', 'sinks')}
    for name, value in statistics.softmax(**given).items():
        # An entropy near 0 is a difference of numbers near 1, rounded by the order of their sums.
        np.testing.assert_allclose(found[f'layer_0/softmax_attention/{name}'], value, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(statistics, 'softmax', None)
    assert health.figures(model.trace(params, BATCH, None)).keys() == found.keys()
