"""Chained look-up: links between symbols, then questions that need several hops.

A row: `num_chains` chains of hops + 1 different symbols; every link a b as two tokens, links shuffled; then every
symbol that is not the end of its chain, in random order; the target there is the end of its chain. Only these count.
`deepest` keeps the loss to the beginnings of chains. Answering k hops takes about log2(k) + 1 layers of attention.
Harder with more hops and more chains.

Paper: Mechanism and emergence of stacked attention heads in multi-layer transformers (2411.12118) has the problem.
Differs: the token format is ours.
"""

import dataclasses

import numpy as np

from attnx.tasks.base import Task, generated, require, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_chains: int = 3             # M
    hops: int = 2                   # D: links of a chain
    symbols: int = 0                # ids; 0: as many as the chains have. More leave room for deeper chains
    deepest: bool = False           # only questions of D hops count
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


ELSEWHERE = {'deep': {'hops': '×2', 'length': '×2'}}


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    m, hops = config.num_chains, config.hops
    require(m >= 1 and hops >= 1, f'chains: num_chains and hops must be positive, got {m} and {hops}')
    length = length or 3 * m * hops
    require(length >= 3 * m * hops, f'chains with {m} chains of {hops} hops needs length >= {3 * m * hops}, got {length}')

    used = m * (hops + 1)
    symbols = config.symbols or used
    require(symbols >= used, f'chains with {m} chains of {hops} hops needs symbols >= {used} (or 0), got {symbols}')

    def make(rng):
        chains = rng.permutation(symbols)[:used].reshape(m, hops + 1)
        links = np.stack([chains[:, :-1], chains[:, 1:]], axis=-1).reshape(-1, 2)
        asked = rng.permutation(m * hops)
        tokens = np.concatenate([rng.permutation(links).ravel(), chains[:, :-1].ravel()[asked]])
        targets = np.concatenate([np.zeros(2 * m * hops, np.int64), np.repeat(chains[:, -1], hops)[asked]])
        counts = np.concatenate([np.zeros(2 * m * hops, bool), (asked % hops == 0) | (not config.deepest)])
        return row(tokens, targets, counts, length=length)

    return Task(kind='chains', length=length, vocab_size=symbols, **generated(make, config, seed))
