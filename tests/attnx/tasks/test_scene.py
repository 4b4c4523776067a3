"""The answer of a scene lies in its side inputs and nowhere else."""

import numpy as np
import pytest

from attnx import tasks
from attnx.spec import side_input


@pytest.mark.parametrize('fields', [{}, {'side': 4, 'objects': 5, 'frames': 2, 'questions': 1}, {'kinds': 3, 'classify': True}])
def test_who_looks_finds_the_answer(fields):
    task = tasks.build({'kind': 'scene', **fields}, seed=3)
    config = tasks.config('scene', **fields)
    for source in (task.train, task.evaluation):
        for index in range(50):
            row = source[index]
            asked = [task.length - 1] if config.classify else np.flatnonzero(row['weights'])
            assert len(asked) == (1 if config.classify else config.questions)
            for i in asked:
                frame = row['tokens'][i - 1] - config.kinds
                place = row['tokens'][i] - config.kinds - config.frames
                there = row['visual'] & (row['frame'] == frame + 1) & (row['channel'] == place)
                assert there.sum() == 1
                assert row['tokens'][there][0] == (row['label'] if config.classify else row['targets'][i])
            assert row['task'][0] == row['tokens'][asked[0] - 1] - config.kinds
            assert row['tokens'].max() < task.vocab_size and not row['visual'][row['tokens'] >= config.kinds].any()


def test_the_film_is_a_sequence_of_its_own():
    task = tasks.build({'kind': 'scene', 'source': True}, seed=3)
    for index in range(50):
        row = task.train[index]
        assert (row['source'] == 20).sum() == 3 * (9 - 4) and max(row['source'].max(), row['tokens'].max()) < task.vocab_size
        for i in np.flatnonzero(row['weights']):
            frame, place = row['tokens'][i - 1] - 8, row['tokens'][i] - 11
            assert row['targets'][i] == row['source'][9 * frame + place]


def test_side_inputs_agree():
    row = tasks.build({'kind': 'scene'}).train[0]
    seen = row['visual']
    assert np.array_equal(row['features'].argmax(-1)[seen], row['channel'][seen]) and not row['features'][~seen].any()
    assert np.array_equal(row['box'][:, 0] + 3 * row['box'][:, 1], row['channel'])
    assert np.allclose(row['distances'], np.linalg.norm(row['coordinates'][:, None] - row['coordinates'], axis=-1))
    assert np.array_equal(row['edges'] == 0, row['frame'][:, None] == row['frame'])
    assert np.array_equal(row['markers'] == 1, seen & (row['tokens'] < 4))
    assert np.array_equal(row['time'][seen], row['frame'][seen]) and np.all(np.diff(row['time'][~seen]) == 1)


def test_it_has_what_mechanisms_read():
    from attnx import catalog

    task = tasks.build({'kind': 'scene'})
    row = task.train[0]
    for entry in catalog.scan().values():
        for name, kind in entry.inputs.items():
            wanted = side_input(kind, 1, task.length)
            assert (row[name].shape, row[name].dtype) == (wanted.shape[1:], wanted.dtype), (entry.name, name)


def test_errors():
    with pytest.raises(ValueError, match='must fit the 9 places'):
        tasks.build({'kind': 'scene', 'objects': 10})
    with pytest.raises(ValueError, match='has length 21'):
        tasks.build({'kind': 'scene'}, length=32)
