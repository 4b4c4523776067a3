"""Gradients of a score's operands other than strips, blockwise in XLA: the backward kernel does not form them.

ds = p * (dp - delta) is recomputed for a block of queries at a time and pulled back through the score function.
Nothing of size T x S is held, except the gradient of an operand that has that size itself. When the gradient is not
asked for, XLA drops this code.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import common
from pallas_kernels import dropout as dropout_lib
from pallas_kernels import elementwise as ew

ROWS = 128


def _tile(operand, array, q0, rows, T, S):
    """The operand's values over queries q0 ... q0 + rows and all keys: broadcastable to [B, N, rows, S]."""
    index = operand.index
    order = sorted(index, key='bhqkd'.index)
    x = array.transpose([index.index(c) for c in order])
    if 'q' in order:
        axis = order.index('q')
        x = jnp.pad(x, [(0, rows if a == axis else 0) for a in range(x.ndim)])
        x = lax.dynamic_slice_in_dim(x, q0, rows, axis)
    if 'd' in order:
        # Row i reads the strip from T - 1 - q0 - i on: a slice, then a skew by reshaping: its transpose is a plain sum.
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(rows, 1)])
        x = lax.dynamic_slice_in_dim(x, T - q0, rows + S, x.ndim - 1)
        width = rows + S
        x = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], rows, width)).reshape(*x.shape[:-1], -1)
        x = x[..., rows - 1 : rows * width - 1].reshape(*x.shape[:-1], rows, width - 1)[..., :S]
        order = order[:-1] + ['q', 'k']
    shape = [x.shape[order.index(c)] if c in order else 1 for c in 'bhqk']
    return x.reshape(shape)


def of_score(scale, q, k, v, do, lse2, delta, mask, score, dropout, wanted):
    """The gradients of the score's operands number `wanted`."""
    leaves, tree = jax.tree.flatten(score)
    B, T, N, _ = q.shape
    S, K = k.shape[1], k.shape[2]
    G = N // K
    steps = common.cdiv(T, ROWS)
    fit = lambda x, axis: jnp.pad(x, [(0, steps * ROWS - T if a == axis else 0) for a in range(x.ndim)])
    q, k, v, do = (jnp.where(jnp.isfinite(x), x, 0) for x in (q, k, v, do))  # NaN comes in by lse2 alone
    q, do, lse2, delta = fit(q, 1), fit(do, 1), fit(lse2, 2), fit(delta, 2)
    mask_operands, mask_call = ew.flatten(mask) if mask is not None else ([], None)

    def gradient(floats, q0):
        part = lambda x, axis: lax.dynamic_slice_in_dim(x, q0, ROWS, axis)
        i = ew.Index(
            jnp.arange(B)[:, None, None, None],
            jnp.arange(N)[:, None, None],
            q0 + jnp.arange(ROWS)[:, None],
            jnp.arange(S),
            T,
            S,
        )
        pairs = lambda a, b: jnp.einsum(
            'btkgh,bskh->bkgts', part(a, 1).reshape(B, ROWS, K, G, -1), b, preferred_element_type=jnp.float32
        ).reshape(B, N, ROWS, S)
        raw = pairs(q, k) * scale

        def scored(floats):
            full = list(leaves)
            for at, x in zip(wanted, floats):
                full[at] = x
            operands, call = ew.flatten(jax.tree.unflatten(tree, full))
            values = [_tile(o, jnp.asarray(o.array), q0, ROWS, T, S) for o in operands]
            # Where nothing is seen, harmless values: 0 times the derivative of what is not finite would be NaN.
            tame = lambda x: jnp.where(visible, x, 1) if jnp.issubdtype(x.dtype, jnp.floating) else x
            return call(tame(raw), i, [tame(x) for x in values])

        visible = jnp.broadcast_to(i.q < T, raw.shape)
        if mask is not None:
            visible &= mask_call(i, [_tile(o, jnp.asarray(o.array), q0, ROWS, T, S) for o in mask_operands])
        s, pull = jax.vjp(scored, floats)
        p = jnp.where(visible, jnp.exp2(s * common.LOG2E - part(lse2, 2)[..., None]), 0.0)
        dp = pairs(do, v)
        if dropout is not None and dropout.threshold:
            keep = dropout_lib.keep(dropout.seed, i.b, i.h, i.q, i.k, dropout.rate)
            dp = jnp.where(keep, dp * dropout.inverse_keep, 0.0)
        ds = jnp.where(visible, p * (dp - part(delta, 2)[..., None]), 0.0)
        (out,) = pull(ds.astype(s.dtype))
        return out

    floats = [jnp.asarray(leaves[i]).astype(jnp.float32) for i in wanted]
    add = lambda n, total: jax.tree.map(jnp.add, total, gradient(floats, n * ROWS))
    total = lax.fori_loop(0, steps, add, [jnp.zeros_like(x) for x in floats])
    return [x.astype(jnp.result_type(leaves[at])) for at, x in zip(wanted, total)]
