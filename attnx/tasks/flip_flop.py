"""Flip-flop language: a bit written is read back after instructions to ignore what comes between.

A row: length / 2 pairs of instruction and bit, instructions w (0), r (1), i (2), bits 3 and 4. The first instruction is w, the
last r, the others i with probability `ignore`, else w or r evenly. Bits after w and i are random; a bit after r is the last
one written, and only those count. Harder with more to ignore: train at 0.8, evaluate at 0.98 (sparse) and 0.1 (dense).

Paper: Exposing attention glitches with flip-flop language modeling (2306.00946). Sizes there: 512 tokens.
Differs: the loss is on the bits that are read (the paper's "clean" setting) only.
"""

import dataclasses

import numpy as np

from attnx.tasks.base import Task, generated, require, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    ignore: float = 0.8             # probability of an instruction to ignore
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


ELSEWHERE = {'sparse': {'ignore': 0.98}, 'dense': {'ignore': 0.1}, 'long': {'length': '×2'}}


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    length = length or 64
    require(length >= 4 and length % 2 == 0, f'flip_flop needs an even length >= 4, got {length}')
    require(0 <= config.ignore < 1, f'flip_flop: ignore must lie in [0, 1), got {config.ignore}')
    share = (1 - config.ignore) / 2

    def make(rng):
        orders = rng.choice(3, length // 2, p=[share, share, config.ignore])
        orders[0], orders[-1] = 0, 1
        bits = rng.integers(0, 2, length // 2)
        written = np.maximum.accumulate(np.where(orders == 0, np.arange(length // 2), 0))
        bits = np.where(orders == 1, bits[written], bits)
        tokens = np.stack([orders, bits + 3], axis=1).ravel()
        reads = np.stack([orders == 1, np.zeros_like(orders, bool)], axis=1).ravel()  # the bit is predicted at its instruction
        return row(tokens, np.append(tokens[1:], 0), reads, length=length)

    return Task(kind='flip_flop', length=length, vocab_size=5, **generated(make, config, seed))
