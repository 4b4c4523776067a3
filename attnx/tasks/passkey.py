"""Passkey: digits hidden somewhere in noise, to be recalled at the end.

A row: noise, `KEY d1 … dn`, noise, `QUERY d1 … dn`; the targets are the digits after QUERY, and only they count. Digits are
ids 0 … 9, noise `num_fillers` further ids, then KEY, QUERY and the names of distractors. `depth` fixes the share of the
noise that stands before the key, -1 draws it. Harder with a longer row and with distractors: blocks of other names.

Paper: Landmark attention (2305.16300), passkey retrieval; distractors as in RULER (2404.06654).
Differs: tokens instead of English sentences.
"""

import dataclasses

import numpy as np

from attnx.tasks.base import Task, generated, require, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_digits: int = 5             # of a key
    num_fillers: int = 16           # ids of the noise
    num_distractors: int = 0        # blocks of other names and digits
    depth: float = -1.0             # share of the noise before the key, in [0, 1]; -1: drawn for every row
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


ELSEWHERE = {'long': {'length': '×2'}, 'four times': {'length': '×4'}}


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    length, n, others = length or 64, config.num_digits, config.num_distractors
    noise = length - (others + 2) * (n + 1) + 1     # the last digit is a target only
    require(n >= 1 and config.num_fillers >= 1 and others >= 0, 'passkey: num_digits and num_fillers must be positive')
    require(noise >= 0, f'passkey with {n} digits and {others} distractors needs length >= {length - noise}, got {length}')
    require(config.depth == -1 or 0 <= config.depth <= 1, f'passkey: depth must be -1 or in [0, 1], got {config.depth}')
    key, query = 10 + config.num_fillers, 11 + config.num_fillers

    def make(rng):
        names = np.concatenate([[key], query + 1 + rng.permutation(others)])
        digits = rng.integers(0, 10, (others + 1, n))
        places = rng.integers(0, noise + 1, others + 1)
        if config.depth >= 0:
            places[0] = round(config.depth * noise)
        filler = rng.integers(10, 10 + config.num_fillers, noise)
        order, parts, at = np.argsort(places, kind='stable'), [], 0
        for block in order:
            parts += [filler[at : places[block]], names[block : block + 1], digits[block]]
            at = places[block]
        whole = np.concatenate([*parts, filler[at:], [query], digits[0]])
        return row(whole[:-1], whole[1:], np.arange(length) >= length - n, length=length)

    return Task(kind='passkey', length=length, vocab_size=query + 1 + others, **generated(make, config, seed))
