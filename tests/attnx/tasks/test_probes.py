"""Regression, bigram-backcopy, pointer tasks, packing leak: rows follow their rule; the best prediction is as good as said."""

import itertools
import math

import jax
import numpy as np
import pytest
from flax import nnx

from attnx import models, tasks
from attnx.tasks import backcopy, pointer, regression
from attnx.train import step as step_lib
from attnx.train.config import completed
from attnx.train.program import program


def rows(config, *, length=0, seed=0, count=50, split='train'):
    source = getattr(tasks.build(config, length=length, seed=seed), split)
    return [source[i] for i in range(count)]


@pytest.mark.parametrize('kind', ['regression', 'backcopy', 'pointer', 'packing_leak'])
def test_same_index_same_row_and_splits_differ(kind):
    def seen(seed, split):
        found = rows({'kind': kind}, seed=seed, split=split)
        return [row.get('tokens', row.get('inputs')).tobytes() for row in found]

    train = seen(0, 'train')
    assert train == seen(0, 'train')
    assert not set(train) & set(seen(0, 'evaluation'))
    assert not set(train) & set(seen(1, 'train'))


# Regression


def test_least_squares_is_exact_once_it_can_be():
    for row in rows({'kind': 'regression', 'skew': 1.0, 'scale': 2.0}, length=24):
        found = regression.least_squares(row['inputs'])
        assert np.allclose(found[5:], row['targets'][::2, 0][5:], atol=1e-4)
        assert not np.allclose(found[:5], row['targets'][::2, 0][:5], atol=1e-4)


def test_regression_rows():
    plain = rows({'kind': 'regression', 'dims': 4}, length=16, count=4000)
    x, y = (np.stack([row['inputs'][i::2] for row in plain]) for i in (0, 1))
    assert np.cov(x.reshape(-1, 4).T) == pytest.approx(np.eye(4), abs=0.05)
    assert np.square(y[..., 0]).mean() == pytest.approx(4, rel=0.1) and not y[..., 1:].any()  # predicting 0 costs dims
    assert all(np.array_equal(r['targets'][::2], r['inputs'][1::2]) for r in plain[:9])
    assert plain[0]['weights'].tolist() == [1, 0] * 8
    skewed = rows({'kind': 'regression', 'dims': 4, 'scale': 3.0, 'skew': 2.0, 'noise': 1.0, 'warm': 3}, length=16, count=4000)
    x = np.concatenate([row['inputs'][::2] for row in skewed])
    assert x.var(0) == pytest.approx(9 / np.arange(1, 5) ** 2, rel=0.05)
    assert skewed[0]['weights'].tolist() == [0] * 6 + [1, 0] * 5
    rest = np.concatenate([regression.least_squares(r['inputs'])[6:] - r['targets'][12::2, 0] for r in skewed[:500]])
    assert np.square(rest).mean() > 0.9  # noise can not be predicted


def test_real_targets_are_trained_by_squared_error():
    task = tasks.build({'kind': 'regression', 'dims': 3}, length=8)
    assert task.real and not tasks.build({'kind': 'mqar'}).real
    config = completed(models.ModelConfig(width=16, num_layers=1, mlp=models.config.mlp_lib.Config(hidden=16)), task)
    made = program(config, packed=False)
    batch = {name: np.stack([task.train[i][name] for i in range(4)]) for name in task.train[0]}
    params = jax.jit(made.init)(jax.random.key(0))
    outputs, _ = jax.jit(made.forward)(params, batch, None)
    assert outputs.shape == (4, 8, 3)
    wanted = np.square(np.asarray(outputs) - batch['targets']).sum(-1)[batch['weights'] > 0].mean()
    gradients = lambda config: step_lib.gradients(made.forward, params, batch, jax.random.key(0), config)
    loss, _, _ = jax.jit(lambda: gradients(step_lib.Config()))()
    assert loss == pytest.approx(wanted, rel=1e-5)
    evaluation = jax.jit(step_lib.eval_step(made.forward))(params, batch)
    assert step_lib.summarise([evaluation]) == {'loss': pytest.approx(wanted, rel=1e-5)}
    for given in ({'z_loss': 1e-4}, {'label_smoothing': 0.1}):
        with pytest.raises(ValueError, match=f'step.{next(iter(given))} is for targets that are tokens'):
            jax.eval_shape(lambda given=given: gradients(step_lib.Config(**given)))


def test_a_prediction_does_not_see_its_answer():
    task = tasks.build({'kind': 'regression', 'dims': 3}, length=8)
    model = models.build(completed(models.ModelConfig(width=16, num_layers=1), task), rngs=nnx.Rngs(0))
    inputs = task.train[0]['inputs'][None]
    other = inputs.copy()
    other[0, 5] += 1  # the answer of example 3
    changed = np.abs(np.asarray(model(inputs).logits - model(other).logits)).max(-1)[0] > 0
    assert changed.tolist() == [False] * 5 + [True] * 3


# Bigram-backcopy


@pytest.mark.parametrize('config', [
    {}, {'vocab_size': 20, 'successors': 3, 'num_triggers': 5, 'table': 2}, {'num_triggers': 0},
])  # fmt: skip
def test_backcopy_rows(config):
    made = backcopy.Config(**config)
    table, first, triggers = backcopy.chances(made)
    assert len(triggers) == made.num_triggers and not first[triggers].any()
    assert table.sum(1) == pytest.approx(1) and ((table > 0).sum(1) == made.successors).all()
    for row in rows({'kind': 'backcopy', **config}, length=200):
        whole = np.append(row['tokens'], row['targets'][-1])
        assert np.array_equal(row['targets'][:-1], row['tokens'][1:])
        assert whole[0] == made.vocab_size - 1 and (whole[1:] < made.vocab_size - 1).all() and first[whole[1]] > 0
        for before, last, following in zip(whole, whole[1:], whole[2:]):
            if last in triggers:
                assert following == before and before not in triggers
            else:
                assert table[last, following] > 0


def test_backcopy_follows_its_table_and_its_bound():
    config = backcopy.Config(vocab_size=12, successors=4)
    table, _, triggers = backcopy.chances(config)
    marginal = backcopy.bigrams(12, 4, 1.0, 0)[1]
    assert marginal @ backcopy.bigrams(12, 4, 1.0, 0)[0] == pytest.approx(marginal, abs=1e-9)
    counts, losses, bounds = np.zeros((11, 11)), [], []
    for row in rows({'kind': 'backcopy', 'vocab_size': 12, 'successors': 4}, length=100, count=400):
        for last, following in zip(row['tokens'][1:], row['targets'][1:]):
            if last not in triggers:
                counts[last, following] += 1
                losses.append(-math.log(table[last, following]))
                bounds.append(backcopy.entropy(table)[last])
    seen = counts.sum(1) > 200
    assert counts[seen] / counts[seen].sum(1, keepdims=True) == pytest.approx(table[seen], abs=0.1)
    assert np.mean(losses) == pytest.approx(np.mean(bounds), rel=0.02)


def test_backcopy_counts_what_was_asked():
    weights = {c: rows({'kind': 'backcopy', 'counted': c})[0]['weights'] for c in ('all', 'triggers', 'others')}
    assert np.array_equal(weights['triggers'] + weights['others'], weights['all']) and weights['triggers'].sum() > 0
    table, _, _ = backcopy.chances(backcopy.Config(uniform=True))
    assert backcopy.entropy(table) == pytest.approx(math.log(8))


# Pointer tasks


def solved(config, row):
    """Points, answer and rest of a row."""
    grid = config.grid
    go = int(np.argmax(row['tokens'] == grid * grid))
    answer = row['targets'][go:][row['weights'][go:] > 0].tolist()
    assert answer.pop() == grid * grid + 1
    return np.stack([row['tokens'][:go] % grid, row['tokens'][:go] // grid], 1), answer


def test_hulls():
    from scipy.spatial import ConvexHull

    config = pointer.Config(num_points=9, fewest=4, grid=64)
    sizes = set()
    for row in rows({'kind': 'pointer', 'num_points': 9, 'fewest': 4, 'grid': 64}, count=200):
        points, answer = solved(config, row)
        sizes.add(len(points))
        assert len({*map(tuple, points.tolist())}) == len(points)
        places = pointer.hull(points)
        assert answer == (points[places] @ [1, 64]).tolist() and places[0] == min(places)
        assert pointer.area(points[places]) == pytest.approx(ConvexHull(points).volume) and pointer.area(points[places]) > 0
        assert pointer.score(config, points, answer) == {'exact': 1, 'valid': 1, 'quality': 1}
        assert pointer.score(config, points, answer[::-1])['valid'] == 0
        assert pointer.score(config, points, answer[1:] + answer[:1])['exact'] == 0
        assert pointer.score(config, points, answer[:2])['valid'] == 0
        if len(answer) > 3:
            assert 0 < pointer.score(config, points, answer[1:])['quality'] < 1
    assert sizes == set(range(4, 10))


def test_a_hull_is_corners_only_and_no_star():
    square = np.array([(1, 0), (0, 0), (2, 0), (2, 2), (0, 2), (1, 1)])
    assert pointer.hull(square) == [1, 2, 3, 4]
    assert pointer.hull(np.array([(1, 1), (0, 0), (3, 3)])) in ([1, 2], [2, 1])
    star = np.array([(8, 15), (3, 1), (15, 10), (1, 10), (13, 1)])[::-1]  # turns left five times, in two rounds
    config = pointer.Config(num_points=5)
    tokens = (star @ [1, 16]).tolist()
    turns = [pointer.turn(star[i], star[(i + 1) % 5], star[(i + 2) % 5]) for i in range(5)]
    assert all(t > 0 for t in turns) or all(t < 0 for t in turns)
    assert pointer.score(config, star, tokens if turns[0] > 0 else tokens[::-1])['valid'] == 0


def test_tours():
    config = pointer.Config(problem='tour', num_points=6)
    for row in rows({'kind': 'pointer', 'problem': 'tour', 'num_points': 6}, count=40):
        points, answer = solved(config, row)
        assert (points[0] @ [1, 16]) == answer[0] and sorted(answer) == sorted(row['tokens'][:6].tolist())
        lengths = [pointer.tour_length(points, (0, *p)) for p in itertools.permutations(range(1, 6))]
        places = pointer.tour(points)
        assert pointer.tour_length(points, places) == pytest.approx(min(lengths)) and places[1] < places[-1]
        assert pointer.score(config, points, answer) == {'exact': 1, 'valid': 1, 'quality': 1}
        assert pointer.score(config, points, answer[:-1])['valid'] == 0
        swapped = [answer[0], answer[2], answer[1], *answer[3:]]
        assert pointer.score(config, points, swapped)['quality'] == pytest.approx(
            min(lengths) / pointer.tour_length(points, [row['tokens'].tolist().index(t) for t in swapped])
        )


# Packing leak


def test_leaking_documents_are_equal_and_apart():
    task = tasks.build({'kind': 'packing_leak'}, length=50)
    assert task.packed and task.documents == 4
    for row in (task.train[i] for i in range(20)):
        documents = row['tokens'][:48].reshape(4, 12)
        assert (documents == documents[0]).all()
        assert row['segment_ids'].tolist() == [*np.repeat([1, 2, 3, 4], 12), 0, 0]
        assert row['positions'][:48].tolist() == [*range(12)] * 4
        assert np.flatnonzero(row['weights']).tolist() == [i for i in range(12, 48) if i % 12 != 11]
        counted = row['weights'][:-1] > 0
        assert (row['targets'][:-1][counted] == row['tokens'][1:][counted]).all()
    joined = tasks.build({'kind': 'packing_leak', 'joined': True}, length=50)
    a, b = task.train[3], joined.train[3]
    assert not joined.packed and all(np.array_equal(a[n], b[n]) for n in ('tokens', 'targets', 'weights'))
    assert b['segment_ids'].tolist() == [1] * 48 + [0] * 2 and b['positions'][:48].tolist() == [*range(48)]


@pytest.mark.parametrize('config, length, message', [
    ({'kind': 'regression'}, 7, 'even length'),
    ({'kind': 'regression', 'warm': 4}, 8, r'warm must lie in \[0, 4\)'),
    ({'kind': 'regression', 'noise': -1.0}, 8, 'noise -1.0'),
    ({'kind': 'backcopy', 'successors': 64}, 0, r'successors must lie in \[1, 63\]'),
    ({'kind': 'backcopy', 'counted': 'trigger'}, 0, "did you mean 'triggers'"),
    ({'kind': 'pointer', 'problem': 'hul'}, 0, "did you mean 'hull'"),
    ({'kind': 'pointer', 'problem': 'tour', 'num_points': 10}, 0, 'at most 9'),
    ({'kind': 'pointer', 'grid': 3}, 0, 'a grid of more than 3'),
    ({'kind': 'pointer'}, 16, 'length >= 17'),
    ({'kind': 'packing_leak', 'num_documents': 1}, 0, 'num_documents and vocab_size >= 2'),
    ({'kind': 'packing_leak'}, 11, 'length >= 12'),
])  # fmt: skip
def test_errors_name_what_was_expected(config, length, message):
    with pytest.raises(ValueError, match=message):
        tasks.build(config, length=length)
