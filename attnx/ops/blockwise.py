"""The blockwise form of softmax attention, with its own backward; `attnx.ops.softmax_attention` says what it computes.

FlashAttention's recurrence (arXiv:2205.14135, 2307.08691; before it Rabe and Staats, arXiv:2112.05682) in plain XLA: an
online softmax over key blocks, and a backward that recomputes the weights from lse. Blocks that the mask leaves empty are
skipped (`pallas_kernels.blocks`). No [T, S] array exists at any point, but for operands that the caller brings.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnx.derivatives import once, with_forward_mode
from attnx.ops import tiles
from pallas_kernels import blocks, elementwise
from pallas_kernels import dropout as drop
from pallas_kernels.elementwise import Index, Operand
from pallas_kernels.statistics import asked, of_rows


def accumulator(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def clean(x):
    """x with zeros for what is not finite, and 0 or NaN for each of its vectors: NaN where there was such."""
    finite = jnp.isfinite(x)
    poison = jnp.where(finite.all(-1), 0.0, jnp.nan).astype(accumulator(x.dtype))
    return jnp.where(finite, x, 0), lax.stop_gradient(poison)


def hidden(seen, x, fill):
    """x where it is seen. A score is given harmless values elsewhere, or the zero cotangent of a masked pair would meet
    the infinite derivative of a masked NaN, and 0 · NaN is NaN."""
    return jnp.where(seen, x, fill) if seen is not None and jnp.issubdtype(x.dtype, jnp.floating) else x


def largest(s):
    """The maximum over keys, +inf where there is NaN: XLA's on a CPU drops NaN, and a row of NaN would look empty."""
    return jnp.where(jnp.isnan(s), jnp.inf, s).max(-1)


def returned(out, lse, rows, sinks, return_lse, return_stats):
    """What the op returns. rows: largest logit and, for the entropy, mean of the logits under the weights."""
    stats = asked(return_stats)
    top, mean = (*rows, None, None)[:2]
    results = [out, *([lse] if return_lse else []), *([of_rows(stats, lse, top, mean, sinks)] if stats else [])]
    return tuple(results) if len(results) > 1 else out


class _Static(NamedTuple):
    T: int
    S: int
    bq: int
    bk: int
    scale: float
    stats: tuple[str, ...]


def _block(n, limit):
    """The largest block: n where it is within the limit, else the count of blocks shares n out in multiples of 8."""
    if n <= limit:
        return n
    count = -(-n // limit)
    return -(-n // (8 * count)) * 8


def _block_sizes(B, N, T, S):
    """One block for short sequences; few queries (decoding) take many keys at once; many heads bound the tile."""
    limit = 256
    while limit > 128 and B * N * min(T, limit) * min(S, limit) > 2**24:
        limit //= 2
    bq = _block(T, limit)
    return bq, _block(S, max(limit, limit * limit // bq))


def attend(
    query,
    key,
    value,
    *,
    mask,
    score,
    bias=None,
    scale,
    sinks,
    dropout,
    return_lse=False,
    return_stats=False,
    block_sizes=None,
):
    B, T, N, _ = query.shape
    st, arrays = _arranged(query, key, value, mask, score, scale, sinks, dropout, asked(return_stats), block_sizes)
    out, *rows = with_forward_mode(functools.partial(_attend, st), functools.partial(_forward, st))(*arrays)
    out = jnp.transpose(out, (1, 0, 4, 2, 3, 5)).reshape(B, -1, N, out.shape[-1])[:, :T]
    lse, *rows = (jnp.moveaxis(x, 0, 3).reshape(B, N, -1)[..., :T] for x in rows)
    return returned(out, lse, rows, sinks, return_lse, return_stats)


def backward(query, key, value, *, seen, mask, score, scale, dropout):
    """(dq, dk, dv, dscore) of `attend` over these keys, given seen = (out, lse, dout, dlse) over these keys and others."""
    out, lse, dout, dlse = seen

    def recalled(query, key, value, score):
        st, arrays = _arranged(query, key, value, mask, score, scale, None, dropout)
        B, K = key.shape[0], key.shape[2]
        rows = lambda x: _padded(x, 1, st.bq).reshape(B, -1, st.bq, K, x.shape[2] // K, *x.shape[3:])
        outs = [jnp.transpose(rows(x), (1, 0, 3, 4, 2, 5)) for x in (out, dout)]
        lses = [jnp.transpose(rows(jnp.moveaxis(x, 1, 2)), (1, 0, 3, 4, 2)) for x in (lse, dlse)]
        return _recalled(st, outs[0], lses[0], *arrays), (outs[1], lses[1])

    _, pull, cotangents = jax.vjp(recalled, query, key, value, score, has_aux=True)
    return pull(cotangents)


def _arranged(query, key, value, mask, score, scale, sinks, dropout, stats=(), block_sizes=None):
    """(what is static, what `_attend` takes)."""
    (B, T, N, H), (_, S, K, _) = query.shape, key.shape
    bq, bk = block_sizes or _block_sizes(B, N, T, S)
    st = _Static(T, S, bq, bk, scale, stats)
    nq, nk = -(-T // bq), -(-S // bk)
    q = _padded(jnp.asarray(query), 1, bq).reshape(B, nq, bq, K, N // K, H)
    q, poison_q = clean(jnp.transpose(q, (1, 0, 3, 4, 2, 5)))
    (k, poison_k), (v, poison_v) = (clean(jnp.moveaxis(_padded(jnp.asarray(x), 1, bk), 1, 2)) for x in (key, value))
    # For each query block: how many key blocks to visit, and which.
    visits = None if nq == nk == 1 else blocks.lists(blocks.union(blocks.classify(mask, B, N, T, S, bq, bk)))[:2]
    fit = lambda o: Operand(tiles.fitted(o, st), o.index)
    mask, score = (jax.tree.map(fit, x, is_leaf=lambda y: isinstance(y, Operand)) for x in (mask, score))
    sinks = None if sinks is None else jnp.asarray(sinks, accumulator(q.dtype))
    return st, _same_axes((q, k, v, poison_q, poison_k + poison_v, visits, mask, score, sinks, dropout))


def _padded(x, axis, block):
    n = -x.shape[axis] % block
    return jnp.pad(x, [(0, n if a == axis else 0) for a in range(x.ndim)]) if n else x


def _same_axes(tree):
    """Inside `jax.shard_map`: all arrays vary over the same mesh axes, so that loops' carries and cotangents do."""
    axes = set()
    for x in jax.tree.leaves(tree):
        axes |= _axes(x)
    return jax.tree.map(lambda x: _vary(x, axes), tree) if axes else tree


def _axes(x):
    kind = getattr(jax.typeof(x), 'manual_axis_type', None)
    return set() if kind is None else set(kind.varying)


def _vary(x, axes):
    missing = tuple(sorted(set(axes) - _axes(x)))
    return lax.pcast(x, missing, to='varying') if missing else x


_FIRST_ORDER = "softmax_attention: impl 'xla' has first-order derivatives only; impl='reference' has higher ones"


# Shapes below, T and S padded to blocks: q [nq, B, K, G, bq, H], k [B, K, S, H], v [B, K, S, Hv], out as q with Hv, lse
# [nq, B, K, G, bq]; poison_q as lse and poison_k [B, K, S] hold 0 or NaN, to add to the logits.


class _Tile(NamedTuple):
    """One block of logits [B, N, bq, bk] and what its backward needs."""

    s: jax.Array
    seen: jax.Array | None
    pull: Any
    index: Index


def _logits(st, i, j, q, k, poison_q, poison_k, mask, score):
    """Tile (i, j). q [B, K, G, bq, H], k [B, K, bk, H], poison_q [B, K, G, bq], poison_k [B, K, bk]."""
    B, K, G, bq, H = q.shape
    bk = k.shape[2]
    dtype = accumulator(q.dtype)
    s = jnp.einsum('bkrh,bksh->bkrs', q.reshape(B, K, G * bq, H), k, preferred_element_type=dtype) * st.scale
    s = s.reshape(B, K, G, bq, bk) + poison_q[..., None] + poison_k[:, :, None, None]
    s = s.reshape(B, K * G, bq, bk)
    number = lambda n, axis: lax.broadcasted_iota(jnp.int32, tuple(n if a == axis else 1 for a in range(4)), axis)
    index = Index(number(B, 0), number(K * G, 1), number(bq, 2) + i * bq, number(bk, 3) + j * bk, st.T, st.S)
    seen = None
    if mask is not None:
        operands, call = elementwise.flatten(mask)
        seen = call(index, [tiles.spread(o, tiles.part(o, o.array, st, i, j), st) for o in operands])
    if st.S % st.bk:
        inside = index.k < st.S
        seen = inside if seen is None else seen & inside
    operands, call = ([], None) if score is None else elementwise.flatten(score)

    def finish(s, slices):
        if call is not None:
            values = [hidden(seen, tiles.spread(o, x, st), 1) for o, x in zip(operands, slices)]
            s = call(hidden(seen, s, 0), index, values)
        return hidden(seen, s, -jnp.inf)

    s, pull = jax.vjp(finish, s, [tiles.part(o, o.array, st, i, j) for o in operands])
    return _Tile(s, seen, pull, index)


def _fresh(like, *shapes_and_fills):
    """Constant arrays that vary over the same mesh axes as `like`, to start a loop from."""
    axes = _axes(like)
    return tuple(_vary(jnp.full(shape, fill, dtype), axes) for shape, fill, dtype in shapes_and_fills)


def _over_queries(visits, carry, xs, row):
    """Scans `row(carry, i, x, visit)` over query blocks; `visit(step, inner)` runs `step(j, inner)` over key blocks."""
    if visits is None:
        carry, y = row(carry, 0, jax.tree.map(lambda x: x[0], xs), lambda step, inner: step(0, inner))
        return carry, jax.tree.map(lambda y: y[None], y)

    def body(carry, x):
        i, count, order, x = x
        return row(carry, i, x, lambda step, inner: lax.fori_loop(0, count, lambda n, c: step(order[n], c), inner))

    count, order = map(jnp.asarray, visits)
    return lax.scan(body, carry, (jnp.arange(len(count), dtype=jnp.int32), count, order, xs))


def _columns(x, st, j):
    return lax.dynamic_slice_in_dim(x, j * st.bk, st.bk, 2)


def _forward(st, q, k, v, poison_q, poison_k, visits, mask, score, sinks, dropout):
    _, B, K, G, bq, _ = q.shape
    N, Hv, dtype = K * G, v.shape[-1], accumulator(q.dtype)

    def row(carry, i, x, visit):
        q, poison = x

        def step(j, state):
            top, total, acc, *mean = state
            vj = _columns(v, st, j)
            tile = _logits(st, i, j, q, _columns(k, st, j), poison, _columns(poison_k, st, j), mask, score)
            new = lax.stop_gradient(jnp.maximum(top, largest(tile.s)))
            shift = jnp.where(new == -jnp.inf, 0, new)
            p = jnp.exp(tile.s - shift[..., None])
            decay = jnp.exp(top - shift)
            total = total * decay + p.sum(-1)
            if mean:
                mean = [mean[0] * decay + (p * jnp.where(tile.s == -jnp.inf, 0, tile.s)).sum(-1)]
            if dropout is not None:
                p = jnp.where(drop.keep(dropout.seed, *tile.index[:4], dropout.rate), p, 0)
            read = jnp.einsum(
                'bkrs,bksv->bkrv',
                p.astype(v.dtype).reshape(B, K, G * bq, st.bk),
                vj,
                preferred_element_type=dtype,
            )
            return new, total, acc * decay[..., None] + read.reshape(B, N, bq, Hv), *mean

        rows = (B, N, bq)
        means = [(rows, 0, dtype)] * ('entropy' in st.stats)
        start = [(rows, -jnp.inf, dtype), (rows, 0, dtype), ((*rows, Hv), 0, dtype), *means]
        top, total, acc, *mean = visit(step, _fresh(q, *start))
        empty = top == -jnp.inf
        shift = jnp.where(empty, 0, top)
        if sinks is not None:
            sink = sinks[:, None]
            shift, old = lax.stop_gradient(jnp.maximum(shift, sink)), shift
            decay = jnp.exp(old - shift)
            mean = [x * decay for x in mean]
            acc, total = acc * decay[..., None], total * decay + jnp.exp(sink - shift)
        total = jnp.where(empty, 1, total)
        keep = 1.0 if dropout is None else dropout.inverse_keep
        out = jnp.where(empty[..., None], 0, acc * (keep / total)[..., None]).astype(v.dtype)
        lse = jnp.where(empty, -jnp.inf, shift + jnp.log(total))
        rows = [lse, *([top] if st.stats else []), *(x / total for x in mean)]
        return carry, (out.reshape(B, K, G, bq, Hv), *(x.reshape(B, K, G, bq) for x in rows))

    return _over_queries(visits, (), (q, poison_q), row)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(st, q, k, v, poison_q, poison_k, visits, mask, score, sinks, dropout):
    return _forward(st, q, k, v, poison_q, poison_k, visits, mask, score, sinks, dropout)


def _attend_fwd(st, *arrays):
    arrays = once(arrays, _FIRST_ORDER)
    results = _forward(st, *arrays)
    return results, (arrays, *results[:2])


def _attend_bwd(st, saved, cotangents):
    (q, k, v, poison_q, poison_k, visits, mask, score, sinks, dropout), out, lse = once(saved, _FIRST_ORDER)
    dout, dlse = once(cotangents[:2], _FIRST_ORDER)
    _, B, K, G, bq, H = q.shape
    N, Hv, dtype = K * G, v.shape[-1], accumulator(q.dtype)
    operands = [] if score is None else elementwise.flatten(score)[0]
    floating = [jnp.issubdtype(jnp.result_type(o.array), jnp.floating) for o in operands]
    # A row without cotangent is dead: it adds nothing, were it NaN. One with a cotangent that is not finite is all NaN.
    live = (dout != 0).any(-1) | (dlse != 0)
    finite = jnp.isfinite(dout)
    delta = jnp.where(live, (out.astype(dtype) * dout.astype(dtype)).sum(-1) - dlse, 0)
    base = jnp.where(finite.all(-1), lse, jnp.nan)
    dout = jnp.where(finite, dout, 0)

    def row(carry, i, x, visit):
        q, poison, dout, base, delta, live = x
        dout = dout.reshape(B, K, G * bq, Hv)
        base, delta, live = (y.reshape(B, N, bq, 1) for y in (base, delta, live))

        def step(j, state):
            dq, dk, dv, grads = state
            kj, vj = _columns(k, st, j), _columns(v, st, j)
            tile = _logits(st, i, j, q, kj, poison, _columns(poison_k, st, j), mask, score)
            seen = live if tile.seen is None else live & tile.seen
            p = jnp.where(seen, jnp.exp(tile.s - base), 0)
            dp = jnp.einsum('bkrv,bksv->bkrs', dout, vj, preferred_element_type=dtype).reshape(p.shape)
            weights = p
            if dropout is not None:
                kept = drop.keep(dropout.seed, *tile.index[:4], dropout.rate)
                weights, dp = (jnp.where(kept, y * dropout.inverse_keep, 0) for y in (p, dp))
            ds, slices = tile.pull(jnp.where(seen, p * (dp - delta), 0))
            ds = (ds * st.scale).astype(q.dtype).reshape(B, K, G * bq, st.bk)
            weights = weights.astype(v.dtype).reshape(ds.shape)
            dots: Any = {'preferred_element_type': dtype}
            dq += jnp.einsum('bkrs,bksh->bkrh', ds, kj, **dots)
            dk = _add_columns(dk, jnp.einsum('bkrs,bkrh->bksh', ds, q.reshape(B, K, G * bq, H), **dots), st, j)
            dv = _add_columns(dv, jnp.einsum('bkrs,bkrv->bksv', weights, dout, **dots), st, j)
            grads = [tiles.add(g, o, x, st, i, j) if f else g for g, o, x, f in zip(grads, operands, slices, floating)]
            return dq, dk, dv, grads

        (dq,) = _fresh(q, ((B, K, G * bq, H), 0, dtype))
        dq, *carry = visit(step, (dq, *carry))
        return tuple(carry), dq.reshape(B, K, G, bq, H).astype(q.dtype)

    start = _fresh(q, (k.shape, 0, dtype), (v.shape, 0, dtype))
    grads: Any = [_fresh(q, (jnp.shape(o.array), 0, dtype))[0] if f else () for o, f in zip(operands, floating)]
    xs = (q, poison_q, dout, base, delta, live)
    (dk, dv, grads), dq = _over_queries(visits, (*start, grads), xs, row)
    dscore = None
    if score is not None:
        leaves, tree = jax.tree.flatten(score)
        dscore = jax.tree.unflatten(
            tree,
            [
                g.astype(x.dtype) if f else np.zeros(jnp.shape(x), jax.dtypes.float0)
                for g, x, f in zip(grads, leaves, floating)
            ],
        )
    dsinks = None
    if sinks is not None:
        share = jnp.exp(sinks.reshape(K, G, 1) - jnp.where(lse == -jnp.inf, jnp.inf, base))
        dsinks = -jnp.where(live, share * delta, 0).sum((0, 1, 4)).reshape(N)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None, None, None, dscore, dsinks, None


def _add_columns(total, part, st, j):
    return lax.dynamic_update_slice_in_dim(total, _columns(total, st, j) + part, j * st.bk, 2)


_attend.defvjp(_attend_fwd, _attend_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recalled(st, out, lse, *arrays):
    """What is known of `_attend`, with its backward."""
    return out, lse


_recalled.defvjp(
    lambda st, out, lse, *arrays: ((out, lse), (arrays, out, lse)),
    lambda st, saved, cotangents: (None, None, *_attend_bwd(st, saved, cotangents)),
)
