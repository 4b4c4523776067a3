"""State tracking: the running product of permutations; with two elements, parity.

A row: random elements of the symmetric group on `points` letters, numbered in lexicographic order; the target at
every place is the product so far (later elements act after earlier ones). points 2: tokens are bits and the target
their parity. 3 is solvable, 5 is not: one layer of a diagonal recurrence or attention can not track it at any length.
Harder with a longer row: train short, evaluate long.

Paper: The illusion of state in state-space models (2404.08819); parity as in Delétang et al. (2207.02098).
Differs: all elements of the group are drawn, with no identity padding.
"""

import dataclasses
import itertools
import math

import numpy as np

from attnx.tasks.base import Task, generated, require, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    points: int = 2                 # letters that are permuted: 2 to 5; the vocabulary is points!
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


ELSEWHERE = {'long': {'length': '×2'}, 'four times': {'length': '×4'}}


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    length = length or 32
    require(2 <= config.points <= 5, f'parity: points must lie in [2, 5], got {config.points}')
    elements = np.array(list(itertools.permutations(range(config.points))))
    code = elements @ config.points ** np.arange(config.points)
    number = np.full(code.max() + 1, -1)
    number[code] = np.arange(len(elements))
    # after[a, b]: the element that does a first, then b
    after = number[elements[:, elements].swapaxes(0, 1) @ config.points ** np.arange(config.points)]

    def make(rng):
        tokens = rng.integers(0, len(elements), length)
        return row(tokens, list(itertools.accumulate(tokens, lambda a, b: after[a, b])), length=length)

    return Task(kind='parity', length=length, vocab_size=math.factorial(config.points), **generated(make, config, seed))
