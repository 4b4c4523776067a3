"""Multi-query associative recall: pairs of key and value, then keys to be answered with their values.

A row: `k1 v1 … kN vN` (num_passes times), then each key once more at a slot of its own among fillers; the target at a
key's second place is its value, at that same position; only those N targets count. Keys are 1 … V/2 - 1, values
V/2 … V - 1, each drawn without replacement; 0 is the filler. The slot g = 1, 2, … of a key, counted in pairs of
positions, is drawn without replacement with weight g^(power - 1). Harder with more pairs, a longer row, and power
nearer 1 (queries farther from their pairs).

Paper: Zoology (2312.04927). Its sizes: vocab_size 8192, (length, pairs) = (64, 4), (128, 8), (256, 16), (512, 64).
Differs: random fillers (the paper's later setting) are drawn from tokens that are not keys of the row.
"""

import dataclasses

import numpy as np

from attnx.tasks.base import Task, generated, require, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 256           # V, even
    num_pairs: int = 8              # N, pairs to remember, each asked once
    power: float = 0.01             # a in the slot weights g^(a - 1); 1 is uniform
    num_passes: int = 1             # times that the pairs are shown
    random_fill: bool = False       # random tokens instead of 0 between queries
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


ELSEWHERE = {'long': {'length': '×2'}, 'more pairs': {'num_pairs': '×2', 'length': '×2'}}


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    length = length or 64
    vocab, pairs = config.vocab_size, config.num_pairs
    context = 2 * pairs * config.num_passes
    slots = (length - context) // 2
    require(pairs >= 1 and config.num_passes >= 1,
            f'mqar: num_pairs and num_passes must be positive, got {pairs} and {config.num_passes}')
    require(length % 2 == 0, f'mqar needs an even length, got {length}')
    require(slots >= pairs, f'mqar with {pairs} pairs shown {config.num_passes} times needs length >= '
                            f'{context + 2 * pairs}, got {length}')
    require(vocab % 2 == 0 and vocab // 2 - 1 >= pairs,
            f'mqar with {pairs} pairs needs an even vocab_size >= {2 * pairs + 2}, got {vocab}')
    require(0 < config.power <= 1, f'mqar: power must lie in (0, 1], got {config.power}')
    log_weights = (config.power - 1) * np.log(np.arange(1, slots + 1))

    def make(rng):
        keys = 1 + rng.choice(vocab // 2 - 1, pairs, replace=False)
        values = vocab // 2 + rng.choice(vocab // 2, pairs, replace=False)
        # the largest log-weights plus Gumbel noise, in order, are draws without replacement, in order
        order = np.argsort(-(log_weights + rng.gumbel(size=slots)))[:pairs]
        places = context + 2 * order
        tokens = np.zeros(length, np.int64)
        if config.random_fill:
            tokens[:] = rng.choice(np.setdiff1d(np.arange(vocab), keys), length)
        tokens[:context] = np.tile(np.stack([keys, values], 1).ravel(), config.num_passes)
        tokens[places] = keys
        targets, weights = np.zeros(length, np.int64), np.zeros(length)
        targets[places], weights[places] = values, 1
        return row(tokens, targets, weights, length=length)

    return Task(kind='mqar', length=length, vocab_size=vocab, **generated(make, config, seed))
