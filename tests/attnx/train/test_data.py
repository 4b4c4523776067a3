"""Batches: deterministic, resumed exactly from a state that went through JSON, independent of the process count."""

import dataclasses
import json

import numpy as np
import pytest

from attnx.train import data

TASKS = {
    'text': {'kind': 'text'},
    'off': {'kind': 'text', 'packing': 'off'},
    'bpe': {'kind': 'text', 'tokenizer': 'bpe', 'bpe_vocab_size': 280},
    'tokens': {'kind': 'tokens', 'vocab_size': 1000},
    'copy': {'kind': 'copy'},
    'digits': {'kind': 'digits', 'patch': 2},
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    for i in range(30):
        (folder / f'{i}.txt').write_bytes(rng.integers(97, 123, rng.integers(1, 150), np.uint8).tobytes())
    rng.integers(0, 1000, 3000, np.uint16).tofile(folder / 'a.bin')
    return folder


@pytest.fixture(params=TASKS)
def config(request, folder):
    task = dict(TASKS[request.param])
    if task['kind'] in ('text', 'tokens'):
        task['path'] = str(folder / ('*.txt' if task['kind'] == 'text' else 'a.bin'))
    return data.Config(task=task, length=0 if task['kind'] == 'digits' else 32, batch_size=12, seed=7)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def equal(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_resumes_exactly_from_json(config, tmp_path):
    """At every point of some epochs of the small tasks."""
    whole, states, train = [], [], data.open(config, run_dir=tmp_path).train
    for _ in range(20):
        states.append(json.dumps(train.get_state()))
        whole.append(next(train))
    again = data.open(config, run_dir=tmp_path).train
    for step, state in enumerate(states):
        again.set_state(json.loads(state))
        assert again.step == step
        equal(take(again, 2), whole[step:step + 2][:2] if step < 19 else [whole[19], next(train)])


def test_state_of_a_started_iterator_counts_only_what_was_taken(config):
    train = data.open(config).train
    want = take(train, 9)[4:]
    other = data.open(config).train
    take(other, 4)      # more is read ahead
    fresh = data.open(config).train
    fresh.set_state(other.get_state())
    equal(take(fresh, 5), want)
    other.set_state({**other.get_state(), 'step': 6})       # and back or forth in a running one
    equal(take(other, 3), want[2:])


@pytest.mark.parametrize('count', [3, 12])
def test_global_batch_does_not_depend_on_the_process_count(config, count):
    def joined(batches):
        return [{k: np.concatenate([b[k] for b in step]) for k in step[0]} for step in zip(*batches)]

    one = data.open(config)
    many = [data.open(config, process_index=p, process_count=count) for p in range(count)]
    equal(joined([take(d.train, 4) for d in many]), take(one.train, 4))
    equal(joined([list(d.evaluation()) for d in many]), list(one.evaluation()))
    state = json.loads(json.dumps(one.train.get_state()))       # a state holds for another process count as well
    for d in many:
        d.train.set_state(state)
    equal(joined([take(d.train, 2) for d in many]), take(one.train, 2))


def test_an_epoch_is_a_permutation_and_each_differs(config):
    opened = data.open(dataclasses.replace(config, batch_size=1))
    rows = len(opened.task.train)
    if rows > 5000:
        pytest.skip('generated rows: too many for an epoch')

    def epoch():
        return [b''.join(b[k].tobytes() for k in sorted(b)) for b in take(opened.train, rows)]

    first, second = epoch(), epoch()
    source = [opened.task.train[i] for i in range(rows)]
    source = [b''.join(np.asarray(r[k]).tobytes() for k in sorted(r)) for r in source]
    assert sorted(first) == sorted(second) == sorted(source)
    assert first != second


def test_seed_decides_order(config):
    one = take(data.open(config).train, 3)
    equal(one, take(data.open(config).train, 3))
    name = 'inputs' if 'inputs' in one[0] else 'tokens'
    other = next(data.open(dataclasses.replace(config, seed=8)).train)
    assert not np.array_equal(one[0][name], other[name])


def test_evaluation_is_whole_fixed_and_filled_with_weight_zero(config):
    opened = data.open(config)
    batches = list(opened.evaluation())
    assert len(batches) == opened.num_eval_batches == -(-len(opened.task.evaluation) // 12)
    weight = sum(opened.task.evaluation[i]['weights'].sum() for i in range(len(opened.task.evaluation)))
    assert sum(b['weights'].sum() for b in batches) == weight
    assert {b['weights'].shape[0] for b in batches} == {12}
    equal(list(opened.evaluation()), batches)
    few = data.open(dataclasses.replace(config, eval_batches=1))
    equal(list(few.evaluation()), batches[:1])
    assert few.num_eval_batches == 1


def test_another_seed_evaluates_the_same_rows(config):
    if config.task['kind'] == 'copy':
        pytest.skip('generated rows follow the seed')
    equal(list(data.open(config).evaluation()), list(data.open(dataclasses.replace(config, seed=8)).evaluation()))


@pytest.mark.parametrize('change, name', [
    ({'seed': 8}, 'seed: saved 7, now 8'), ({'batch_size': 24}, 'batch_size: saved 12, now 24'),
    ({'length': 64}, 'length: saved 32, now 64'), ({'task': {'kind': 'copy'}}, "kind: saved 'text', now 'copy'"),
    ({'task.packing': 'off'}, "text.packing: saved 'first_fit', now 'off'"),
])
def test_a_state_of_other_data_is_refused(folder, change, name):
    config = data.Config(task={'kind': 'text', 'path': str(folder / '*.txt')}, length=32, batch_size=12, seed=7)
    state = data.open(config).train.get_state()
    change = {k: v for k, v in change.items() if k != 'task.packing'} or {'task': {**config.task, 'packing': 'off'}}
    with pytest.raises(ValueError, match='differing: .*' + name):
        data.open(dataclasses.replace(config, **change)).train.set_state(state)


def test_changed_files_are_refused_and_moved_ones_taken(tmp_path):
    for place in ('here', 'there'):
        (tmp_path / place).mkdir()
        for i in range(9):
            (tmp_path / place / f'{i}.txt').write_text(f'text number {i}')

    def opened(place):
        task = {'kind': 'text', 'path': str(tmp_path / place)}
        return data.open(data.Config(task=task, length=8, batch_size=2)).train

    state = opened('here').get_state()
    opened('there').set_state(state)
    (tmp_path / 'there' / '3.txt').write_text('text numbre 3')       # of the same size
    with pytest.raises(ValueError, match='differing: contents: saved'):
        opened('there').set_state(state)


def test_errors(folder):
    config = data.Config(task={'kind': 'copy'}, length=32)
    with pytest.raises(ValueError, match='batch_size 16 must be a multiple of the 3 processes'):
        data.open(config, process_count=3)
    with pytest.raises(ValueError, match='batch_size must be at least 1'):
        data.open(dataclasses.replace(config, batch_size=0))
    with pytest.raises(ValueError, match=r'seed must lie in \[0, 2\*\*32\)'):
        data.open(dataclasses.replace(config, seed=2**32))
    with pytest.raises(ValueError, match="a data state holds an integer 'step'"):
        data.open(config).train.set_state({'next_index': 3})
    with pytest.raises(ValueError, match="did you mean 'copy'"):
        data.open(dataclasses.replace(config, task={'kind': 'copi'}))


def test_no_warnings_without_threads():
    equal(take(data.open(data.Config(task={'kind': 'copy'}, threads=0, prefetch=0)).train, 2),
          take(data.open(data.Config(task={'kind': 'copy'})).train, 2))
