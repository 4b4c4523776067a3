"""The target is the source read backwards, and the decoder is given nothing else of it."""

import numpy as np
import pytest

from attnx import config as config_lib
from attnx import tasks
from attnx.train import config as train_config


def test_rows():
    task = tasks.build({'kind': 'reverse'}, length=12)
    for index in range(20):
        row = task.train[index]
        n = int(row['source_mask'].sum())
        assert row['source_mask'][:n].all() and 6 <= n <= 12
        np.testing.assert_array_equal(row['targets'][:n], row['source'][:n][::-1])
        np.testing.assert_array_equal(row['tokens'][:n], [15, *row['targets'][: n - 1]])
        np.testing.assert_array_equal(row['weights'], row['source_mask'])
        for name, value in task.train[index].items():
            np.testing.assert_array_equal(value, row[name])


@pytest.mark.parametrize(('kind', 'task'), [('decoder', 'reverse'), ('encoder_decoder', 'copy')])
def test_a_source_and_an_encoder_go_together(kind, task):
    config = config_lib.build(train_config.Config, {'model': {'kind': kind}, 'data': {'task': {'kind': task}, 'length': 8}})
    with pytest.raises(ValueError, match=f'task {task!r} has (a|no) source for an encoder, and config.model.kind is {kind!r}'):
        train_config.served(config, tasks.build({'kind': task}, length=8))
