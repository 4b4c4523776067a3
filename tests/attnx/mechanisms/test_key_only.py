"""Weights of the key alone: the running softmax against its definition, with logits far apart, and documents."""

import numpy as np
import pytest

from attnx import ops
from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


@pytest.mark.parametrize('causal', [True, False])
def test_weighted_mean(causal):
    rng = np.random.default_rng(0)
    logits, value = 40 * rng.standard_normal((2, 19, 3)), rng.standard_normal((2, 19, 3, 4))
    ids = np.array([[1] * 7 + [2] * 9 + [0] * 3, [5] * 19])
    seen = (ids[:, :, None] == ids[:, None]) & (ids > 0)[:, :, None]
    seen = (seen & oracle.causal(19) if causal else seen)[:, None]
    masked = np.where(seen, np.moveaxis(logits, 2, 1)[:, :, None], -np.inf)
    top = np.where(seen.any(-1, keepdims=True), masked.max(-1, keepdims=True), 0)
    w = np.exp(masked - top)
    expected = np.einsum('bnts,bsnh->btnh', w / np.maximum(w.sum(-1, keepdims=True), 1e-30), value)
    out, _ = ops.weighted_mean(*(a.astype(np.float32) for a in (logits, value)), causal=causal, segment_ids=ids)
    close(out, expected, tolerances.FLOAT32)


def test_equal_logits_average():
    mixer, x = oracle.build('key_only', num_heads=2), oracle.inputs()
    mixer.query.kernel[...] = 0 * mixer.query.kernel[...]
    mean = np.cumsum(oracle.heads(x, mixer.value, 2), axis=1) / np.arange(1, 13)[:, None, None]
    close(oracle.run(mixer, x), oracle.project(mean, mixer.out), tolerances.FLOAT32)
