"""Selective multi-head attention: heads as loops over their own tokens, all heads chosen, and what packing saves."""

import jax
import numpy as np
import pytest

from attnx.ops import masks
from pallas_kernels import blocks
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


@pytest.mark.parametrize('causal', [True, False])
def test_is_its_definition(causal):
    mixer, x = oracle.build('smha', num_heads=4, top_k=3, causal=causal), oracle.inputs()
    q, k, v = (oracle.heads(x, f, 4) for f in (mixer.query, mixer.key, mixer.value))
    logits = x @ oracle.kernel(mixer.router)
    out, visits = np.zeros_like(q), np.zeros(x.shape[:2], int)
    for b, h in np.ndindex(2, 4):
        mine = [t for t in range(12) if h in np.argsort(-logits[b, t])[:3]]
        mine_q, mine_k, mine_v = (a[b : b + 1, mine, h : h + 1] for a in (q, k, v))
        seen = oracle.causal(len(mine)) if causal else np.ones((len(mine),) * 2, bool)
        out[b, mine, h] = oracle.attend(oracle.turn(mine_q), oracle.turn(mine_k), mine_v, seen)[0, :, 0]
        visits[b, mine] += 1
    assert (visits == 3).all()
    close(oracle.run(mixer, x), oracle.project(out, mixer.out), tolerances.FLOAT32)


def test_all_heads_chosen_is_multi_head_attention():
    mixer, full, x = oracle.build('smha', num_heads=4, top_k=4), oracle.build('mha', num_heads=4), oracle.inputs()
    for name in ('query', 'key', 'value', 'out'):
        getattr(full, name).kernel[...] = getattr(mixer, name).kernel[...]
    close(oracle.run(mixer, x), oracle.run(full, x), tolerances.FLOAT32)


def test_tiles_beyond_the_fullest_head_are_skipped():
    """Half of 1024 tokens a head, at the front: of 36 causal tiles of 128, the 10 of the first half remain."""
    ids = np.zeros((3, 1024), np.int32)
    ids[:, :512] = 1
    mask = masks.causal() & masks.segments(ids)
    found = jax.jit(lambda: blocks.union(blocks.classify(mask, 3, 1, 1024, 1024, 128, 128)))()
    assert int((np.asarray(found) > 0).sum()) == 10
