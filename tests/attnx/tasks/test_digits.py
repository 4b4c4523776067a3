"""Digits: shapes, and that nothing of an image is lost in the cutting."""

import numpy as np
import pytest

from attnx import tasks


@pytest.mark.parametrize('patch, length', [(1, 64), (2, 16), (4, 4), (8, 1)])
def test_patches(patch, length):
    task = tasks.build({'kind': 'digits', 'patch': patch})
    row = task.train[0]
    assert row['inputs'].shape == (task.length, task.features) == (length, patch**2)
    assert row['inputs'].dtype == np.float32
    assert 0 <= row['inputs'].min() <= row['inputs'].max() <= 1
    assert row['positions'].tolist() == list(range(length))
    assert row['label'].dtype == np.int32
    assert 0 <= row['label'] < task.num_classes == 10
    assert task.grid == (8 // patch, 8 // patch)
    pixels = tasks.build({'kind': 'digits', 'patch': 1}).train[0]['inputs'].reshape(8, 8)
    side = 8 // patch
    image = row['inputs'].reshape(side, side, patch, patch).swapaxes(1, 2).reshape(8, 8)
    np.testing.assert_array_equal(image, pixels)


def test_split_is_fixed_disjoint_and_whole():
    one, two = (tasks.build({'kind': 'digits', 'patch': 1, 'discrete': True}, seed=seed) for seed in (0, 1))
    assert one.vocab_size == 17
    rows = [source[i]['tokens'].tobytes() for source in (one.train, one.evaluation) for i in range(len(source))]
    assert len(set(rows)) == len(rows) == 1797
    assert len(one.evaluation) == 359
    assert all(one.train[i]['tokens'].tobytes() == two.train[i]['tokens'].tobytes() for i in range(20))


@pytest.mark.parametrize('config, length, message', [
    ({'patch': 3}, 0, 'must be 1, 2, 4 or 8'), ({'patch': 2, 'discrete': True}, 0, 'needs patch 1'),
    ({'patch': 2}, 64, 'length 16'),
])
def test_errors(config, length, message):
    with pytest.raises(ValueError, match=message):
        tasks.build({'kind': 'digits'} | config, length=length)
