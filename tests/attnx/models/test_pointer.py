"""A model that points at objects on a grid."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import models, ops, tasks
from attnx.models import ModelConfig, StackConfig
from attnx.models.pointer import scanpath
from tests import tolerances
from tests.laws import close

CONFIG = ModelConfig(
    kind='encoder_decoder', output='pointer', grid=6, vocab_size=6, width=32, num_layers=2, pattern=('mha',), max_length=16,
    mixers={'bare': {'kind': 'mha', 'position': 'none'}}, encoder=StackConfig(num_layers=2, pattern=('bare',)),
)  # fmt: skip
TASK = tasks.build({'kind': 'scanpath'})


@pytest.fixture(scope='module')
def model():
    return jax.jit(lambda: models.build(CONFIG, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope='module')
def batch():
    rows = [TASK.train[i] for i in range(3)]
    return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}


@jax.jit
def run(model, batch):
    given = {name: batch[name] for name in ('source', 'source_mask')}
    return model(batch['tokens'], inputs={'places': batch['places']}, **given).logits


def test_places_have_gaussian_products():
    for count, width, sigma, error in ((12, 12, 2.0, 1e-12), (12, 40, 1.0, 1e-12), (8, 6, 2.0, 1e-3)):
        table = ops.positions.gaussian(count, width, sigma)
        far = np.arange(count)[:, None] - np.arange(count)
        unit = table / np.linalg.norm(table, axis=1, keepdims=True)
        assert table.shape == (count, width) and np.abs(unit @ unit.T - np.exp(-(far**2) / (2 * sigma**2))).max() < error


def test_order_of_objects_does_not_matter(model, batch):
    """Logits go with their objects; the last two, of the object searched for and of none, stay."""
    logits, order = run(model, batch), np.append(np.random.default_rng(0).permutation(8), 8)
    rank = np.append(0, 1 + np.argsort(order))
    moved = {**batch, 'source': batch['source'][:, order], 'places': batch['places'][:, order], 'tokens': rank[batch['tokens']]}
    assert logits.shape == (3, 9, 10)
    close(run(model, moved), logits[:, :, np.append(order, 9)], tolerances.FLOAT32)


def test_what_is_no_object_is_not_pointed_at(model, batch):
    mask = batch['source_mask'].at[:, 2].set(False)
    changed = {**batch, 'source_mask': mask, 'source': batch['source'].at[:, 2].set(0)}
    logits = run(model, {**changed, 'tokens': jnp.where(batch['tokens'] == 3, 0, batch['tokens'])})
    assert (np.asarray(logits)[:, :, 2] < -1e8).all() and np.isfinite(logits).all()


def test_scanpath_is_the_likeliest_by_the_training_path(model, batch):
    path = np.asarray(scanpath(model, batch['source'], batch['places'], steps=9))
    tokens = np.concatenate([np.zeros((3, 1), int), 1 + path[:, :-1]], axis=1)
    logits = np.array(run(model, {**batch, 'tokens': jnp.asarray(tokens)}))[..., :9]
    logits[:, 0, 8] = -np.inf
    for found, expected in zip(path, logits.argmax(-1)):
        end = np.append(np.flatnonzero(found == 8), 8)[0]
        assert np.array_equal(found[: end + 1], expected[: end + 1]) and (found[end + 1 :] == 8).all()
    assert (path[:, 0] != 8).all()


def test_rows_follow_the_nearest_object():
    for index in range(50):
        row = TASK.train[index]
        counted = row['targets'][row['weights'] > 0]
        path, eye, seen = counted[:-1], np.array([3, 3]), set()
        assert counted[-1] == 8 and row['tokens'][: len(counted)].tolist() == [0, *(1 + path)]
        for j in path:
            far = {i: np.square(row['places'][i, :2] - eye).sum() for i in range(8) if i not in seen}
            assert far[j] == min(far.values())
            seen.add(j)
            eye = row['places'][j, :2]
        kinds = row['source'][path]
        assert kinds[-1] == row['source'][-1] and (kinds[:-1] != kinds[-1]).all()


@pytest.mark.slow
def test_learns_to_point(model):
    import optax

    rows = [TASK.train[i] for i in range(64)]
    batch = {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}
    optimizer = optax.adam(3e-3)

    @jax.jit
    def update(model, state):
        def loss(model):
            nll = optax.softmax_cross_entropy_with_integer_labels(run(model, batch), batch['targets'])
            return (nll * batch['weights']).sum() / batch['weights'].sum()

        value, grads = jax.value_and_grad(loss)(model)
        change, state = optimizer.update(grads, state)
        return optax.apply_updates(model, change), state, value

    state, values = optimizer.init(model), []
    for _ in range(100):
        model, state, value = update(model, state)
        values.append(float(value))
    assert values[-1] < 0.3 < 1.5 < values[0]


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'grid': 0}, 'grid 0 is of output pointer'),
        ({'positions': 'learned'}, "output pointer needs positions 'none'; given 'learned'"),
        ({'output': 'pointr'}, "unknown output 'pointr'"),
        ({'output': 'vocabulary'}, 'grid 6 is of output pointer'),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)
