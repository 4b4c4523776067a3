"""T = (I + diag(b) L)^-1 of every chunk, L_ij = k_i . k_j decayed from j to i for j < i."""

import jax.numpy as jnp

from pallas_kernels.gated_linear.sweep import CHUNK


def inverses(k, beta, decay, *, interpret=False):
    """Computed by XLA, in float32.

    Args:
      k: [B, T', heads, K], bfloat16.
      beta: float32 [B, N, chunks, 64].
      decay: as in the gated linear sweep, or None.

    Returns:
      bfloat16 [B, N, chunks, 2, 64, 64]: high and low terms, whose sum is T to 16 bits.
    """
    del interpret
    B, T, heads, K = k.shape
    N = beta.shape[1]
    k = jnp.pad(k, [(0, 0), (0, -T % CHUNK), (0, 0), (0, 0)]).reshape(B, -1, CHUNK, heads, K)
    products = jnp.einsum('bcihk,bcjhk->bhcij', k, k, preferred_element_type=jnp.float32)
    products = jnp.repeat(products, N // heads, 1)
    if decay is not None:
        products = products * jnp.exp2(jnp.minimum(decay[..., :, None] - decay[..., None, :], 0))
    strict = jnp.tril(jnp.ones((CHUNK, CHUNK), bool), -1)
    inverse = unit_lower_inverse(jnp.where(strict, products * beta[..., :, None], 0))
    high = inverse.astype(jnp.bfloat16)
    low = (inverse - high.astype(jnp.float32)).astype(jnp.bfloat16)
    return jnp.stack([high, low], axis=3)


def unit_lower_inverse(a):
    """(I + a)^-1 for strictly lower triangular a [..., C, C]: blocks of 1, 2, 4, ..., each pair merged.

    [[X, 0], [c, Y]]^-1 = [[X^-1, 0], [-Y^-1 c X^-1, Y^-1]]. A series in powers of a would cancel for keys that repeat.
    """
    size = a.shape[-1]
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=a.dtype), a.shape)
    half = 1
    while half < size:
        i = jnp.arange(size)
        corner = (i[:, None] // half == i[None, :] // half + 1) & (i[:, None] // half % 2 == 1)
        both = jnp.matmul(jnp.where(corner, a, 0), inverse, precision='highest')
        inverse = inverse - jnp.matmul(inverse, both, precision='highest')
        half *= 2
    return inverse
