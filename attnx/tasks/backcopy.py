"""Bigram-backcopy: text of a bigram table in which some symbols, the triggers, are followed by what stood before them.

A row: BOS, a symbol of the table's stationary distribution without triggers, then: after a trigger the symbol before it, after
any other symbol a draw from its row of the table. The target is the next symbol. So two triggers never stand side by side,
and BOS is never copied. The table gives each of `vocab_size` - 1 symbols `successors` possible ones with random weights (more
even with a larger `evenness`); it depends on `table` alone, whatever the seed of the rows. The triggers are the most frequent
symbols. Attention heads of a trained model rest on BOS but at triggers. Harder with more symbols, successors and triggers.
`counted` keeps the loss to triggers or to the other symbols; to evaluate elsewhere than trained: `uniform` successors.

Paper: Active-dormant attention heads (2410.13835), sizes near its: 64 symbols, 3 triggers.
Differs: the table is drawn, not counted in Shakespeare, so rows need no file.
"""

import dataclasses
import functools

import numpy as np

from attnx.tasks.base import Task, expected, generated, require, row

COUNTED = ('all', 'triggers', 'others')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 64            # V: symbols, and BOS, the last id
    successors: int = 8             # of each symbol
    evenness: float = 1.0           # of their weights: of a Dirichlet distribution
    num_triggers: int = 3           # the most frequent symbols
    uniform: bool = False           # successors are equally likely instead
    counted: str = 'all'            # targets that count: all, triggers (after one), others
    table: int = 0                  # which table
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


ELSEWHERE = {'uniform': {'uniform': True}, 'long': {'length': '×2'}}


@functools.cache
def bigrams(vocab_size: int, successors: int, evenness: float, table: int) -> tuple[np.ndarray, np.ndarray]:
    """The table [V - 1, V - 1] of next symbols, and its stationary distribution [V - 1]; rows sum to 1."""
    n = vocab_size - 1
    rng, found = np.random.default_rng((2410, 13835, table)), np.zeros((n, n))
    for i in range(n):
        # One successor is a neighbour on a ring, so that every symbol is reached.
        others = rng.choice(np.delete(np.arange(n), (i + 1) % n), successors - 1, replace=False)
        found[i, np.append(others, (i + 1) % n)] = rng.dirichlet(np.full(successors, evenness))
    marginal = np.full(n, 1 / n)
    for _ in range(1000):
        marginal = 0.5 * (marginal + marginal @ found)  # half a step: a ring of two would swing
    return found, marginal / marginal.sum()


def entropy(p: np.ndarray) -> np.ndarray:
    """Nats, over the last axis."""
    return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)


def chances(config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the best prediction is made of: next symbols [V - 1, V - 1], the first symbol [V - 1], the triggers."""
    table, marginal = bigrams(config.vocab_size, config.successors, config.evenness, config.table)
    triggers = np.sort(np.argsort(-marginal, kind='stable')[:config.num_triggers])
    first = marginal.copy()
    first[triggers] = 0
    if config.uniform:
        table = (table > 0) / (table > 0).sum(1, keepdims=True)
    return table, first / first.sum(), triggers


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    length, vocab = length or 64, config.vocab_size
    require(vocab >= 4, f'backcopy needs vocab_size >= 4, got {vocab}')
    require(length >= 3, f'backcopy needs length >= 3, got {length}')
    require(1 <= config.successors < vocab, f'backcopy: successors must lie in [1, {vocab - 1}], got {config.successors}')
    require(0 <= config.num_triggers < vocab - 1,
            f'backcopy: num_triggers must lie in [0, {vocab - 2}], got {config.num_triggers}')
    require(config.evenness > 0, f'backcopy: evenness must be positive, got {config.evenness}')
    require(config.counted in COUNTED, expected('backcopy counted', config.counted, COUNTED))
    table, first, triggers = chances(config)
    copies = np.isin(np.arange(vocab), triggers)
    steps, begin = table.cumsum(1), first.cumsum()
    steps[:, -1] = begin[-1] = 1.0

    def make(rng):
        draws, symbols = rng.random(length), np.full(length + 1, vocab - 1)
        symbols[1] = np.searchsorted(begin, draws[0], 'right')
        for t in range(1, length):
            last = symbols[t]
            symbols[t + 1] = symbols[t - 1] if copies[last] else np.searchsorted(steps[last], draws[t], 'right')
        at = copies[symbols[:-1]]
        return row(symbols[:-1], symbols[1:], {'all': None, 'triggers': at, 'others': ~at}[config.counted], length=length)

    return Task(kind='backcopy', length=length, vocab_size=vocab, **generated(make, config, seed))
