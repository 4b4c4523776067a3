"""Pattern-injected heads against patterns written as loops."""

import jax
import numpy as np
import pytest

from attnx.mechanisms.softmax.guided_heads import guide
from attnx.nn import Keys
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close, positions_of

TOKENS = np.array([[1, 2, 1, 0, 3, 3, 2, 1, 0, 4, 3, 2], [2, 2, 2, 2, 5, 6, 7, 0, 0, 1, 1, 8]], np.int32)
IDS = np.array([[1] * 7 + [2] * 5, [1] * 12], np.int32)
PATTERNS = ('matching', 'sentence', 'previous', 'next')


def shown(pattern, tokens, ids, i, causal):
    """The keys of token i, ends of sentences being 0, and 3 matching nothing."""
    mine = [j for j in range(len(tokens)) if ids[j] == ids[i] and (j <= i or not causal)]
    if pattern == 'matching':
        equal = [j for j in mine if tokens[j] == tokens[i] != 3 and j != i]
        return equal or mine
    if pattern == 'sentence':
        number = lambda j: sum(tokens[:j] == 0)
        return [j for j in mine if number(j) == number(i)]
    return [j for j in mine if j == i + {'previous': -1, 'next': 1}.get(pattern, 0)] if pattern else mine


def visible(patterns, causal):
    seen = np.zeros((2, 5, 12, 12), bool)
    for b, h, i in np.ndindex(2, 5, 12):
        seen[b, h, i, shown((*patterns, None)[h], TOKENS[b], IDS[b], i, causal)] = True
    return seen


@pytest.mark.parametrize('causal', [True, False])
def test_is_its_definition(causal):
    patterns = ('matching', 'sentence', 'previous', 'previous') if causal else PATTERNS
    fields = {'patterns': patterns, 'separators': (0,), 'unmatched': (3,)}
    mixer = oracle.build('guided_heads', width=20, causal=causal, num_heads=5, position='none', **fields)
    x = oracle.inputs(width=20)
    q, k, v = (oracle.heads(x, f, 5) for f in (mixer.query, mixer.key, mixer.value))
    seen = visible(patterns, causal)
    out = oracle.attend(q, k, v, seen)
    close(out[:, 1:7, 2], v[:, :6, 2], tolerances.FLOAT64)  # a neighbour's weight is 1
    context = {'segment_ids': IDS, 'positions': positions_of(IDS), 'inputs': {'tokens': TOKENS}}
    close(oracle.run(mixer, x, **context), oracle.project(out, mixer.out), tolerances.FLOAT32)
    keys = Keys(arrays=(x,), query_ids=IDS, key_ids=IDS)
    mask = jax.jit(lambda t: guide(mixer.config, keys, t, causal).operands[5].array)(TOKENS)
    assert mask.tolist() == [[sum(seen[b, 0, i]) == sum(seen[b, 4, i]) for i in range(12)] for b in (0, 1)]


def test_without_patterns_it_is_multi_head_attention():
    x, inputs = oracle.inputs(), {'tokens': TOKENS}
    plain = oracle.run(oracle.build('mha', num_heads=4), x)
    close(oracle.run(oracle.build('guided_heads', patterns=()), x, inputs=inputs), plain, tolerances.FLOAT32)


def test_refusals():
    with pytest.raises(ValueError, match="pattern 'next': a causal model"):
        oracle.build('guided_heads', patterns=('next',))
    with pytest.raises(ValueError, match="did you mean 'previous'"):
        oracle.build('guided_heads', patterns=('previus',))
    with pytest.raises(ValueError, match="no side input 'tokens'"):
        oracle.run(oracle.build('guided_heads'), oracle.inputs())
