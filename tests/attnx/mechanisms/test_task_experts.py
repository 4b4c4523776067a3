"""Task-routed experts: multi-query attention at equal routers, the loss at its extremes, expansion and pruning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.mechanisms.softmax.task_experts import expand, prune
from attnx.nn import from_flat, routing, to_flat
from attnx.spec import Context
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close

TASK = np.array([[0] * 12, [1] * 12], np.int32)
SIZES = {'num_tasks': 2, 'num_experts': 4, 'top_k': 2, 'head_dim': 4}


def build(**fields):
    mixer = oracle.build('task_experts', **{**SIZES, **fields})
    rng = np.random.default_rng(1)
    mixer.router[...] = jnp.asarray(rng.standard_normal(mixer.router[...].shape), jnp.float32)
    return mixer


def test_equal_routers_and_all_experts_are_multi_query_attention():
    mixer, x = build(num_experts=2), oracle.inputs()
    mixer.router[...] = jnp.zeros((2, 16, 2))
    q = np.stack([x @ w for w in np.asarray(mixer.query[...], np.float64)], axis=2)
    key, value = (oracle.heads(x, f, 1) for f in (mixer.key, mixer.value))
    out = oracle.attend(oracle.turn(q), oracle.turn(key), value, oracle.causal(12))
    expected = (0.5 + 1e-4) * np.einsum('bteh,ehm->btm', out, np.asarray(mixer.out[...], np.float64))
    close(oracle.run(mixer, x, inputs={'task': TASK}), expected, tolerances.FLOAT32)


def test_loss_is_minus_the_information_of_tasks_on_experts():
    mixer, x = build(), oracle.inputs()
    probs = jnp.full((2, 12, 4), 0.25)
    close(routing.mutual_information(TASK, probs, 2), 0.0, tolerances.FLOAT32)
    apart = jnp.stack([jnp.tile(jnp.array(row), (12, 1)) for row in ([0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5])])
    close(routing.mutual_information(TASK, apart, 2), np.log(2), tolerances.FLOAT32)
    grads = jax.jit(jax.grad(lambda m: m(jnp.asarray(x), Context(inputs={'task': TASK})).aux['task_loss']))(mixer)
    assert np.abs(np.asarray(grads.router[...])).max() > 0


def test_expansion_leaves_old_tasks_alone():
    mixer, x = build(), oracle.inputs()
    before = oracle.run(mixer, x, inputs={'task': TASK})
    wider = oracle.build('task_experts', **{**SIZES, 'num_tasks': 3, 'num_experts': 6}, visible=(4, 4, 6))
    wider = from_flat(wider, expand(to_flat(mixer), 2, 1, jax.random.key(0)))
    close(oracle.run(wider, x, inputs={'task': TASK}), before, tolerances.FLOAT32)
    assert np.isfinite(oracle.run(wider, x, inputs={'task': TASK + 1})).all()


def test_experts_without_use_can_go():
    mixer, x = build(), oracle.inputs()
    x[..., 0] = 1.0  # a constant channel pushes two experts of task 1 out
    mixer.router[...] = mixer.router[...].at[1, 0, jnp.array([0, 2])].set(-60.0)
    before = oracle.run(mixer, x, inputs={'task': np.ones_like(TASK)})
    small = oracle.build('task_experts', **{**SIZES, 'num_tasks': 1, 'num_experts': 2})
    small = from_flat(small, prune(to_flat(mixer), 1, [1, 3]))
    close(oracle.run(small, x, inputs={'task': np.zeros_like(TASK)}), before, tolerances.FLOAT32)


def test_drawn_experts_follow_the_key_and_keep_the_best():
    mixer, x = build(top_k=3, sample_top_k=2), jnp.asarray(oracle.inputs())
    probs = mixer.probabilities(x, TASK)
    one, again, other = (np.asarray(mixer.choose(probs, jax.random.key(k))) for k in (0, 0, 1))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert (one[..., 0] == np.argmax(probs, -1)).all() and all(len(set(row)) == 3 for row in one.reshape(-1, 3))


def test_refusals():
    with pytest.raises(ValueError, match='top_k 5 must be 1 … 4'):
        build(top_k=5)
    with pytest.raises(ValueError, match='no side input'):
        oracle.run(build(), oracle.inputs())
    assert np.isnan(oracle.run(build(), oracle.inputs(), inputs={'task': TASK + 1})[1]).all()
