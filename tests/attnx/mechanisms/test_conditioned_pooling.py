"""Conditions: concatenation adds to scores, a saturated gate is plain pooling; values are never conditioned."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import tolerances
from tests.attnx.mechanisms import oracle
from tests.laws import close


@pytest.mark.parametrize('condition', ['concat', 'gate', 'affine'])
def test_conditions(condition):
    mixer, x = oracle.build('conditioned_pooling', causal=False, condition=condition, num_features=3), oracle.inputs()
    features = np.random.default_rng(1).standard_normal((2, 12, 3)).astype(np.float32)
    score = np.asarray(mixer.score[...], np.float64)
    if condition == 'concat':
        logits = x @ score[:16] + features @ score[16:]
    else:
        for linear in filter(None, (mixer.scale, mixer.shift)):
            linear.kernel[...] = jnp.zeros_like(linear.kernel[...])
        if condition == 'gate':
            mixer.scale.bias[...] = jnp.full((16,), 40.0)
        logits = x @ score
    w = np.exp(logits)
    pooled = np.einsum('bs,bsm->bm', w / w.sum(-1, keepdims=True), x)[:, None]
    y = oracle.run(mixer, x, inputs={'features': features})
    close(y, np.broadcast_to(pooled, x.shape), tolerances.FLOAT32)


def test_refuses_features_of_another_width():
    mixer = oracle.build('conditioned_pooling', num_features=3)
    with pytest.raises(ValueError, match=r'num_features.*\[2, 12, 4\]'):
        oracle.run(mixer, oracle.inputs(), inputs={'features': np.zeros((2, 12, 4), np.float32)})
