"""Runs the bodies of Mosaic GPU kernels on a CPU, eagerly, with a Python thread for each warpgroup and copying warp.

All blocks are resident at once and run as they come. Barriers, rings, counters and edges of copies behave as on the GPU, memory
starts as NaN, a wait that never ends raises; registers, layouts, swizzles and asynchrony do not exist: a call does it all.
For the kernels of softmax attention at sizes of a few tiles. Not for NaN in inputs: XLA's maximum on a CPU may pass it over.
"""

import contextlib
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

PATIENCE = 120  # seconds after which a wait counts as endless
_here = threading.local()


class Ref:
    """A view of memory."""

    def __init__(self, array):
        self.array = array

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    T = property(lambda self: Ref(self.array.swapaxes(-1, -2)))
    at = property(lambda self: _At(self.view))

    def view(self, index):
        index = index if isinstance(index, tuple) else (index,)
        slices, dropped = [], []
        for axis, i in enumerate(index):
            if isinstance(i, slice) or i is Ellipsis:
                slices.append(i)
            elif hasattr(i, 'size') and hasattr(i, 'start'):
                slices.append(slice(int(i.start), int(i.start) + int(i.size)))
            else:
                slices.append(slice(int(i), int(i) + 1))
                dropped.append(axis)
        return Ref(np.squeeze(self.array[tuple(slices)], tuple(dropped)))

    def value(self):
        return jnp.asarray(self.array.copy())  # JAX may read memory that it is given later than it says

    def __getitem__(self, index):
        return self.view(index).value()

    def __setitem__(self, index, value):
        self.view(index).array[...] = np.asarray(value)


class _At:
    def __init__(self, pick):
        self.pick = pick

    def __getitem__(self, index):
        return self.pick(index)


class Barrier:
    def __init__(self, arrivals):
        self.needed, self.missing, self.done, self.waited = arrivals, arrivals, 0, {}
        self.changed = threading.Condition()

    def arrive(self):
        with self.changed:
            self.missing -= 1
            if not self.missing:
                self.done, self.missing = self.done + 1, self.needed
                self.changed.notify_all()

    def wait(self):
        with self.changed:
            mine = self.waited[_here.name] = self.waited.get(_here.name, 0) + 1
            assert self.done <= mine, 'a thread missed a completion'
            assert self.changed.wait_for(lambda: self.done >= mine, PATIENCE), f'{_here.name} waits for ever'


class Barriers:
    def __init__(self, spec):
        self.all = [Barrier(spec.num_arrivals) for _ in range(int(np.prod(spec.num_barriers)))]
        self.at = _At(lambda i: self.all[int(i)])
        self.arrive, self.wait = self.all[0].arrive, self.all[0].wait


class Block:
    """What the threads of a block share."""

    def __init__(self, counters):
        self.counters, self.lock, self.shared = counters, threading.Lock(), None


def _allocate(spec):
    if isinstance(spec, plgpu.Barrier):
        return Barriers(spec)
    value = np.nan if jnp.issubdtype(spec.dtype, jnp.floating) else 0
    return Ref(np.full(spec.shape, value, spec.dtype))


def _scratch(spec):
    return tuple(map(_scratch, spec)) if isinstance(spec, tuple) else spec if spec is None else _allocate(spec)


def _run_scoped(f, *specs, collective_axes=None):
    if collective_axes is None:  # accumulators, which start as zeros
        return f(*(Ref(np.zeros(spec.shape, np.float32)) for spec in specs))
    with _here.block.lock:
        if _here.block.shared is None:
            _here.block.shared = _scratch(specs)
    return f(*_here.block.shared)


def _get_global(spec):
    counters = _here.block.counters
    with counters['lock']:
        return counters.setdefault('array', Ref(np.zeros(spec.shape, np.int32)))


def _when(condition):
    return lambda f: f() if bool(condition) else None


def _loop(low, high, init_carry=None):
    def run(f):
        carry = init_carry
        for i in range(int(low), int(high)):
            carry = f(jnp.int32(i), carry) if init_carry is not None else f(jnp.int32(i))
        return carry

    return run


def _fori_loop(low, high, f, carry):
    for i in range(int(low), int(high)):
        carry = f(jnp.int32(i), carry)
    return carry


def _start(names_and_functions, block, axes):
    """Runs functions in threads and raises what they raise."""
    errors = []

    def call(name, f):
        _here.name, _here.block, _here.axes = name, block, axes | {'wg': jnp.int32(name[0])}
        try:
            f()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=pair, daemon=True) for pair in names_and_functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _warp_map(f):
    wg, block, axes = _here.name[0], _here.block, _here.axes
    _start([((wg, w), lambda w=w: f(jnp.int32(w))) for w in range(4)], block, axes)


def _wgmma(acc, a, b):
    a, b = (np.asarray(x.array if isinstance(x, Ref) else x, np.float32) for x in (a, b))
    acc.array += a @ b


def _load_tile(source, target, barrier):
    array = np.zeros(target.shape, target.dtype)  # what lies outside reads as zeros
    array[tuple(slice(n) for n in source.shape)] = source.array
    target.array[...] = array
    barrier.arrive()


def _store_tile(source, target, reduction_op=None):
    inside = source.array[tuple(slice(n) for n in target.shape)]
    if reduction_op:
        target.array[...] += inside
    else:
        target.array[...] = inside


def _toeplitz(strip, shape):
    i, j = np.ogrid[: shape[0], : shape[1]]
    assert strip.shape == (sum(shape) - 1,)
    return jnp.asarray(strip.array[shape[0] - 1 + j - i])


def _semaphore_wait(counter, value, decrement, memory_scope):
    for _ in range(PATIENCE * 1000):
        if counter.array >= int(value):
            return
        threading.Event().wait(0.001)
    raise AssertionError(f'{_here.name} waits for its turn for ever')


def _semaphore_signal(counter, value, memory_scope):
    counter.array += value


def _kernel(body, *, out_type, grid, grid_names, num_threads=1, **_):
    def call(*args):
        is_spec = lambda x: isinstance(x, jax.ShapeDtypeStruct)
        refs = jax.tree.map(lambda x: Ref(np.array(x)), args)
        outs = jax.tree.map(_allocate, out_type, is_leaf=is_spec)
        counters = {'lock': threading.Lock()}

        def block(index):
            axes = {name: jnp.int32(i) for name, i in zip(grid_names, index)}
            run = lambda: body(*refs, *(outs if isinstance(outs, tuple) else (outs,)))
            _start([((w, None), run) for w in range(num_threads)], Block(counters), axes)

        _start([((0, None), lambda i=i: block(i)) for i in np.ndindex(*grid)], None, {})
        return jax.tree.map(lambda x: jnp.asarray(x.array), outs, is_leaf=lambda x: isinstance(x, Ref))

    return call


def _namespace(module, **changed):
    space = types.SimpleNamespace(**{name: getattr(module, name) for name in dir(module)})
    space.__dict__.update(changed)
    return space


@contextlib.contextmanager
def emulated(monkeypatch, common, *modules):
    """Within: the kernels of `modules`, called outside `jax.jit`, run on the CPU."""
    nothing = lambda *args, **kwargs: None
    fake_pl = _namespace(
        pl, run_scoped=_run_scoped, get_global=_get_global, when=_when, loop=_loop,
    )  # fmt: skip
    fake_plgpu = _namespace(
        plgpu, kernel=_kernel, warp_map=_warp_map, wgmma=_wgmma, copy_gmem_to_smem=_load_tile, copy_smem_to_gmem=_store_tile,
        semaphore_wait=_semaphore_wait, semaphore_signal=_semaphore_signal,
        barrier_arrive=lambda b: b.arrive(), barrier_wait=lambda b: b.wait(),
        load=lambda ref, layout=None, optimized=True: ref.value(), layout_cast=lambda x, layout: x,
        wgmma_accumulator_load=lambda acc, wait_n=0: acc.value(),
        broadcasted_iota=lambda dtype, shape, dim, layout=None: lax.broadcasted_iota(dtype, shape, dim),
        set_max_registers=nothing, commit_smem=nothing, wait_smem_to_gmem=nothing, wgmma_wait=nothing,
    )  # fmt: skip
    fake_lax = _namespace(
        lax, axis_index=lambda name: _here.axes[name], fori_loop=_fori_loop,
        cond=lambda which, yes, no, *args: yes(*args) if bool(which) else no(*args),
    )  # fmt: skip
    flag = lambda x: jnp.int32(bool(x))
    with monkeypatch.context() as patch:
        for module in (common, *modules):
            for name, fake in (('pl', fake_pl), ('plgpu', fake_plgpu), ('lax', fake_lax)):
                if hasattr(module, name):
                    patch.setattr(module, name, fake)
        patch.setattr(common, 'opaque_zero', lambda: jnp.int32(0))
        patch.setattr(common, 'publish', nothing)
        patch.setattr(common, 'each_thread', lambda count, work: [work(jnp.int32(n)) for n in range(count)])
        patch.setattr(common, 'toeplitz', _toeplitz)
        patch.setattr(common, 'any_not_finite', lambda row: flag((~jnp.isfinite(row)).any()))
        patch.setattr(common, 'any_to', lambda col, limit: flag((~(col > limit)).any()))
        yield
