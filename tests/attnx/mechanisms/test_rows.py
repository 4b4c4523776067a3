"""Mechanisms whose pairs are taken some rows at a time give the same however many: outputs and gradients."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx import catalog
from tests import tolerances
from tests.laws import BATCH, LENGTH, case, close, positions_of

OPS = ('attnx.ops.weighted_attention', 'attnx.ops.selective_attention')
NAMES = ('selective', 'daft', 'decoupled_embeddings', 'knowledge_markers', 'luong', 'neural_attention', 'shaw',
         'steerable', 'talking_heads')  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_rows(name, monkeypatch):
    c = case(name)
    # Not the laws' own: there a vector of `steerable` is so short that the gradient of its norm is rounding.
    x = jnp.asarray(np.random.default_rng(5).standard_normal(c.x.shape), jnp.float32)
    ids = jnp.repeat(jnp.array([[1] * 9 + [2] * (LENGTH - 9)], jnp.int32), BATCH, axis=0)

    def run(module, x):
        ctx = c.context(x, ids, positions_of(ids))
        out = module(x, ctx)
        return jnp.sum(jnp.sin(out.y)), (out.y, dict(out.aux))

    trace = lambda: jax.jit(jax.grad(lambda m, x: run(m, x), argnums=(0, 1), has_aux=True))(c.module, x)
    grads, whole = trace()
    for module in (*map(importlib.import_module, OPS), catalog.module(name)):
        if hasattr(module, 'num_rows'):
            monkeypatch.setattr(module, 'num_rows', lambda *args: 7)
    row_grads, rows = trace()
    for a, b in zip(jax.tree.leaves(rows), jax.tree.leaves(whole)):
        close(a, b, tolerances.FLOAT32)
    for a, b in zip(jax.tree.leaves(row_grads), jax.tree.leaves(grads)):
        close(np.asarray(a), np.asarray(b), tolerances.FLOAT32_GRAD)
