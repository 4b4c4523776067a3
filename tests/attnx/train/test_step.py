"""The update: loss terms against a float64 oracle, accumulation, non-finite updates, evaluation sums."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnx.train import optim, step

RATE = optim.trapezoid(0.1, warmup=4)


def run(tiny, config, batches, seed=0, transform=None):
    transform = transform or optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(RATE))
    update = jax.jit(step.train_step(tiny.forward, transform, RATE, config), donate_argnums=0)
    state, logged = step.init_state(tiny.params(), transform), []
    for batch in batches:
        state, metrics = update(state, batch, jax.random.key(seed))
        logged.append({name: float(value) for name, value in metrics.items()})
    return state, logged


def test_loss_terms_against_float64(tiny):
    batch, params = tiny.batch(), tiny.params()
    config = step.Config(z_loss=1e-2, label_smoothing=0.1, aux_weights={'size_loss': 0.5})
    total, _, metrics = jax.jit(lambda p: step.gradients(tiny.forward, p, batch, jax.random.key(0), config))(params)
    logits, aux = tiny.forward(params, batch, None)
    logits = np.asarray(logits, np.float64)
    lse = np.log(np.exp(logits).sum(-1))
    nll = lse - np.take_along_axis(logits, batch['targets'][..., None], -1)[..., 0]
    loss = 0.9 * nll + 0.1 * (lse - logits.mean(-1)) + 1e-2 * lse**2
    mean = lambda x: (x * batch['weights']).sum() / batch['weights'].sum()
    np.testing.assert_allclose(total, mean(loss) + 0.5 * np.sum(aux['size_loss']), rtol=1e-5)
    np.testing.assert_allclose(metrics['loss'], mean(nll), rtol=1e-5)
    np.testing.assert_allclose(metrics['size'], np.mean(aux['size']), rtol=1e-5)


def test_accumulation_equals_the_big_batch(tiny):
    batch = tiny.batch()  # random weights: micro-batches hold unequal numbers of tokens
    config = step.Config(z_loss=1e-3, aux_weights={'size_loss': 0.0})
    key = jax.random.key(0)
    grad = lambda n: jax.jit(
        lambda p: step.gradients(tiny.forward, p, batch, key, dataclasses.replace(config, accumulate=n))
    )(tiny.params())
    for n in (2, 4, 8):
        a, b = grad(1), grad(n)
        np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
        np.testing.assert_allclose(a[2]['loss'], b[2]['loss'], rtol=1e-6)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), a[1], b[1])


def test_accumulated_auxiliary_loss_is_a_mean(tiny):
    rows = [tiny.batch(weights=np.ones((8, 6), np.float32))[k] for k in ('tokens', 'targets', 'weights')]
    same = {k: np.repeat(v[:1], 4, 0) for k, v in zip(('tokens', 'targets', 'weights'), rows)}
    grad = lambda n: step.gradients(tiny.forward, tiny.params(), same, jax.random.key(0), step.Config(accumulate=n))
    a, b = grad(1), grad(4)
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    np.testing.assert_allclose(a[2]['size_loss'], b[2]['size_loss'], rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), a[1], b[1])


def test_refuses_what_would_be_ignored(tiny):
    with pytest.raises(ValueError, match="no 'siz_loss'; did you mean 'size_loss'"):
        run(tiny, step.Config(aux_weights={'siz_loss': 1.0}), [tiny.batch()])
    with pytest.raises(ValueError, match='accumulate 3 does not divide the batch of 8 rows'):
        run(tiny, step.Config(accumulate=3), [tiny.batch()])


def test_training_lowers_the_loss_and_logs_the_rate(tiny):
    _, logged = run(tiny, step.Config(), [tiny.batch()] * 30)
    assert logged[-1]['loss'] < 0.7 * logged[0]['loss']
    np.testing.assert_allclose([m['learning_rate'] for m in logged[:5]], [0.025, 0.05, 0.075, 0.1, 0.1], rtol=1e-6)


def test_a_bad_update_freezes_the_state(tiny):
    good, poison = tiny.batch(), tiny.batch(weights=np.full((8, 6), np.nan, np.float32))
    before, _ = run(tiny, step.Config(), [good, good])
    after, logged = run(tiny, step.Config(), [good, good, poison, good])
    assert [m['frozen'] for m in logged] == [0, 0, 1, 1]
    assert int(after['step']) == 2
    jax.tree.map(np.testing.assert_array_equal, before | {'bad': 0}, after | {'bad': 0})


def test_tolerated_bad_updates_are_skipped(tiny):
    good, poison = tiny.batch(), tiny.batch(weights=np.full((8, 6), np.inf, np.float32))
    want, _ = run(tiny, step.Config(), [good, good])
    got, logged = run(tiny, step.Config(non_finite='skip', max_non_finite=1), [good, poison, good])
    assert [m['bad'] for m in logged] == [0, 1, 1]
    assert int(got['step']) == 3
    jax.tree.map(np.testing.assert_array_equal, want['params'], got['params'])
    np.testing.assert_allclose(logged[2]['learning_rate'], 0.05, rtol=1e-6)


def test_evaluation_sums_are_exact_over_uneven_batches(tiny):
    params = tiny.params()
    evaluate = jax.jit(step.eval_step(tiny.forward, jnp.arange(tiny.vocab)))
    big = tiny.batch(rows=8)
    parts = [{k: v[i : i + n] for k, v in big.items()} for i, n in ((0, 3), (3, 5))]
    whole, split = step.summarise([evaluate(params, big)]), step.summarise([evaluate(params, p) for p in parts])
    assert set(whole) == {'loss', 'accuracy', 'nats_per_byte'}
    for name in whole:
        np.testing.assert_allclose(whole[name], split[name], rtol=1e-6)


def test_classification(tiny):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.bfloat16)
    batch = {'label': np.array([0, 1, 2, 3]), 'weights': np.array([1, 1, 1, 0], np.float32)}
    sums = step.eval_step(lambda p, b, k: (logits, {}))({}, batch)
    want = -jax.nn.log_softmax(np.asarray(logits, np.float32))[np.arange(3), np.arange(3)].sum()
    np.testing.assert_allclose(sums['nll'], want, rtol=1e-6)
    assert float(sums['weight']) == 3
