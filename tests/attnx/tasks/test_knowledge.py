"""Known phrases in token sequences."""

import numpy as np
import pytest

from attnx.tasks import knowledge

TOKENS = [5, 1, 2, 3, 9, 1, 2, 7, 4, 1, 2, 3]
PHRASES = [(1, 2), (1, 2, 3), (4,)]


def test_the_longest_phrase_is_found_from_left_to_right():
    assert knowledge.phrases_in(TOKENS, PHRASES) == [(1, 4), (5, 7), (8, 9), (9, 12)]
    assert knowledge.markers(TOKENS, PHRASES).tolist() == [0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1]
    assert knowledge.phrases_in([1, 1, 2], [(1, 1), (1, 2)]) == [(0, 2)]


def test_pivots_follow_phrases_and_leave_the_rest():
    tokens, kept = knowledge.with_pivots(TOKENS, PHRASES, first=100, again=101)
    assert tokens.tolist() == [5, 1, 2, 3, 100, 9, 1, 2, 100, 7, 4, 100, 1, 2, 3, 101]
    assert tokens[kept].tolist() == TOKENS
    same, kept = knowledge.with_pivots(TOKENS, [(8,)], first=100, again=101)
    assert same.tolist() == TOKENS and kept.all() and same.dtype == np.int32


def test_an_empty_phrase_is_refused():
    with pytest.raises(ValueError, match='a phrase is empty'):
        knowledge.phrases_in(TOKENS, [()])
