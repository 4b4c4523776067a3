"""A program that follows the task's rule predicts every target that counts; rows follow from (seed, split, index)."""

import itertools

import numpy as np
import pytest

from attnx import tasks


def copy_rule(tokens):
    end = int(np.argmax(tokens == 31))
    return {end + i: tokens[i] for i in range(end)}


def induction_rule(tokens):
    place = int(np.argmax(tokens == 15))
    return {len(tokens) - 1: tokens[place + 1]}


def mqar_rule(tokens):
    memory = dict(zip(tokens[:16:2], tokens[1:16:2]))
    return {i: memory[t] for i, t in enumerate(tokens) if i >= 16 and t in memory}


def selective_copy_rule(tokens):
    content = [t for t in tokens if 0 < t < 15]
    return {len(tokens) - len(content) + i: t for i, t in enumerate(content)}


def flip_flop_rule(tokens):
    found, bit = {}, None
    for i, (order, next_bit) in enumerate(zip(tokens[::2], tokens[1::2])):
        if order == 1:
            found[2 * i] = bit
        bit = next_bit if order == 0 else bit
    return found


def passkey_rule(tokens):
    at = int(np.argmax(tokens == 26))
    return {len(tokens) - 5 + i: tokens[at + 1 + i] for i in range(5)}


def sorting_rule(tokens):
    n = int(np.argmax(tokens == 32))
    return dict(enumerate(sorted(tokens[:n]), start=n))


def counting_rule(tokens):
    value, end = {}, int(np.argmax((tokens >= 7) & (tokens < 10)))
    for t in tokens[:end]:
        if 1 <= t < 4:
            value[t - 1] = 0
        elif t >= 4:
            value[t - 4] += 1
    return {end: 10 + value[tokens[end] - 7]}


def parity_rule(tokens):
    elements, product, found = list(itertools.permutations(range(3))), (0, 1, 2), {}
    for i, t in enumerate(tokens):
        product = tuple(elements[t][p] for p in product)
        found[i] = elements.index(product)
    return found


def chains_rule(tokens):
    count = 12 if len(tokens) == 36 else 6  # links; twice as many out of distribution
    link = dict(zip(tokens[: 2 * count : 2], tokens[1 : 2 * count : 2]))

    def end(symbol):
        return end(link[symbol]) if symbol in link else symbol

    return {i: end(tokens[i]) for i in range(2 * count, 3 * count)}


def missing_rule(tokens):
    return {len(tokens) - 1: next(iter(set(range(len(tokens))) - set(tokens[:-1].tolist())))}


def listops_rule(tokens):
    stack = []
    for i, t in enumerate(tokens):
        stack.append(t)
        if t == 14:
            start = max(j for j, u in enumerate(stack) if 10 <= u < 14 and not isinstance(u, float))
            values = [int(v) for v in stack[start + 1 : -1]]
            middle = sorted(values)[(len(values) - 1) // 2 : len(values) // 2 + 1]
            value = (min(values), max(values), sum(middle) // len(middle), sum(values) % 10)[stack[start] - 10]
            stack[start:] = [value]
            if start == 0:
                return {i: value}


RULES = {name.removesuffix('_rule'): rule for name, rule in list(globals().items()) if name.endswith('_rule')}


@pytest.mark.parametrize('length', [32, 48, 64])
@pytest.mark.parametrize('config', [
    {'kind': 'copy'}, {'kind': 'copy', 'shortest': 1.0}, {'kind': 'copy', 'shortest': 0.01}, {'kind': 'induction'},
    {'kind': 'mqar'}, {'kind': 'mqar', 'random_fill': True}, {'kind': 'mqar', 'power': 1.0}, {'kind': 'selective_copy'},
    {'kind': 'flip_flop'}, {'kind': 'passkey'}, {'kind': 'passkey', 'num_distractors': 2, 'depth': 0.5}, {'kind': 'sorting'},
    {'kind': 'counting', 'num_variables': 3}, {'kind': 'parity', 'points': 3}, {'kind': 'chains'}, {'kind': 'missing'},
    {'kind': 'listops'},
], ids=str)
def test_rule_predicts_every_target(config, length):
    task = tasks.build(config, length=length, seed=3)
    for source in (task.train, task.evaluation):
        for index in range(50):
            row = source[index]
            counted = {int(i): row['targets'][i] for i in np.flatnonzero(row['weights'])}
            assert counted == RULES[task.kind](row['tokens'])
            assert {k: (v.shape, v.dtype) for k, v in row.items()} == {
                **dict.fromkeys(('tokens', 'targets', 'segment_ids', 'positions'), ((length,), np.int32)),
                'weights': ((length,), np.float32)}
            assert max(row['tokens'].max(), row['targets'].max()) < task.vocab_size


GIVEN = {'chains': {'symbols': 16}, 'counting': {'num_variables': 3}}  # room for deeper chains; what the rule counts


@pytest.mark.parametrize('kind', sorted({k for k in tasks.names() if hasattr(tasks._module(k), 'ELSEWHERE')} - {'tokens'}))
def test_splits_out_of_distribution_fit_the_model_and_differ(kind):
    """Rows of the same vocabulary and shape of inputs, by the same rule, that the rows trained on can not stand for."""
    given = {'kind': kind, **GIVEN.get(kind, {})}
    own = tasks.build(given, length=tasks.build(given).length if kind != 'text' else 64)
    splits = tasks.elsewhere(given, own.length)
    assert splits
    for name, (config, length) in splits.items():
        other = tasks.build(config, length=length)
        for field in ('vocab_size', 'features', 'num_classes', 'grid'):
            assert getattr(other, field) == getattr(own, field), name
        assert (config, length) != (given, own.length) and length >= own.length
        for index in range(5):
            row, again, near = other.evaluation[index], other.evaluation[index], own.evaluation[index]
            assert all(np.array_equal(row[field], again[field]) for field in row)
            assert any(not np.array_equal(row[field], near[field]) for field in row), name
            if kind in RULES and 'num_pairs' not in config:  # the rule of recall knows of eight
                counted = {int(i): row['targets'][i] for i in np.flatnonzero(row['weights'])}
                assert counted and counted == RULES[kind](row['tokens'])


def test_tasks_without_a_split_have_none_of_that_name():
    assert tasks.elsewhere({'kind': 'scene'}, 16) == {}
    assert set(tasks.elsewhere({'kind': 'flip_flop', 'ignore': 0.5}, 64)) == {'sparse', 'dense', 'long'}
    assert tasks.elsewhere({'kind': 'flip_flop', 'ignore': 0.5}, 64)['long'] == ({'kind': 'flip_flop', 'ignore': 0.5}, 128)


def test_odd_length_copy_pads():
    row = tasks.build({'kind': 'copy', 'shortest': 1.0}, length=33).train[0]
    assert row['segment_ids'].tolist() == [1] * 32 + [0]
    assert row['weights'].tolist() == [0] * 16 + [1] * 16 + [0]


@pytest.mark.parametrize('kind', sorted(set(RULES) - {'counting'}))  # most of a program is passes: rows do meet
def test_same_index_same_row_and_splits_differ(kind):
    def rows(seed, split):
        task = tasks.build({'kind': kind}, length=64, seed=seed)
        return [getattr(task, split)[i]['tokens'].tobytes() for i in range(200)]

    train = rows(0, 'train')
    assert train == rows(0, 'train')
    assert not set(train) & set(rows(0, 'evaluation'))
    assert not set(train) & set(rows(1, 'train'))


def test_mqar_queries_every_key_once_and_near_slots_more_often():
    task = tasks.build({'kind': 'mqar', 'num_pairs': 4}, length=64)
    first = 0
    for index in range(2000):
        row = task.train[index]
        places = np.flatnonzero(row['weights'])
        assert sorted(row['tokens'][places]) == sorted(row['tokens'][0:8:2])
        assert len(set(row['targets'][places])) == 4
        first += row['tokens'][0] == row['tokens'][8]       # the first key at the first slot
    weights = np.arange(1, 29) ** -0.99
    share = weights[0] / weights.sum()      # its first draw: a binomial share, within five standard deviations
    assert abs(first / 2000 - share) < 5 * np.sqrt(share * (1 - share) / 2000)


@pytest.mark.parametrize('config, length, message', [
    ({'kind': 'mqar'}, 30, 'length >= 32'),
    ({'kind': 'mqar'}, 33, 'even length'),
    ({'kind': 'mqar', 'vocab_size': 16}, 64, 'vocab_size >= 18'),
    ({'kind': 'copy', 'shortest': 0.0}, 64, 'shortest'),
    ({'kind': 'induction'}, 2, 'length >= 3'),
    ({'kind': 'induction', 'num_train': 0}, 8, 'num_train'),
    ({'kind': 'inductoin'}, 8, "did you mean 'induction'"),
    ({'kind': 'induction', 'vocabsize': 3}, 8, "did you mean 'vocab_size'"),
    ({'kind': 'induction', 'vocab_size': '3'}, 8, 'expected int'),
    ({'vocab_size': 3}, 8, "needs a 'kind'"),
])
def test_errors_name_what_was_expected(config, length, message):
    with pytest.raises(ValueError, match=message):
        tasks.build(config, length=length)


def test_every_task_file_is_complete():
    for kind in tasks.names():
        module = tasks._module(kind)
        assert module.__doc__
        assert 'A row' in module.__doc__
        assert callable(module.build)
        module.Config()
