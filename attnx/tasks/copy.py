"""Copy: repeat a random sequence after a separator.

A row, with n content tokens: `c1 … cn SEP c1 … c(n-1)`, targets `c2 … cn SEP c1 … cn`; only the second `c1 … cn`
counts. Harder with: a longer row; a wider range of n (with one fixed n, looking back a constant offset is enough);
fewer symbols (repeats make the look-up ambiguous).
"""

import dataclasses

import numpy as np

from attnx.tasks.base import Task, generated, require, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 32            # symbols, the separator (the last id) included
    shortest: float = 0.5           # n is drawn from [shortest * T/2, T/2]; 1 fixes it
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


ELSEWHERE = {'long': {'length': '×2'}}


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    length = length or 64
    longest = length // 2
    require(length >= 2, f'copy needs length >= 2, got {length}')
    require(config.vocab_size >= 3, f'copy needs vocab_size >= 3, got {config.vocab_size}')
    require(0 < config.shortest <= 1, f'copy: shortest must lie in (0, 1], got {config.shortest}')
    shortest = max(1, round(config.shortest * longest))

    def make(rng):
        n = rng.integers(shortest, longest + 1)
        content = rng.integers(0, config.vocab_size - 1, n)
        tokens = np.concatenate([content, [config.vocab_size - 1], content])
        return row(tokens[:-1], tokens[1:], np.arange(2 * n) >= n, length=length)

    return Task(kind='copy', length=length, vocab_size=config.vocab_size, **generated(make, config, seed))
