"""What the Mosaic GPU kernels share: layouts, memory shapes, and the few operations the DSL has no word for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, nvvm, vector

TILE = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)
COL = plgpu.Layout.WGMMA.reduce(0)
# Four neighbours of a row in a thread: whole sectors of global memory, in 16 bits too.
LINES = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 32), (16, 32), (4, 32), (4,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
SMEM_LIMIT = 232448
PROCESSORS = 132
ROUND = 1.5 * 2.0**23  # float32 numbers next to it are whole
CUBIC = (0.99992807, 0.69326099, 0.24261113, 0.05517167)  # 2^f, relative error 7.5e-5


def lowered_once(*static: str):
    """A kernel's function that is traced and lowered once a program for all calls of the same shapes and the same `static`
    arguments, by name: Mosaic takes a second or more a kernel, and layers, recomputation and both passes call the same ones."""

    def decorate(function):
        once = jax.jit(function, static_argnames=static)

        @functools.wraps(function)
        def call(*args, **options):
            return waited(once(*args, **options), options.get('interpret'))

        return call

    return decorate


def interpreted(interpret) -> dict:
    """What `plgpu.kernel` is told so."""
    return {'interpret': plgpu.InterpretGPUParams(detect_races=True)} if interpret else {}


def waited(found, interpret):
    """A kernel's results, there already if they are interpreted: the interpreter calls back to Python, where it may wait for
    what was dispatched after it, which waits for it."""
    return jax.block_until_ready(found) if interpret else found


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def swizzled(shape, dtype):
    """Shared memory for a wgmma operand: 8-row tiles, swizzled."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


def row(value, shape):
    """Broadcasts a row vector (M,) over the columns of a tile."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(value, shape, (0,)), TILE)


def col(value, shape):
    """Broadcasts a column vector (N,) over the rows of a tile."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(value, shape, (1,)), TILE)


def filled(n, value, layout=ROW):
    return plgpu.layout_cast(jnp.full((n,), value, jnp.float32), layout)


def iota(n, layout):
    return plgpu.broadcasted_iota(jnp.int32, (n,), 0, layout=layout)


def exp2(x, columns: int):
    """2^x of a float32 tile, x at most about 0, the first `columns` columns without the special function unit.

    That unit gives 16 results a cycle and multiprocessor. A cubic on [-1/2, 1/2], off by 8e-5 at most, costs about as
    much on the other units, which stand idle meanwhile. NaN stays NaN, and x below -127 gives 0.
    """
    if not columns:
        return jnp.exp2(x)
    y = jnp.maximum(x[:, :columns], -127.0)
    shifted = y + ROUND  # its last bits are y rounded to an integer
    f = y - (shifted - ROUND)
    cubic = ((f * CUBIC[3] + CUBIC[2]) * f + CUBIC[1]) * f + CUBIC[0]
    exponent = (jax.lax.bitcast_convert_type(shifted, jnp.int32) << 23) + 0x3F800000
    y = cubic * jax.lax.bitcast_convert_type(exponent, jnp.float32)
    return jnp.concatenate([y, jnp.exp2(x[:, columns:])], axis=1) if columns < x.shape[1] else y


def whole(x):
    """float32 numbers below 2^22 rounded to whole ones, by an addition: what rounds or converts is eight times slower."""
    return jax.lax.optimization_barrier(x + ROUND) - ROUND  # interpreted, XLA would take one for the other's inverse


def power_of_two(x):
    """2^x of whole float32 numbers, exactly; 0 below -126, 2^127 above that."""
    shifted = jnp.minimum(jnp.maximum(x, -127.0), 127.0) + ROUND  # its last bits are x
    return jax.lax.bitcast_convert_type((jax.lax.bitcast_convert_type(shifted, jnp.int32) << 23) + 0x3F800000, jnp.float32)


def opaque_zero():
    """An int32 zero that the compiler cannot see through.

    Indexing shared memory with it inside a loop keeps the compiler from hoisting the wgmma descriptors of
    loop-invariant tiles, two registers each, which is what spills in the backward kernel.
    """

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT(())))
    def zero(_):
        i32 = ir.IntegerType.get_signless(32)
        value = llvm.inline_asm(i32, [], 'mov.u32 $0, 0;', '=r', has_side_effects=True)
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return zero()


def each_thread(count: int, work):
    """work(n) in the n-th thread of a block, n < count <= 128: scalars may differ, arrays and barriers have no place in it."""

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT(())))
    def thread(_):
        value = arith.index_cast(ir.IntegerType.get_signless(32), gpu.thread_id(gpu.Dimension.x))
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    n = thread()
    pl.when(n < count)(lambda: work(n))


def feed(chunks: int, ring: int, place, free, loads):
    """In the copying warpgroup: one warp fills a ring of slots, chunk after chunk, and stays until all are read.

    Args:
      place: step -> chunk.
      free: a barrier a slot, at which its readers arrive.
      loads: () -> load, called where the copies are made; `load(slot, chunk)` starts them.
    """

    @plgpu.warp_map
    def _warp(warp):
        @pl.when(warp == 0)
        def _():
            load = loads()

            @pl.loop(0, chunks)
            def _load(s):
                slot, chunk = jax.lax.rem(s, ring), place(s)
                pl.when(s >= ring)(lambda: plgpu.barrier_wait(free.at[slot]))
                load(slot, chunk)

            @pl.loop(max(chunks - ring, 0), chunks)
            def _drain(s):
                plgpu.barrier_wait(free.at[jax.lax.rem(s, ring)])


def entry(ref, *index):
    """ref at an index, 0 where a dimension is shared."""
    return ref.at[*(i if n > 1 else 0 for i, n in zip(index, ref.shape))]


def launch(kernel, out_type, grid: dict[str, int], warpgroups: int, interpret: bool):
    """`plgpu.kernel` whose threads wait for each other where that is written out: automatic barriers are two a store."""
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name='wg',
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
        ),
        **interpreted(interpret),
    )


def publish():
    """Before a barrier at which every thread arrives: what this thread wrote to shared memory is there for copies and products.

    `plgpu.commit_smem` without its barrier of the warpgroup.
    """

    @plgpu.inline_mgpu()
    def fence(_):
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    fence()


def together():
    """All threads of the warpgroup come here before one goes on: a barrier, where automatic ones are left out."""

    @plgpu.inline_mgpu()
    def barrier(_):
        mgpu.warpgroup_barrier()

    barrier()


def of_registers(registers, layout, signed=None):
    """A tile of a thread's registers, inside `plgpu.inline_mgpu`. Pallas has no public way: run with jax 0.11.2, lowered with
    0.11.2 and 0.12."""
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)


def toeplitz(strip, shape):
    """The tile whose entry (i, j) is strip[M - 1 + j - i], of M + N - 1 numbers in memory: a thread loads each number once.

    By `plgpu.load` a tile of 64 rows takes twice as many loads, of which each touches eight lines of the cache.
    """
    dtype = strip.dtype
    signed = jnp.issubdtype(dtype, jnp.signedinteger) if jnp.issubdtype(dtype, jnp.integer) else None

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct(shape, dtype, TILE))
    def load(_, ref):
        layout = mgpu.WGMMA_LAYOUT
        places = list(layout.thread_idxs(shape))
        # A thread's registers lie at fixed distances from its first one.
        strides = layout.tiling.tile_strides((shape[1], 1))
        offsets = [divmod(sum(i * s for i, s in zip(n, strides)), shape[1]) for n in np.ndindex(layout.registers_shape(shape))]
        i, j = places[0]
        index = ir.IndexType.get()
        constant = lambda n: arith.constant(index, n)
        first = arith.addi(arith.subi(j, i), constant(shape[0] - 1))
        entry = functools.cache(lambda n: memref.load(ref, [arith.addi(first, constant(n))]))
        pair = lambda n: vector.from_elements(layout.registers_element_type(entry(n).type), [entry(n), entry(n + 1)])
        registers = np.empty(layout.registers_shape(shape), object)
        registers.flat[:] = [pair(j - i) for i, j in offsets]
        return of_registers(registers, layout, signed)

    return load(strip)


def rounded(x):
    """A float32 tile in bfloat16, and that in float32: one instruction for two neighbours, and one each for the way back."""

    @plgpu.inline_mgpu(
        arg_types=(TILE,),
        return_type=(plgpu.ShapeDtypeStruct(x.shape, jnp.bfloat16, TILE), plgpu.ShapeDtypeStruct(x.shape, jnp.float32, TILE)),
    )
    def convert(_, x):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        pairs = ir.VectorType.get((2,), ir.BF16Type.get())
        constant = lambda value: arith.constant(i32, value)
        narrow, wide = np.empty_like(x.registers), np.empty_like(x.registers)
        for n, pair in np.ndenumerate(x.registers):
            both = [vector.extract(pair, dynamic_position=[], static_position=[i]) for i in (1, 0)]
            bits = llvm.inline_asm(i32, both, 'cvt.rn.bf16x2.f32 $0, $1, $2;', '=r,f,f')
            halves = arith.shli(bits, constant(16)), arith.andi(bits, constant(-0x10000))
            narrow[n] = llvm.bitcast(pairs, bits)
            wide[n] = vector.from_elements(pair.type, [llvm.bitcast(f32, half) for half in halves])
        return tuple(of_registers(y, x.layout) for y in (narrow, wide))

    return convert(x)


def any_not_finite(row):
    """Whether a warpgroup's float32 row vector holds NaN or Inf anywhere: int32 0 or 1, the same in all its threads."""

    @plgpu.inline_mgpu(arg_types=(ROW,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT(())))
    def vote(_, row):
        i32 = ir.IntegerType.get_signless(32)
        bits = [llvm.bitcast(i32, x) for x in row.registers.flat]
        # Barriers 8 .. 15 are free: Mosaic uses one for the block and one for each warpgroup.
        code = """{ .reg .pred p, q; .reg .u32 t, x;
            and.b32 x, $1, 0x7f800000; setp.eq.u32 p, x, 0x7f800000;
            and.b32 x, $2, 0x7f800000; setp.eq.or.u32 p, x, 0x7f800000, p;
            mov.u32 t, %tid.x; shr.u32 t, t, 7; add.u32 t, t, 8;
            barrier.cta.red.or.pred q, t, 128, p; selp.u32 $0, 1, 0, q; }"""
        value = llvm.inline_asm(i32, bits, code, '=r' + ',r' * len(bits), has_side_effects=True)
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return vote(row)


def any_to(col, limit: float):
    """Whether a float32 column vector, which each warp holds whole, has an entry that is not above `limit`: int32 0 or 1."""

    @plgpu.inline_mgpu(arg_types=(COL,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT(())))
    def vote(_, col):
        pairs = [llvm.bitcast(ir.IntegerType.get_signless(64), x) for x in col.registers.flat]
        bound = f'0f{np.float32(limit).view(np.uint32):08X}'
        code = '{ .reg .pred p, q; .reg .f32 x, y; setp.ne.u32 p, 0, 0; setp.ne.u32 q, 0, 0; '  # two chains: half as long
        for n in range(1, len(pairs) + 1):
            code += f'mov.b64 {{x, y}}, ${n}; setp.leu.or.f32 p, x, {bound}, p; setp.leu.or.f32 q, y, {bound}, q; '
        code += 'or.pred p, p, q; vote.sync.any.pred p, p, 0xffffffff; selp.u32 $0, 1, 0, p; }'
        i32 = ir.IntegerType.get_signless(32)
        value = llvm.inline_asm(i32, pairs, code, '=r' + ',l' * len(pairs), has_side_effects=True)
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return vote(col)


def clean(refs):
    """Sets what is not finite in these tiles of shared memory, 64 rows each, to 0: a warpgroup, its own rows.

    Returns int32 1 where there was such a thing, else 0.
    """
    parts = [ref.at[:, pl.ds(at, 64)] for ref in refs for at in range(0, ref.shape[-1], 64)]
    marks = functools.reduce(jnp.add, (plgpu.load(part, layout=TILE) * 0 for part in parts))  # 0, or NaN; two an instruction
    found = any_not_finite(marks.astype(jnp.float32).sum(axis=1))
    pl.when(found > 0)(lambda: scrub(refs))
    return found


def scrub(refs):
    """`clean` that does not look first."""
    for ref in refs:

        @pl.loop(0, ref.shape[-1] // 64)
        def _part(n, ref=ref):
            part = ref.at[:, pl.ds(64 * n, 64)]
            x = plgpu.load(part, layout=TILE).astype(jnp.float32)
            part[...] = jnp.where(jnp.abs(x) < jnp.inf, x, 0.0).astype(part.dtype)

    plgpu.commit_smem()
