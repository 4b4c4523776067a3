"""Which tiles a block of the kernels visits, in which order, and which block does what.

NumPy: what is known while tracing costs nothing at run time. Tables that depend on data: `tables`.
"""

import functools
import heapq
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import blocks, common
from pallas_kernels.softmax_attention.backward import KEYS

# What an item of the forward kernel costs beside its key tiles, and a key tile more with the mask, in key tiles.
ITEM_COST, MASK_COST = 1.0, 0.3
STEPS = 2.0  # what a block of the backward kernel costs beside its query tiles, in query tiles
TAIL = 8  # of so many heads, the last ones, blocks are launched in turn where that ends sooner


def _placed(position, value, keep, size):
    """out[.., position] = value where `keep`, over the last axis; the rest 0."""
    shape = np.broadcast_shapes(position.shape, value.shape, keep.shape)
    position, value, keep = (np.broadcast_to(x, shape) for x in (position, value, keep))
    out = np.zeros((*shape[:-1], size + 1), np.int32)
    np.put_along_axis(out, np.where(keep, position, size), value.astype(np.int32), -1)
    return out[..., :size]


def packed(parts, rows: int, columns: int):
    """Classes of tiles of rows x columns parts; and what names a tile in a list and says which class its parts have.

    Args:
      parts: int8 [.., nq, nk], classes of smaller tiles.

    Returns:
      int8 [.., nq / rows, nk / columns], rounded up, and int32 of that shape: the key tile, then two bits for each part, of
      which part (r, c) has those from 2 * (r * columns + c) on.
    """
    xp = np if isinstance(parts, np.ndarray) else jnp
    *lead, nq, nk = parts.shape
    x = xp.pad(parts, [(0, 0)] * len(lead) + [(0, -nq % rows), (0, -nk % columns)], constant_values=blocks.EMPTY)
    x = x.astype(np.int32).reshape(*lead, -1, rows, common.cdiv(nk, columns), columns)
    bits = functools.reduce(operator.or_, (x[..., r, :, c] << 2 * (r * columns + c) for r, c in np.ndindex(rows, columns)))
    full = sum(blocks.FULL << 2 * n for n in range(rows * columns))
    classes = xp.where(bits == 0, blocks.EMPTY, xp.where(bits == full, blocks.FULL, blocks.PARTIAL)).astype(np.int8)
    return classes, (np.arange(bits.shape[-1], dtype=np.int32) << 2 * rows * columns) | bits


def forward_lists(classes, names=None):
    """Per query tile the count of key tiles to visit, the count of partial ones, and the key tiles, partial ones first.

    int8 [.., nq, nk] -> int32 [.., nq, 2 + nk]. A key tile is called by its number, or by its name.
    """
    partial, full = classes == blocks.PARTIAL, classes == blocks.FULL
    few = partial.sum(-1, dtype=np.int32)[..., None]
    position = np.where(partial, np.cumsum(partial, -1), few + np.cumsum(full, -1)) - 1
    nk = classes.shape[-1]
    entries = _placed(position, np.arange(nk) if names is None else names, partial | full, nk)
    return np.concatenate([few + full.sum(-1, dtype=np.int32)[..., None], few, entries], -1).astype(np.int32)


def agenda(B: int, N: int, nq: int, cost, together: int, processors: int):
    """Which items each block of the forward kernel does.

    An item is (b * N + h) * nq + q. There is one block per multiprocessor. Each item in turn goes to the block that is free
    first, long items of `together` heads at a time before short ones.

    Args:
      cost: [B or 1, N or 1, nq], what an item costs.

    Returns:
      bounds int32 [blocks + 1], order int32 [items]: block x does the items order[bounds[x] : bounds[x + 1]].
    """
    items = np.arange(B * N * nq, dtype=np.int32).reshape(B, N, nq)
    P = min(processors, items.size)
    cost = np.broadcast_to(cost, (B, N, nq))
    if (cost == cost[0, 0, 0]).all():
        order = items.ravel()
    else:
        heads = np.array_split(items.reshape(-1, nq), common.cdiv(B * N, together))
        order = np.concatenate([x.T[::-1].ravel() for x in heads])  # causal masks: the last query tiles see most
    rows = [[] for _ in range(P)]
    free = [(0.0, p) for p in range(P)]
    for item, work in zip(order, cost.ravel()[order]):
        t, p = heapq.heappop(free)
        rows[p].append(item)
        heapq.heappush(free, (t + work, p))
    return np.cumsum([0, *map(len, rows)], dtype=np.int32), np.concatenate(rows).astype(np.int32)


def longest_first(cost, B: int, N: int, together: int):
    """Items (b * N + h) * tiles + tile, of `together` heads at a time, the longest of all of them first.

    Launched head by head, the long ones of the last head would be under way when all else has ended.

    Args:
      cost: int32 [B or 1, N or 1, tiles]; NumPy stays NumPy.
    """
    xp = np if isinstance(cost, np.ndarray) else jnp
    tiles = cost.shape[-1]
    cost = xp.broadcast_to(cost, (B, N, tiles)).ravel()
    group = np.arange(cost.size) // (tiles * together)
    return xp.lexsort((-cost, group)).astype(np.int32)


def processors() -> int:
    try:
        return int(jax.devices('cuda')[0].core_count)
    except (RuntimeError, AttributeError):
        return 132


def divided(classes):
    """The blocks of the backward kernel for one head, in launch order.

    One for each key tile; but several for one that more than twice as many queries see as see the average key tile
    (sinks and global tokens before a window), where that is known while tracing.

    Args:
      classes: int8 [.., nq, nk].

    Returns:
      int32 [blocks, 4]: key tile, the query tiles first <= i < last that the block may visit, and the number of its part,
      -1 where the key tile is not shared.
    """
    nq, nk = classes.shape[-2:]
    if not isinstance(classes, np.ndarray):
        return np.array([(tile, 0, nq, -1) for tile in range(nk)], np.int32)
    seen = (classes != blocks.EMPTY).any(tuple(range(classes.ndim - 2)))
    count, part, rows = seen.sum(0), 0, []
    mean = max(1, math.ceil(count.mean()))
    for tile in range(nk):
        if count[tile] <= 2 * mean:
            rows.append((tile * nq // nk, tile, 0, nq, -1))
            continue
        for chunk in np.array_split(np.flatnonzero(seen[:, tile]), common.cdiv(count[tile], mean)):
            rows.append((chunk[0], tile, chunk[0], chunk[-1] + 1, part))  # launched with its neighbours
            part += 1
    return np.array(sorted(rows), np.int32)[:, 1:]


def joined(x, parts, owners):
    """The gradient of all keys, [B, S, N, H], of which `parts` [B, 128 parts, N, H] holds the sums of shared key tiles."""
    B, S, *rest = x.shape
    size = KEYS
    for tile in np.unique(owners[owners[:, 3] >= 0, 0]):
        mine = owners[(owners[:, 0] == tile) & (owners[:, 3] >= 0), 3]  # consecutive
        own = parts[:, mine[0] * size : (mine[-1] + 1) * size].reshape(B, len(mine), size, *rest)
        rows = slice(tile * size, min((tile + 1) * size, S))
        x = x.at[:, rows].set(own.sum(1, dtype=jnp.float32)[:, : rows.stop - rows.start].astype(x.dtype))
    return x


def schedule(classes, owners, together: int | None = None):
    """Which query tiles each block visits in the backward kernel, and when it may add to their dq.

    A block starts at its key tile's diagonal and wraps around, so that at any time the blocks of a head work on different
    query tiles. Additions to a query tile happen in the order of nominal time, position in the visiting block's list.
    That order agrees with each block's own, so no cycle of waits exists as long as the blocks that wait for each other
    are resident together: `together` blocks (the number of multiprocessors) form a group, and groups follow one
    another in launch order.

    Args:
      classes: int8 [.., nq, nk].
      owners: as of `divided`.

    Returns:
      lists int32 [.., blocks, 3 + nq], ranks int32 [.., blocks, nq], by query tile, totals int32 [.., nq]: how many blocks
      visit a query tile.
    """
    together = together or processors()
    tile, first, last, part = owners.T
    nq, nk = classes.shape[-2:]
    classes = classes.swapaxes(-1, -2)
    if len(owners) > nk:
        inside = (first[:, None] <= np.arange(nq)) & (np.arange(nq) < last[:, None])
        classes = np.where(inside, classes[..., tile, :], np.int8(blocks.EMPTY))
    seen = classes != blocks.EMPTY
    start = tile * nq // nk
    nk = len(owners)
    before = np.arange(nq)[None] < start[:, None]  # visited after wrapping around
    passed = np.cumsum(seen, -1)
    skipped = (seen & before).sum(-1)[..., None]
    position = passed - 1 + np.where(before, passed[..., -1:] - skipped, -skipped)
    time = position + (np.arange(nk) // together * nq)[:, None]
    late = np.where(seen, time, np.iinfo(np.int32).max)
    rank = np.argsort(np.argsort(late, axis=-2, stable=True), axis=-2)
    entries = _placed(position, 2 * np.arange(nq) + (classes == blocks.PARTIAL), seen, nq)
    count = seen.sum(-1)[..., None]
    block = np.broadcast_to(np.stack([tile, part], -1), (*count.shape[:-1], 2))
    lists = np.concatenate([count, block, entries], -1).astype(np.int32)
    return lists, np.where(seen, rank, 0).astype(np.int32), seen.sum(-2, dtype=np.int32)


def in_turn(lists, heads: int, tail: int):
    """Ranks for the `tail` last heads, whose blocks are launched in turn: the long ones of all, then the shorter ones.

    Blocks go to the multiprocessor that is free first; ranks follow the times that this gives. A contribution waits for
    earlier ones only, and when a block is launched, at most as many others are under way as there are multiprocessors,
    less one: so of those that run, one never waits for what is not launched yet.

    Args:
      lists: as of `schedule`.

    Returns:
      int32 [tail, blocks, nq], or None where nothing is gained, or the lists depend on data or on the head.
    """
    tail = min(tail, heads)
    if tail < 2 or not isinstance(lists, np.ndarray) or lists.shape[:2] != (1, 1):
        return None
    lists = lists[0, 0]
    n, nq = len(lists), lists.shape[1] - 3
    counts = lists[:, 0]
    before = min(heads - tail, common.cdiv(4 * processors(), n))  # of those before, what sets when the tail starts

    def times(order):
        """When blocks start, and when all have ended."""
        free, started = [0.0] * processors(), []
        for count in counts[order]:
            started.append(heapq.heappop(free))
            heapq.heappush(free, started[-1] + count + STEPS)
        return np.array(started), max(free)

    head_by_head = np.tile(np.arange(n), before + tail)
    order = np.concatenate([np.tile(np.arange(n), before), np.repeat(np.arange(n), tail)])
    started, end = times(order)
    if end > 0.99 * times(head_by_head)[1]:
        return None
    started = started[before * n :].reshape(n, tail).T
    visited = np.arange(nq) < counts[:, None]
    tile = np.where(visited, lists[:, 3:] // 2, nq)
    block = np.arange(n)[:, None]
    late = np.full((tail, n, nq + 1), np.inf)
    late[:, block, tile] = started[:, :, None] + np.arange(nq)
    rank = np.argsort(np.argsort(late, axis=1, stable=True), axis=1)
    return np.where(late < np.inf, rank, 0)[..., :nq].astype(np.int32)
