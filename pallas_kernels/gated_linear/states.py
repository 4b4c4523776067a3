"""The state that a sweep comes to, from zero: what a piece of a sequence hands on to the next."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common
from pallas_kernels.common import COL, TILE
from pallas_kernels.gated_linear import accumulate
from pallas_kernels.gated_linear.sweep import CHUNK, SQUARE

TERMS = 3  # of a float32 number
block = lambda i: pl.ds(64 * i, 64)


def takes(K: int, V: int) -> bool:
    """Whether states of these widths, multiples of 64, are found so."""
    return K <= 128 and V <= 128


@common.lowered_once('reverse', 'heads', 'interpret')
def states(k, v, decay, *, reverse=False, heads=0, interpret=False):
    """The last state of `sweep(None, k, v, decay, None)`, float32 [B, N, 1, K, V]: of the same arrays, with a decay.

    A consumer warpgroup owns 64 rows of the state. Keys are decayed in registers, where the tensor core takes them from, so
    that shared memory is read for values alone; while one warpgroup decays, another's products run.
    """
    (B, T, _, K), V, dtype = k.shape, v.shape[3], k.dtype
    N = max(heads, k.shape[2], v.shape[2])
    chunks, W, shape = common.cdiv(T, CHUNK), K // 64, (64, V)
    constant = decay.shape[2] == 1
    ring = min(6, (common.SMEM_LIMIT - 4096) // (2 * CHUNK * (K + V)))

    def kernel(k_ref, v_ref, decay_ref, out_ref, scratch):
        k_smem, v_smem, g_smem, full, free = scratch
        b, h, wg = lax.axis_index('b'), lax.axis_index('h'), lax.axis_index('wg')
        place = lambda step: chunks - 1 - step if reverse else step

        @pl.when(wg < W)
        def _consume():
            if W > 1 and not interpret:
                plgpu.set_max_registers(232, action='increase')

            def kept(decay):
                return decay.write(COL), decay.total()

            shared = kept(accumulate.Decay(common.entry(decay_ref, b, h, 0), reverse)) if constant else None

            def step(s, S):
                slot = lax.rem(s, ring)
                plgpu.barrier_wait(full.at[slot])
                factor, total = shared or kept(accumulate.Decay(g_smem.at[slot], reverse))
                keys = plgpu.load(k_smem.at[slot, :, block(wg)].T, layout=TILE).astype(jnp.float32)
                terms = accumulate.split(keys * common.col(factor, SQUARE), TERMS, dtype, nearest=False)

                def write(acc):
                    for term in reversed(terms):
                        acc.add(term, v_smem.at[slot])
                    # Not summed onto the state by the tensor core, which cuts digits off where an addition would round.
                    return total * S + acc.load()

                S = accumulate.scoped(write, shape, interpret=interpret)
                plgpu.barrier_arrive(free.at[slot])
                return S

            S = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), TILE)
            out_ref.at[b, h, 0, block(wg)][...] = lax.fori_loop(0, chunks, step, S)

        @pl.when(wg == W)
        def _produce():
            if W > 1 and not interpret:
                plgpu.set_max_registers(40, action='decrease')

            def load(slot, c):
                for ref, to in ((k_ref, k_smem), (v_ref, v_smem)):
                    source = ref.at[b, pl.ds(c * CHUNK, CHUNK), h // (N // ref.shape[2])]
                    plgpu.copy_gmem_to_smem(source, to.at[slot], full.at[slot])
                if not constant:
                    plgpu.copy_gmem_to_smem(common.entry(decay_ref, b, h, c), g_smem.at[slot], full.at[slot])

            common.feed(chunks, ring, place, free, lambda: load)

    def entry_point(*refs):
        pl.run_scoped(
            lambda *scratch: kernel(*refs, scratch),
            common.swizzled((ring, CHUNK, K), dtype),
            common.swizzled((ring, CHUNK, V), dtype),
            None if constant else plgpu.SMEM((ring, 2, CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=3 - constant, num_barriers=ring),
            plgpu.Barrier(num_arrivals=W, num_barriers=ring),
            collective_axes='wg',
        )

    entry_point.__name__ = 'states' + '_back' * reverse  # what profilers show
    out_type = jax.ShapeDtypeStruct((B, N, 1, K, V), jnp.float32)
    return common.launch(entry_point, out_type, {'b': B, 'h': N}, W + 1, interpret)(k, v, decay)
