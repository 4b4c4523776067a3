"""What `dots` keeps for the backward pass: products and kernels' outputs, and nothing of forms that do not run."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attnx import dispatch, ops
from attnx.nn import Linear
from attnx.spec import Dims
from pallas_kernels import kept


@pytest.mark.parametrize(('policy', 'products'), [(kept.POLICY, 2), (None, 3)], ids=['dots', 'full'])
def test_products_are_not_computed_again(policy, products):
    layer = Linear(8, 8, ('embed', 'mlp'), Dims(width=8), rngs=nnx.Rngs(0), bias=True)
    loss = jax.checkpoint(lambda x: jnp.sin(layer(jnp.cos(x))).sum(), policy=policy)
    assert str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((4, 8)))).count('dot_general') == products


@pytest.mark.parametrize('policy', [None, kept.POLICY], ids=['none', 'dots'])
def test_a_form_that_does_not_run_keeps_nothing(policy):
    """Branches for other platforms share what is kept; kernels keep the arguments, the output and its log-sum-exp."""
    x = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)

    def attend(q, k, v):
        return ops.softmax_attention(jnp.sin(q), k, v, mask=ops.masks.causal())

    attend = jax.checkpoint(attend, policy=policy) if policy else attend
    with dispatch.target('cuda'):
        pull = jax.eval_shape(lambda *a: jax.vjp(attend, *a)[1], x, x, x)
    shapes = {leaf.shape for leaf in jax.tree.leaves(pull) if leaf.size > 1024}
    assert shapes == {(1, 1024, 2, 64), (1, 2, 1024)}


def test_the_mark_changes_nothing():
    tree = {'a': jnp.arange(3.0), 'b': [jnp.ones(2)]}
    for mark in (kept.kept, kept.kept_once):
        jax.tree.map(lambda a, b: jnp.array_equal(a, b) or pytest.fail(), mark(tree), tree)
        assert jax.jit(jax.vmap(jax.grad(lambda x, m=mark: m(x) ** 2)))(jnp.ones(3)).tolist() == [2.0] * 3
