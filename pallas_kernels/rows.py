"""Rows of 512 numbers, a warp each: what needs a number's neighbours, which Mosaic GPU has no word for.

A thread has 16 neighbours of a row, so that a sum over what follows is 15 additions, then one of 32 lanes by shuffles.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, nvvm, vector

from pallas_kernels import common

ROWS, LENGTH, MINE = 4, 512, 16  # of a tile, of a row, of a thread
_tiled = lambda *tiles, **dims: plgpu.Layout.TILED(plgpu.Tiling(tiles), **dims, vector_dim=-1)
TILE = _tiled((ROWS, LENGTH), (MINE,), (4,), warp_dims=(-4,), lane_dims=(-3,))  # four numbers a load
CHUNKS = _tiled((ROWS, LENGTH // 64, 64), (MINE,), (4,), warp_dims=(-5,), lane_dims=(-4, -3))  # rows as [8, 64]
ANY = _tiled((ROWS, 32), (1,), warp_dims=(-3,), lane_dims=(-2,))  # rows of any 32 numbers, for sums
EACH = TILE.reduce(1)  # a number a row
UP, DOWN = nvvm.ShflKind.up, nvvm.ShflKind.down


def across(x, shape):
    """A number a row, in all places of the row."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (0,)), TILE)


def place(shape):
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TILE).astype(jnp.float32)


def put_columns(ref, tile, interpret: bool):
    """Stores rows as the columns of global memory, number by number."""
    if interpret:
        ref.T[...] = tile
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE))
    def put(_, ref, tile):
        for (row, first), x in zip(tile.layout.thread_idxs(tile.shape), tile.registers.flat):
            for i in range(tile.layout.vector_length):
                column = arith.addi(first, arith.constant(first.type, i))
                memref.store(vector.extract(x, [], [i]), ref, [column, row])

    put(ref, tile)


def differences(sums, shape, interpret: bool):
    """Each number less the one before it in its chunk, the first less 0: of rows in `CHUNKS`, in `TILE`."""
    if interpret:
        return jnp.diff(sums, axis=2, prepend=0.0).reshape(shape)

    @plgpu.inline_mgpu(arg_types=(CHUNKS,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, TILE))
    def subtract(_, sums):
        sums = _numbers(sums)
        begins = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(_lane(), _i32(64 // MINE - 1)), _i32(0))
        before = arith.select(begins, _f32(0), _shuffled(sums[-1], 1, UP))
        return _tile([arith.subf(x, y) for x, y in zip(sums, [before, *sums])], shape)

    return subtract(sums)


def suffixes(x, keep, last, interpret: bool):
    """y_j = x_j + y_{j+1} where keep_j > 0, else 0, along rows in `TILE`; last: what follows a row, [4]."""
    if interpret:
        join = lambda later, here: (here[0] + jnp.where(here[1], later[0], 0.0), here[1] & later[1])
        sums, open_ = lax.associative_scan(join, (jnp.where(keep > 0, x, 0.0), keep > 0), reverse=True, axis=1)
        return sums + jnp.where(open_, last[:, None], 0.0)

    @plgpu.inline_mgpu(arg_types=(TILE, TILE, EACH), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, TILE))
    def add(_, x, keep, last):
        shape, lane, (last,) = x.shape, _lane(), _numbers(last)
        plus = lambda total, open_, y: arith.addf(total, arith.select(open_, y, _f32(0)))
        # A sum, and whether it is open to what follows: of the thread's numbers, then of the lanes from this one on.
        total, open_, sums = _f32(0), arith.constant(ir.IntegerType.get_signless(1), 1), []
        for value, kept in reversed([*zip(_numbers(x), _numbers(keep))]):
            kept = arith.cmpf(arith.CmpFPredicate.OGT, kept, _f32(0))
            total, open_ = arith.select(kept, arith.addf(value, total), _f32(0)), arith.andi(open_, kept)
            sums.append((total, open_))

        def of_lane(distance):
            there = arith.cmpi(arith.CmpIPredicate.ult, lane, _i32(32 - distance))
            flag = _shuffled(arith.extui(lane.type, open_), distance, DOWN)
            return there, _shuffled(total, distance, DOWN), arith.cmpi(arith.CmpIPredicate.ne, flag, _i32(0))

        for distance in (1, 2, 4, 8, 16):
            there, further, further_open = of_lane(distance)
            total = plus(total, arith.andi(there, open_), further)
            open_ = arith.select(there, arith.andi(open_, further_open), open_)
        there, further, further_open = of_lane(1)
        following = arith.select(there, plus(further, further_open, last), last)
        return _tile([plus(*s, following) for s in reversed(sums)], shape)

    return add(x, keep, last)


def _i32(n: int):
    return arith.constant(ir.IntegerType.get_signless(32), n)


def _f32(x: float):
    return arith.constant(ir.F32Type.get(), float(x))


def _lane():
    return arith.remui(mgpu.utils.thread_idx(), _i32(32))


def _shuffled(x, distance: int, kind):
    """x of the lane so far up or down; of the last lanes, which have none there, their own."""
    i32 = ir.IntegerType.get_signless(32)
    bits = nvvm.shfl_sync(_i32(-1), arith.bitcast(i32, x), _i32(distance), _i32(0 if kind == UP else 31), kind)
    return arith.bitcast(x.type, bits)


def _numbers(tile) -> list:
    """A thread's, in their order."""
    return [vector.extract(x, [], [i]) for x in tile.registers.flat for i in range(x.type.shape[0])]


def _tile(numbers, shape):
    layout = TILE.to_mgpu()
    registers, size = np.empty(layout.registers_shape(shape), object), layout.vector_length
    kind = layout.registers_element_type(numbers[0].type)
    registers.flat[:] = [vector.from_elements(kind, numbers[i : i + size]) for i in range(0, len(numbers), size)]
    return common.of_registers(registers, layout)
