"""The tables of `schedule` for masks whose blocks depend on data, by small kernels, a thread a row, item or visit.

A chain of XLA kernels makes them too, but each takes about as long as one of these.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common
from pallas_kernels.blocks import EMPTY, FULL, PARTIAL
from pallas_kernels.softmax_attention import schedule

# Threads of a block that work: few where each writes to a row of its own, of which a multiprocessor stores one in two cycles.
FEW, MANY = 4, 128
NEVER = np.int32(2**31 - 1)
AT_A_TIME = 16  # numbers that a thread loads before it looks at them: memory answers to all at once


def forward_lists(classes):
    """As `schedule.forward_lists`; what stands behind a row's key tiles is undefined."""
    return _forward(classes)[0]


def forward(classes, names, B: int, N: int, processors: int):
    """As `schedule.forward_lists`, and an agenda as of `schedule.agenda`.

    Of 2 P neighbouring items at a time each of P blocks gets two, the n-th longest and the n-th shortest: they add up to
    about the same for all, and the blocks are at work on the same few heads, whose keys and values stay in the L2 cache.

    Args:
      classes: int8 [B or 1, N or 1, nq, nk].
      names: int32 of that shape, of the key tiles, or None.

    Returns:
      lists, bounds and order.
    """
    n = B * N * classes.shape[2]
    P = min(processors, n)
    real = np.arange(common.cdiv(n, 2 * P) * 2 * P).reshape(-1, 2, P) < n  # by rank: the shortest are not there
    bounds = np.cumsum([0, *(real[:, 0].sum(0) + real[:, 1, ::-1].sum(0))], dtype=np.int32)
    return _forward(classes, names, B, N, bounds)


def _forward(classes, names=None, B=1, N=1, bounds=None):
    *lead, nq, nk = classes.shape
    rows, n = math.prod(lead) * nq, 0 if bounds is None else B * N * nq
    partial = classes == PARTIAL
    few = partial.sum(-1, dtype=jnp.int32)
    cost = jnp.where(classes == EMPTY, 0, jnp.where(partial, 1 + schedule.MASK_COST, 1.0)).sum(-1, dtype=jnp.float32)

    def kernel(classes_ref, names_ref, few_ref, cost_ref, bounds_ref, lists_ref, order_ref):
        def listed(row):
            few = few_ref[row]

            def load(tile):
                return classes_ref[row, tile].astype(jnp.int32), tile if names_ref is None else names_ref[row, tile]

            def step(_, loaded, places):
                (found, name), (partial, full) = loaded, places
                # Where this tile is empty, the next one overwrites it.
                lists_ref[row, lax.select(found == PARTIAL, partial, full) + 2] = name
                return partial + (found == PARTIAL), full + (found == FULL)

            _, count = _walk(0, nk, load, step, (jnp.int32(0), few))
            lists_ref[row, 0] = count
            lists_ref[row, 1] = few

        def cost_of(item):
            head = lax.div(item, nq)
            b, h = lax.div(head, N) if lead[0] > 1 else 0, lax.rem(head, N) if lead[1] > 1 else 0
            return cost_ref[(b * lead[1] + h) * nq + lax.rem(item, nq)]

        def dealt(item):
            P = bounds_ref.shape[0] - 1
            group = lax.div(item, 2 * P)
            mine = cost_of(item)

            def step(other, cost, rank):
                return rank + ((other < n) & ((cost > mine) | ((cost == mine) & (other < item))))

            first = group * 2 * P
            rank = _walk(first, 2 * P, lambda other: cost_of(jnp.minimum(other, n - 1)), step, jnp.int32(0))
            late = rank >= P
            block = jnp.where(late, 2 * P - 1 - rank, rank)
            order_ref[bounds_ref[block] + 2 * group + late] = item

        def work(task):
            pl.when(task < rows)(lambda: listed(task))
            if n:
                pl.when((task >= rows) & (task < rows + n))(lambda: dealt(task - rows))

        _each(FEW, work)

    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    out = ints(rows, 2 + nk), ints(n) if n else None
    flat = lambda x: x if x is None else x.reshape(rows, nk)
    lists, order = _run(kernel, out, (rows + n, FEW), flat(classes), flat(names), few.ravel(), cost.ravel(), bounds)
    return lists.reshape(*lead, nq, 2 + nk), bounds, order


def backward(classes, together: int):
    """As `schedule.schedule`, a block a key tile, by two kernels; what stands behind a block's query tiles, and ranks where
    a block does not visit, are undefined.

    Args:
      classes: int8 [B or 1, N or 1, nq, nk].
    """
    *lead, nq, nk = classes.shape
    heads = math.prod(lead)

    def listing(classes_ref, lists_ref, times_ref):
        def work(row):
            head, block = lax.div(row, nk), lax.rem(row, nk)
            start = lax.div(block * nq, nk)
            before = lax.div(block, together) * nq

            def tile(n):
                n = start + n
                return lax.select(n < nq, n, n - nq)

            def step(n, found, count):
                lists_ref[row, 3 + count] = 2 * tile(n) + (found == PARTIAL)
                times_ref[head * nq + tile(n), block] = lax.select(found == EMPTY, NEVER, before + count)
                return count + (found != EMPTY)

            @pl.when(row < heads * nk)
            def _():
                load = lambda n: classes_ref[head * nq + tile(n), block].astype(jnp.int32)
                count = _walk(0, nq, load, step, jnp.int32(0))
                for at, value in enumerate((count, block, jnp.int32(-1))):
                    lists_ref[row, at] = value

        _each(FEW, work)

    def ranking(times_ref, ranks_ref, totals_ref):
        def work(visit):
            row, block = lax.div(visit, nk), lax.rem(visit, nk)
            head, tile = lax.div(row, nq), lax.rem(row, nq)

            @pl.when(row < heads * nq)
            def _():
                mine = times_ref[row, block]

                def step(other, time, carry):
                    rank, total = carry
                    return rank + ((time < mine) | ((time == mine) & (other < block))), total + (time < NEVER)

                rank, total = _walk(0, nk, lambda n: times_ref[row, n], step, (jnp.int32(0), jnp.int32(0)))
                ranks_ref[head * nk + block, tile] = rank
                totals_ref[row] = total

        _each(MANY, work)

    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    listed = ints(heads * nk, 3 + nq), ints(heads * nq, nk)
    lists, times = _run(listing, listed, (heads * nk, FEW), classes.reshape(heads * nq, nk))
    ranks, totals = _run(ranking, (ints(heads * nk, nq), ints(heads * nq)), (heads * nq * nk, MANY), times)
    return lists.reshape(*lead, nk, 3 + nq), ranks.reshape(*lead, nk, nq), totals.reshape(*lead, nq)


def _walk(first, size: int, load, step, carry):
    """carry = step(n, load(n), carry) for first <= n < first + size."""

    def some(at, count, carry):
        values = [load(at + n) for n in range(count)]
        for n, value in enumerate(values):
            carry = step(at + n, value, carry)
        return carry

    whole = size // AT_A_TIME
    if whole:
        loop = pl.loop(0, whole, init_carry=carry)
        carry = loop(lambda n, carry: some(first + n * AT_A_TIME, AT_A_TIME, carry))
    return some(first + whole * AT_A_TIME, size % AT_A_TIME, carry)


def _each(threads: int, work):
    """work(n) for the block's tasks."""
    common.each_thread(threads, lambda thread: work(lax.axis_index('block') * threads + thread))


def _run(kernel, out_type, tasks: tuple[int, int], *arrays):
    """`tasks`: how many, and how many of them a block does."""
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(common.cdiv(*tasks),),
        grid_names=('block',),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(*arrays)
