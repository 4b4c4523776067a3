"""Gradients of a score's operands on TPU, one kernel for each: ds times the score's derivative by it, summed over pairs.

The tiles are those of the backward kernel, in its order, [k, q]; s, p and ds are had again from the log-sum-exp (two of its
five products), so that XLA drops the whole call where the gradient is not asked for. A number for each batch and head, a
vector or a strip is summed in the chip's memory in float32, in the order of steps; a dense operand's tile is written once,
and the batches or heads that share it follow each other on the grid's last axis.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import blocks, tpu
from pallas_kernels import elementwise as ew
from pallas_kernels.softmax_attention import functions
from pallas_kernels.softmax_attention import mosaic_tpu_tiles as tiles
from pallas_kernels.softmax_attention.mosaic_tpu_tiles import LANES, LOG2E, SUBLANES, Step

NT = (((1,), (1,)), ((), ()))


def gradient(q, k, v, do, lse, delta, classes, *, spec, sizes, scale, which):
    """The gradient of operand number `which` of the score.

    Args: as of `mosaic_tpu_backward.backward`; all queries are summed over.

    Returns:
      float32, of the operand's shape.
    """
    (B, N, _, H), (K, _, Hv), dtype = q.shape, v.shape[1:], q.dtype
    T, S, bq, bk, part, group = sizes.T, sizes.S, sizes.queries, sizes.keys, sizes.part, N // K
    wanted = spec.score.operands[which]
    letters = {c for c, n in zip(wanted.index, wanted.array.shape) if n > 1 or c in 'qkd'}
    dense, kind = {'q', 'k'} <= letters, functions.kind(wanted.index, True)
    own = [not dense or c in letters for c in 'bh']  # what keeps an axis of the grid; the rest shares the last one
    for axis in (0, 1):
        classes = classes if own[axis] else tiles.united(classes, axis)
    table, steps = tiles.words(classes.swapaxes(-1, -2))
    lead, present = table.shape[:2], tiles.kinds(classes.swapaxes(-1, -2))
    outer = tuple(n if keep else 1 for n, keep in zip((B, N), own))
    shared = B * N // (outer[0] * outer[1])
    heads = 1 if own[1] else N
    member = lambda i, j, r: (i if own[0] else r // heads, j if own[1] else r % heads)
    operands = tiles.Operands(spec, sizes, lead, transposed=True)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dot = lambda a, b: lax.dot_general(a, b, NT, precision, jnp.float32)
    count = len(operands.arrays)

    def kernel(table, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *refs):
        inputs_refs, (out_ref, *columns) = refs[:count], refs[count:]
        i, j, t, r = (pl.program_id(n) for n in range(4))
        b, h = member(i, j, r)
        step = Step(table, lead, b, h, t)
        inputs = tiles.Inputs(operands, inputs_refs, columns, b, h)
        sums = columns[len(operands.scratch)] if kind == 'r' else out_ref
        begins = step.first if kind == 'r' else (r == 0) & (step.kind != blocks.EMPTY) if dense else t == 0

        @pl.when(begins)
        def _():
            sums[...] = jnp.zeros_like(sums)

        @pl.when(step.first | (shared > 1))
        def _():
            inputs.enter()

        def compute(partial):
            rows = pl.ds(pl.multiple_of(step.column * bq, bq), bq)
            for first in range(0, bk, part):
                place = inputs.at(step, first, part)
                keys = place.keys
                s, factor, slope = place.score_by_operand(dot(k_ref[keys], q_ref[...]), scale, which)
                p = jnp.exp2(s * (factor * LOG2E) - lse_ref[...])
                dp = dot(v_ref[keys], do_ref[...])
                if spec.dropout:
                    dp = jnp.where(place.kept(), dp * spec.dropout.inverse_keep, 0.0)
                g = p * (dp - delta_ref[...])
                g = g if slope is None else g * slope
                if partial:
                    g = jnp.where(place.visible(), g, 0.0)
                if dense:
                    sums[:, keys] += g.T
                elif 'd' in letters:
                    start = step.column * bq - (step.row * bk + first) - part + S
                    sums[:, pl.ds(pl.multiple_of(start, LANES), part + bq)] += _skewed(g)
                elif kind == 'r':
                    sums[keys] += sum(g[:, n : n + LANES] for n in range(0, bq, LANES))
                else:
                    sums[:, rows if kind == 'c' else slice(None)] += _fold(g)

        tiles.cases(step, present, compute)

        if kind == 'r':

            @pl.when(step.last)
            def _():
                out_ref[...] = _fold(sums[...].T)

    at = lambda f: lambda i, j, t, r, w: f(*member(i, j, r), t, w)
    of = lambda b, h, t, w: Step(w, lead, b, h, t)
    query = at(lambda b, h, t, w: (b, h, of(b, h, t, w).column, 0))
    key = at(lambda b, h, t, w: (b, h // group, of(b, h, t, w).row, 0))
    line = at(lambda b, h, t, w: (b, h, 0, of(b, h, t, w).column))
    whole = lambda i, j, t, r, w: (i, j, 0, 0)
    scratch = [pltpu.VMEM((bk, LANES), jnp.float32)] if kind == 'r' else []
    if dense:
        block, size = (bq, bk), (T, S)
        lies = lambda i, j, t, r, w: (i, j, of(i, j, t, w).column, of(i, j, t, w).row)
    elif kind == 'r':
        block, size = (SUBLANES, bk), (SUBLANES, S)
        lies = lambda i, j, t, r, w: (i, j, 0, of(i, j, t, w).row)
    else:
        block = size = (SUBLANES, {'d': T + S, 'c': T}.get('d' if 'd' in letters else kind, bq))
        lies = whole
    specs = [s if s.index_map is None else pl.BlockSpec(s.block_shape, at(s.index_map)) for s in operands.specs]
    found = pl.pallas_call(
        kernel,
        name='softmax_attention_operand',
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(*outer, steps, shared),
            in_specs=[*tiles.inputs_of_backward(bq, bk, H, Hv, query, key, line), *specs],
            out_specs=pl.BlockSpec((None, None, *block), lies),
            scratch_shapes=[*operands.scratch, *scratch],
        ),
        out_shape=tpu.out_type((*outer, *size), jnp.float32, q),
        compiler_params=tiles.parameters(2 * 4 * block[0] * block[1], ('parallel', 'parallel', 'arbitrary', 'arbitrary')),
        cost_estimate=tiles.cost(B, N, classes, sizes, H, Hv, 2, (q, k, v, do)),
    )(table.reshape(-1), q, k, v, do, lse, delta, *operands.arrays)
    return _shaped(found, wanted, spec, sizes, classes, dense)


def _fold(x):
    """[rows, n] -> [8, n]: sums of every eighth row, which cost no movement between rows."""
    return x.reshape(-1, SUBLANES, x.shape[1]).sum(0)


def _skewed(g):
    """[M, N] -> [8, M + N], whose entry x sums the columns x + r - M of rows r: the transpose of a strip's way into a tile.

    Rows go by eights, as a roll's stride can't be negative: row 8 n + m has 8 - m more to go, which is left to `_shaped`.
    """
    M, blank = g.shape[0], jnp.zeros((SUBLANES, g.shape[0]), g.dtype)
    eight = lambda n: jnp.concatenate([g[n : n + SUBLANES], blank], 1)
    return sum(pltpu.roll(eight(n), M - n - SUBLANES, 1) for n in range(0, M, SUBLANES))


def _shaped(found, wanted: ew.Operand, spec, sizes, classes, dense: bool):
    """What the kernel wrote, [b, h, ...], in the operand's shape and order of letters."""
    index = wanted.index
    if dense:
        visited = (classes != blocks.EMPTY)[:, :, :, None, :, None]
        parts = found.reshape(*found.shape[:2], -1, sizes.queries, found.shape[3] // sizes.keys, sizes.keys)
        found = jnp.where(visited, parts, 0.0).reshape(found.shape)[:, :, : spec.T, : spec.S]
    elif 'd' in index:  # see `Operands`: reversed, and behind as much padding; entry x of row m goes to x + 8 - m
        first, size = sizes.S - spec.S + 1, spec.T + spec.S - 1
        found = jnp.pad(found, [(0, 0)] * 3 + [(SUBLANES, 0)])
        found = sum(found[:, :, m, first + m : first + m + size] for m in range(SUBLANES))[..., ::-1]
    elif 'q' in index or 'k' in index:
        found = found.sum(2)[..., : spec.T if 'q' in index else spec.S]
    else:
        found = found.sum((2, 3))
    order = [c for c in 'bhqkd' if c in index]
    for axis, c in enumerate('bh'):
        if c not in order or wanted.array.shape[index.index(c)] == 1:
            found = found.sum(axis, keepdims=True)
    found = found.reshape([wanted.array.shape[index.index(c)] for c in order])
    return found.transpose([order.index(c) for c in index])
