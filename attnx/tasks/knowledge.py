"""Phrases that a knowledge graph knows, found in token sequences: as markers beside the tokens, or as pivot tokens among them.

Markers are the side input of attnx.mechanisms.softmax.knowledge_markers; pivots need no mechanism.

Paper: Cross-domain aspect extraction using transformers augmented with knowledge graphs, 2022, arXiv 2210.10144. Differs:
phrases are given as token sequences; where two begin at one place the longer is taken, and none overlap.
"""

from collections.abc import Iterable, Sequence

import numpy as np


def phrases_in(tokens: Sequence[int], phrases: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
    """(begin, end) of every known phrase in `tokens`, from left to right, the longest first."""
    known, tokens = {tuple(map(int, phrase)) for phrase in phrases}, [int(t) for t in tokens]
    if () in known:
        raise ValueError('a phrase is empty')
    lengths, found, at = sorted({len(phrase) for phrase in known}, reverse=True), [], 0
    while at < len(tokens):
        size = next((n for n in lengths if tuple(tokens[at : at + n]) in known), 0)
        if size:
            found.append((at, at + size))
        at += size or 1
    return found


def markers(tokens: Sequence[int], phrases: Iterable[Sequence[int]]) -> np.ndarray:
    """int32 [T]: 1 of tokens in a known phrase, else 0."""
    out = np.zeros(len(tokens), np.int32)
    for begin, end in phrases_in(tokens, phrases):
        out[begin:end] = 1
    return out


def with_pivots(
    tokens: Sequence[int], phrases: Iterable[Sequence[int]], first: int, again: int
) -> tuple[np.ndarray, np.ndarray]:
    """The sequence with a pivot token after each known phrase: `first` where it is the phrase's first time, `again` after.

    Returns:
      (tokens int32 [T + pivots], which of them were there before, bool: the weights of what is learnt from them).
    """
    out, kept, seen, at = [], [], set(), 0
    for begin, end in phrases_in(tokens, phrases):
        phrase = tuple(map(int, tokens[begin:end]))
        out += [*tokens[at:end], again if phrase in seen else first]
        kept += [True] * (end - at) + [False]
        seen.add(phrase)
        at = end
    rest = tokens[at:]
    return np.array([*out, *rest], np.int32), np.array([*kept, *[True] * len(rest)], bool)
