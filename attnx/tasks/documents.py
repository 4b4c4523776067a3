"""Rows of language from one long array of tokens in which every document begins with a separator.

The array reads `SEP a1 … an SEP b1 … bm SEP`. Position i is an input and position i + 1 its target, so every token is
predicted exactly once in an epoch (a document's first token from its SEP, its end as the next SEP) and no target
belongs to another document than its input.
"""

import dataclasses

import numpy as np

from attnx.tasks.base import blank


def pieces(bounds: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts documents into pieces of at most `length` inputs; a document's last piece is what is left.

    Args:
      bounds: [documents + 1] positions of all separators, the closing one included.

    Returns:
      start and size of each piece, in order.
    """
    sizes = np.diff(bounds)
    counts = -(-sizes // length)
    offset = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * length
    return np.repeat(bounds[:-1], counts) + offset, np.minimum(length, np.repeat(sizes, counts) - offset)


def first_fit(sizes: np.ndarray, length: int, seed: int, bins: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Packs pieces into rows: each goes, in random order, to the first of the open rows in which it fits.

    At most `bins` rows are open; where none has room, the oldest is closed. Full pieces are rows of their own.

    Returns:
      order, bounds: row r holds the pieces `order[bounds[r]:bounds[r + 1]]`.
    """
    free: list[int] = []
    members: list[list[int]] = []
    closed = np.flatnonzero(sizes == length)[:, None].tolist()
    short = np.random.default_rng(seed).permutation(np.flatnonzero(sizes < length))
    for piece, size in zip(short.tolist(), sizes[short].tolist()):
        for b, room in enumerate(free):
            if size <= room:
                free[b] -= size
                members[b].append(piece)
                break
        else:
            if len(free) == bins:
                free.pop(0)
                closed.append(members.pop(0))
            free.append(length - size)
            members.append([piece])
    rows = closed + members
    order = np.array([piece for r in rows for piece in r], np.int64)
    return order, np.cumsum([0] + [len(r) for r in rows])


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows of whole pieces of documents, one after the other; what is left of a row is padding."""

    data: np.ndarray        # tokens, as described at the top
    start: np.ndarray       # of each piece
    size: np.ndarray        # of each piece, in inputs
    order: np.ndarray       # pieces in the order of their rows
    bounds: np.ndarray      # [rows + 1] into order
    length: int             # T

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def documents(self) -> int:
        """The most documents that a row holds."""
        return int(np.diff(self.bounds).max())

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        out, at = blank(self.length), 0
        for segment, piece in enumerate(self.order[self.bounds[index]:self.bounds[index + 1]], 1):
            start, size = self.start[piece], self.size[piece]
            here = slice(at, at + size)
            out['tokens'][here] = self.data[start:start + size]
            out['targets'][here] = self.data[start + 1:start + size + 1]
            out['weights'][here] = 1
            out['segment_ids'][here] = segment
            out['positions'][here] = np.arange(size)
            at += size
        return out


def packed(data: np.ndarray, bounds: np.ndarray, length: int, seed: int, share: bool = True) -> Packed:
    """Documents of `data` as rows of `length`; share: several pieces may share a row."""
    start, size = pieces(bounds, length)
    if share:
        order, rows = first_fit(size, length, seed)
    else:
        order, rows = np.arange(len(size)), np.arange(len(size) + 1)
    return Packed(data, start, size, order, rows, length)
