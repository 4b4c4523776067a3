"""Missing item: all symbols but one, in random order; which is missing?

A row: of `length` symbols all but one, shuffled, then a question mark; its target is the one left out, and only that counts. A
model must see what is not there. Harder with more symbols: the length is the number of symbols.

Paper: Attention overflow (2407.13481) asks language models for the number that a shuffled list lacks.
Differs: symbols are tokens, and exactly one is missing.
"""

import dataclasses

import numpy as np

from attnx.tasks.base import Task, generated, require, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    rotated: bool = False           # ascending from a random symbol on, and round, instead of shuffled
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


ELSEWHERE = {'rotated': {'rotated': True}}


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    length = length or 16
    require(length >= 3, f'missing needs length >= 3, got {length}')

    def make(rng):
        # as many symbols as tokens: length - 1 are shown, one is not
        if config.rotated:
            order = np.roll(np.arange(length), rng.integers(length))
            left = rng.integers(length)
            order = np.append(np.delete(order, left), order[left])
        else:
            order = rng.permutation(length)
        targets = np.zeros(length, np.int64)
        targets[-1] = order[-1]
        return row(np.append(order[:-1], length), targets, np.arange(length) == length - 1, length=length)

    return Task(kind='missing', length=length, vocab_size=length + 1, **generated(make, config, seed))
