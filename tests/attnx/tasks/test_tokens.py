"""Token files: every token predicted once, segments at separators, and errors for the wrong dtype or vocabulary."""

import pickle

import numpy as np
import pytest

from attnx import tasks


def write(path, tokens, dtype='uint16'):
    np.asarray(tokens, dtype).tofile(path)
    return str(path)


@pytest.mark.parametrize('dtype', ['uint16', 'uint32'])
@pytest.mark.parametrize('count', [100, 101, 129, 1000])
def test_every_token_is_predicted_once(tmp_path, dtype, count):
    path = write(tmp_path / 'a.bin', np.arange(count), dtype)
    config = {'kind': 'tokens', 'path': path, 'vocab_size': count, 'dtype': dtype, 'validation': 0.1}
    task = tasks.build(config, length=32)
    cut = count - round(count * 0.1)
    for source, want in ((task.train, range(1, cut)), (task.evaluation, range(cut + 1, count))):
        rows = [source[i] for i in range(len(source))]
        assert [int(t) for r in rows for t in r['targets'][r['weights'] > 0]] == list(want)
        assert all((r['targets'] - r['tokens'] == 1)[r['weights'] > 0].all() for r in rows)
    assert not task.packed


def test_separator_begins_segments(tmp_path):
    path = write(tmp_path / 'a.bin', [0, 5, 6, 0, 7, 8, 9, 0, 4] * 20)
    task = tasks.build({'kind': 'tokens', 'path': path, 'vocab_size': 10, 'separator': 0}, length=8)
    row = task.train[0]
    assert row['segment_ids'].tolist() == [1, 1, 1, 2, 2, 2, 2, 3]
    assert row['positions'].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    row = task.train[1]         # begins within a document
    assert row['tokens'].tolist() == [4, 0, 5, 6, 0, 7, 8, 9]
    assert row['segment_ids'].tolist() == [1, 2, 2, 2, 3, 3, 3, 3]
    assert task.packed and task.start == 0


def test_several_files_and_pickle(tmp_path):
    for i in range(3):
        write(tmp_path / f'{i}.bin', np.arange(50) + 100 * i)
    held = write(tmp_path / 'held.dat', np.arange(50))
    task = tasks.build({'kind': 'tokens', 'path': str(tmp_path / '*.bin'), 'validation_path': held, 'vocab_size': 300},
                       length=20)
    source = pickle.loads(pickle.dumps(task.train))
    assert len(source) == 9         # windows do not cross files
    assert [int(source[i]['tokens'][0]) for i in range(9)] == [b + s for b in (0, 100, 200) for s in (0, 20, 40)]


def test_errors(tmp_path):
    path = write(tmp_path / 'a.bin', np.arange(70000) % 60000, 'uint32')
    with pytest.raises(ValueError, match='is not below vocab_size 50000; is dtype'):
        tasks.build({'kind': 'tokens', 'path': path, 'vocab_size': 50000, 'dtype': 'uint32'})
    (tmp_path / 'odd.bin').write_bytes(b'abc')
    with pytest.raises(ValueError, match='not a whole number'):
        tasks.build({'kind': 'tokens', 'path': str(tmp_path / 'odd.bin')})
    with pytest.raises(ValueError, match='no file matches'):
        tasks.build({'kind': 'tokens', 'path': str(tmp_path / 'none.bin')})
    with pytest.raises(ValueError, match="'path' must name"):
        tasks.build({'kind': 'tokens'})
    with pytest.raises(ValueError, match="did you mean 'uint16'"):
        tasks.build({'kind': 'tokens', 'path': path, 'dtype': 'int16'})
    with pytest.raises(ValueError, match='both path and validation_path'):
        tasks.build({'kind': 'tokens', 'path': path, 'validation_path': path, 'vocab_size': 60000, 'dtype': 'uint32'})
