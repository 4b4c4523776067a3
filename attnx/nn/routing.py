"""Routing of tokens to heads or experts: the choice, the statistics of balance losses, and products by chosen expert."""

import jax
import jax.numpy as jnp

from attnx.spec import Context


def top_k(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of [..., E]: (indices int32 [..., k], bool [..., E]); ties go to the lower index."""
    chosen = jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1]
    return chosen, jnp.any(chosen[..., None] == jnp.arange(scores.shape[-1]), axis=-2)


def mean_over_tokens(x: jax.Array, ctx: Context) -> jax.Array:
    """[B, T, …] -> […]: the mean over tokens that are no padding, float32."""
    x = x.astype(jnp.float32)
    if ctx.segment_ids is None:
        return x.mean(axis=(0, 1))
    real = (ctx.segment_ids > 0).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
    return jnp.where(real, x, 0).sum(axis=(0, 1)) / jnp.maximum(real.sum(), 1)


def mutual_information(task: jax.Array, probs: jax.Array, num_tasks: int, segment_ids: jax.Array | None = None) -> jax.Array:
    """Of task and expert, nats, float32 []: task int32 [B, T], probs [B, T, E] the share of each expert in a token."""
    member = jax.nn.one_hot(task, num_tasks)
    joint = mean_over_tokens(member[..., None] * probs[:, :, None], Context(segment_ids=segment_ids))
    joint = joint / jnp.maximum(joint.sum(), 1e-9)
    independent = joint.sum(0, keepdims=True) * joint.sum(1, keepdims=True)
    some = joint > 0
    ratio = jnp.where(some, joint, 1) / jnp.where(some, independent, 1)
    return jnp.sum(joint * jnp.log(ratio))


def expert_product(x: jax.Array, kernels: jax.Array, chosen: jax.Array) -> jax.Array:
    """Each token's product with the matrices of its experts; only chosen ones are computed where the platform can.

    Args:
      x: [B, T, I], or [B, T, k, I] where each choice has its own input.
      kernels: [E, I, O].
      chosen: int [B, T, k], experts of each token.

    Returns:
      [B, T, k, O].
    """
    batch, length, k = chosen.shape
    experts = chosen.reshape(-1)
    order = jnp.argsort(experts, stable=True)
    rows = jnp.broadcast_to(x[:, :, None] if x.ndim == 3 else x, (*chosen.shape, x.shape[-1])).reshape(-1, x.shape[-1])
    sizes = jnp.bincount(experts, length=kernels.shape[0])
    y = jax.lax.ragged_dot(rows[order], kernels.astype(x.dtype), sizes.astype(jnp.int32))
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
    return y[back].reshape(batch, length, k, -1)
