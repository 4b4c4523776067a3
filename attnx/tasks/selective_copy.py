"""Selective copy: content at random places among noise, to be repeated in order after the row.

A row: `num_content` symbols 1 … V - 2 at random places among `length - 2 num_content` zeros, then as many markers V - 1; the
target of marker k is the k-th content symbol, and only markers count. Outputs are not fed back. Harder with more content and a
longer row; denser or sparser with another length for the same content.

Paper: Mamba (2312.00752), section 4.1.1; the task is of Jing et al. (1706.02222). Sizes there: V 16, 16 symbols, 4,096 places.
Differs: nothing.
"""

import dataclasses

import numpy as np

from attnx.tasks.base import Task, generated, require, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 16            # V: 0 is noise, the last id the marker
    num_content: int = 8            # symbols to repeat
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


ELSEWHERE = {'sparse': {'length': '×3'}, 'more': {'num_content': '×2', 'length': '×2'}}


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    length, m = length or 64, config.num_content
    require(config.vocab_size >= 4, f'selective_copy needs vocab_size >= 4, got {config.vocab_size}')
    require(m >= 1 and length >= 2 * m, f'selective_copy with {m} symbols needs length >= {2 * m}, got {length}')

    def make(rng):
        tokens, targets = np.zeros(length, np.int64), np.zeros(length, np.int64)
        content = rng.integers(1, config.vocab_size - 1, m)
        tokens[np.sort(rng.choice(length - m, m, replace=False))] = content
        tokens[-m:], targets[-m:] = config.vocab_size - 1, content
        return row(tokens, targets, np.arange(length) >= length - m, length=length)

    return Task(kind='selective_copy', length=length, vocab_size=config.vocab_size, **generated(make, config, seed))
