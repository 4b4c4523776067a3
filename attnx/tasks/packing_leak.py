"""Packing leak: documents that say nothing about themselves but everything about each other.

A row: one random string of symbols, packed `num_documents` times, each a document of its own (segment, positions from 0). The
target is the next symbol of the document; only those of the second document on count. A model that keeps documents apart
can do no better than chance: loss log(vocab_size) nats, accuracy 1 / vocab_size. Less loss on rows held out is a leak from one
document to another. `joined` puts all into one document: the control, in which a model that can copy succeeds. Easier to
exploit with fewer symbols and more documents.

Ours: no paper has it; it does by training what a law of every mechanism does by changing a token.
"""

import dataclasses

import numpy as np

from attnx.tasks.base import Task, generated, require, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 16            # V, symbols
    num_documents: int = 4          # in a row; the row's length is shared out evenly
    joined: bool = False            # all in one document: the control
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


ELSEWHERE = {'more': {'num_documents': '×2', 'length': '×2'}}


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    length, count, vocab = length or 64, config.num_documents, config.vocab_size
    size = length // count if count else 0
    require(count >= 2 and vocab >= 2, f'packing_leak needs num_documents and vocab_size >= 2, got {count} and {vocab}')
    require(size >= 3, f'packing_leak: {count} documents need length >= {3 * count}, got {length}')
    n = size * count

    def make(rng):
        string, at = rng.integers(0, vocab, size), np.arange(n)
        # the last symbol of a document has no successor in it
        counts = (at >= size) & ((at + 1) % size > 0)
        out = row(np.tile(string, count), np.tile(np.roll(string, -1), count), counts, length=length)
        if not config.joined:
            out['segment_ids'][:n] = 1 + at // size
            out['positions'][:n] = at % size
        return out

    return Task(kind='packing_leak', length=length, vocab_size=vocab, packed=not config.joined,
                documents=1 if config.joined else count, **generated(make, config, seed))
