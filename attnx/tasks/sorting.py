"""Sorting: different numbers, then the same in ascending order.

A row of n = length / 2 numbers: `x1 … xn SEP y1 … y(n-1)`, targets `y1 … yn` from SEP on; only these count. Numbers are ids
0 … V - 2, each at most once; SEP is the last id. Harder with a longer row and a larger range.

Paper: Pointer networks (1506.03134) sort so; the sizes are ours.
Differs: numbers are tokens, answers are tokens rather than pointers.
"""

import dataclasses

import numpy as np

from attnx.tasks.base import Task, generated, require, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 33            # V: numbers and the separator
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


ELSEWHERE = {'long': {'length': '×2'}}


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    length = length or 16
    require(length >= 4 and length % 2 == 0, f'sorting needs an even length >= 4, got {length}')
    n = length // 2
    require(config.vocab_size > n, f'sorting {n} different numbers needs vocab_size > {n}, got {config.vocab_size}')

    def make(rng):
        numbers = rng.choice(config.vocab_size - 1, n, replace=False)
        whole = np.concatenate([numbers, [config.vocab_size - 1], np.sort(numbers)])
        return row(whole[:-1], whole[1:], np.arange(2 * n) >= n, length=length)

    return Task(kind='sorting', length=length, vocab_size=config.vocab_size, **generated(make, config, seed))
