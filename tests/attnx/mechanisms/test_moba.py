"""Block attention: the choice against a loop, and the cases in which it is full attention."""

import numpy as np
import pytest

from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close, positions_of


def visible(q, k, block, top_k):
    """bool [B, N, T, S] by a loop over queries: the definition, one document."""
    batch, length, n, _ = q.shape
    k = np.repeat(k, n // k.shape[2], axis=2)
    seen = np.zeros((batch, n, length, length), bool)
    for b, h, t in np.ndindex(batch, n, length):
        own = t // block
        gate = [q[b, t, h] @ k[b, i * block : (i + 1) * block, h].mean(axis=0) for i in range(own)]
        for i in [own, *np.argsort(gate)[::-1][: top_k - 1]]:
            seen[b, h, t, i * block : (i + 1) * block] = True
    return seen & oracle.causal(length)


def parts(mixer, x):
    n, k = mixer.config.num_heads, mixer.num_kv_heads
    q, key = oracle.turn(oracle.heads(x, mixer.query, n)), oracle.turn(oracle.heads(x, mixer.key, k))
    return q, key, oracle.heads(x, mixer.value, k)


@pytest.mark.parametrize(('block', 'top_k', 'length'), [(4, 2, 22), (3, 3, 22), (1, 4, 9), (4, 1, 10)])
def test_is_its_definition(block, top_k, length):
    mixer = oracle.build('moba', num_heads=4, num_kv_heads=2, block=block, top_k=top_k)
    x = oracle.inputs(length=length)
    q, k, v = parts(mixer, x)
    expected = oracle.project(oracle.attend(q, k, v, visible(q, k, block, top_k)), mixer.out)
    close(oracle.run(mixer, x), expected, tolerances.FLOAT32)


@pytest.mark.parametrize(('block', 'top_k', 'length'), [(4, 99, 22), (64, 1, 22)])
def test_is_full_attention_where_all_is_chosen(block, top_k, length):
    mixer = oracle.build('moba', num_heads=4, num_kv_heads=2, block=block, top_k=top_k)
    x = oracle.inputs(length=length)
    full = oracle.build('gqa', num_heads=4, num_kv_heads=2)
    for name in ('query', 'key', 'value', 'out'):
        getattr(full, name).kernel[...] = getattr(mixer, name).kernel[...]
    close(oracle.run(mixer, x), oracle.run(full, x), tolerances.FLOAT32)


def test_documents_count_their_own_blocks():
    mixer, x = oracle.build('moba', num_heads=2, block=3, top_k=2), oracle.inputs(length=30, batch=1)
    lengths = (8, 1, 13, 2, 6)
    ids = np.repeat(np.arange(1, 6), lengths)[None].astype(np.int32)
    run = lambda x, ids: oracle.run(mixer, x, segment_ids=ids, positions=positions_of(ids))
    packed = run(x, ids)
    at = 0
    for length in lengths:
        alone, real = np.roll(x, -at, axis=1), (np.arange(30) < length).astype(np.int32)[None]
        close(packed[:, at : at + length], run(alone, real)[:, :length], tolerances.FLOAT32)
        at += length
