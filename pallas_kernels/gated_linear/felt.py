"""The gradient of log_decay by pairs of tokens, in float32: XLA, for results as good as float32.

A token's log-decay is felt through all that earlier tokens wrote and that it or later ones read,

    d_t = <exp(g_t) S_{t-1}, what is asked of it> = sum over j < t <= i of X_ij
    X_ij = ((q_i . k_j) (do_i . u_j) - (k_i . k_j) (w_i . u_j)) decayed from j to i        w = 0, u = v but in the delta rule

with a chunk's first state in place of the j before it, and the adjoint of its last one in place of the i after it. Sums from
token to token, d_t = d_{t+1} + a_t - b_t, would carry rounding errors through steps that let nothing else through.
"""

import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels.gated_linear.accumulate import power
from pallas_kernels.gated_linear.sweep import CHUNK, terms_of


def matmul(x, y):
    """x @ y as sums of sums of 32: one of 128, number after number, would be twice as far off."""
    parts = [slice(n, n + 32) for n in range(0, x.shape[-1], 32)]
    found = [jnp.matmul(x[..., part], y[..., part, :], precision='highest') for part in parts]
    return functools.reduce(jnp.add, found)


def felt(q, k, do, u, w, decay, state, states, dstate, dstates):
    """d without the scale, float32 [B, N, T'].

    Args:
      q, k, do, u, w: [B, T', heads, H], T' a multiple of 64, heads divisors of N; each may be a tuple of terms. w may be None.
      decay: as the sweeps take it.
      state, states: float32 [B, N, K, V] before the first chunk, None for zero, and [B, N, chunks, K, V] after each.
      dstate, dstates: likewise the adjoint after the last chunk and before each, decayed to the token that follows.
    """
    B, N, chunks = states.shape[:3]
    edge = lambda x: jnp.zeros_like(states[:, :, :1]) if x is None else x[:, :, None]
    before = jnp.concatenate([edge(state), states[:, :, :-1]], axis=2)
    after = jnp.concatenate([dstates[:, :, 1:], edge(dstate)], axis=2)

    def cut(x):
        if x is None:
            return None
        x = functools.reduce(jnp.add, (term.astype(jnp.float32) for term in terms_of(x)))
        x = jnp.repeat(x, N // x.shape[2], axis=2)
        return jnp.moveaxis(x.reshape(B, chunks, CHUNK, N, -1), 3, 1)

    q, k, do, u, w = map(cut, (q, k, do, u, w))
    coarse, fine = decay[..., 0, :], decay[..., 1, :]

    def between(begin, end):
        """The decay between two places, of sums up to them; differences of the coarse ones are exact."""
        return power(end(coarse) - begin(coarse), end(fine) - begin(fine))

    start, last = (lambda x: 0.0), (lambda x: x[..., -1:])
    row, column = (lambda x: x[..., :, None]), (lambda x: x[..., None, :])
    upper, strict = np.triu(np.ones((CHUNK, CHUNK), np.float32)), np.tri(CHUNK, k=-1, dtype=bool)
    pair = lambda x, y: matmul(x, y.swapaxes(-1, -2))
    read = lambda x, state, y: (matmul(x, state) * y).sum(-1)
    pairs, reads = pair(q, k) * pair(do, u), read(q, before, do)
    if w is not None:
        pairs, reads = pairs - pair(k, k) * pair(w, u), reads - read(k, before, w)
    later = matmul(upper, jnp.where(strict, pairs * between(column, row), 0))
    reads = between(start, lambda x: x) * reads
    writes = between(lambda x: x, last) * read(k, after, u)
    through = between(start, last) * (before * after).sum((3, 4))[..., None]
    inside = jnp.where(strict, later, 0).sum(-1)
    found = through + inside + matmul(reads, upper.T) + matmul(writes, np.float32(strict.T))
    return found.reshape(B, N, -1)
