"""Induction: what followed the special token the first time follows it again.

A row: random symbols with the special token S at a random place, then its answer a, and S as the last token:
`x x S a x x x S`; the target of the last position is a, and only that counts. Harder with a longer row (train at one
length, evaluate at longer ones) and with more symbols.

Paper: Mamba (2312.00752), section 4.1.2, sizes as there: 16 symbols.
Differs: the special token is an id of its own, so no ordinary symbol can be mistaken for it.
"""

import dataclasses

import numpy as np

from attnx.tasks.base import Task, generated, require, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 16            # symbols, the special token (the last id) included
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


ELSEWHERE = {'long': {'length': '×2'}, 'four times': {'length': '×4'}}


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    length = length or 64
    special = config.vocab_size - 1
    require(length >= 3, f'induction needs length >= 3, got {length}')
    require(config.vocab_size >= 3, f'induction needs vocab_size >= 3, got {config.vocab_size}')

    def make(rng):
        tokens = rng.integers(0, special, length)
        place = rng.integers(0, length - 2)
        tokens[[place, -1]] = special
        targets = np.append(tokens[1:], tokens[place + 1])
        return row(tokens, targets, np.arange(length) == length - 1, length=length)

    return Task(kind='induction', length=length, vocab_size=config.vocab_size, **generated(make, config, seed))
