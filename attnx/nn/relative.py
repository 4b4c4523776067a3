"""Logits that depend on the distance of query and key through a product with the query: for `ops.weighted_attention`."""

import jax
import jax.numpy as jnp

from attnx.nn.state import Keys


def distances(keys: Keys, i) -> jax.Array:
    """int32 [1, 1, t, S]: slot of the key minus slot of the query, at the Index i of some rows and all keys."""
    far, ahead = keys.distances(), i.k - i.q
    return ahead if far is None else far[jnp.clip(ahead + (i.q_len - 1), 0, far.size - 1)]


def lookup(query: jax.Array, table: jax.Array, where: jax.Array) -> jax.Array:
    """q . table[where]: query [B, t, N, H], table [L, H] or [L, N, H], where int [1, 1, t, S] -> float32 [B, N, t, S].

    All L products of a row are made and picked from: O(t (L + S)) memory, no [t, S, H] array. Entries of `where` outside
    the table give 0.
    """
    letters = 'lh' if table.ndim == 2 else 'lnh'
    rows = jnp.einsum(f'btnh,{letters}->bntl', query, table.astype(query.dtype), preferred_element_type=jnp.float32)
    inside = (where >= 0) & (where < table.shape[0])
    picked = jnp.broadcast_to(jnp.where(inside, where, 0), (*rows.shape[:3], where.shape[3]))
    return jnp.where(inside, jnp.take_along_axis(rows, picked, axis=3), 0)
