"""Reverse: read a random sequence with an encoder, write it backwards.

A row, with n symbols: `source` c1 … cn, padded to T, with `source_mask`; `SEP cn … c2`, targets `cn … c1`. The decoder
sees nothing of the sequence but through the encoder, so that a model that does not read it stays at chance. For models of
kind encoder_decoder. Harder with: a longer row; more symbols.
"""

import dataclasses

import numpy as np

from attnx.tasks.base import Task, generated, require, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 16            # symbols, the separator (the last id) included
    shortest: float = 0.5           # n is drawn from [shortest * T, T]; 1 fixes it
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


ELSEWHERE = {'long': {'length': '×2'}}


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    length = length or 32
    require(config.vocab_size >= 3, f'reverse needs vocab_size >= 3, got {config.vocab_size}')
    require(0 < config.shortest <= 1, f'reverse: shortest must lie in (0, 1], got {config.shortest}')
    shortest = max(1, round(config.shortest * length))

    def make(rng):
        n = rng.integers(shortest, length + 1)
        content = rng.integers(0, config.vocab_size - 1, n)
        backwards = content[::-1]
        out = row(np.concatenate([[config.vocab_size - 1], backwards[:-1]]), backwards, length=length)
        source = np.zeros(length, np.int32)
        source[:n] = content
        return out | {'source': source, 'source_mask': np.arange(length) < n}

    return Task(kind='reverse', length=length, vocab_size=config.vocab_size, **generated(make, config, seed))
