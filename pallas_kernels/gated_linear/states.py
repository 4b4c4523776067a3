"""The state that a sweep comes to, from zero: what a piece of a sequence hands on to the next."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common
from pallas_kernels.common import ROW, TILE
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

    While a chunk's products run the next one's values are decayed.
    """
    (B, T, _, K), V, dtype = k.shape, v.shape[3], k.dtype
    N = max(heads, k.shape[2], v.shape[2])
    chunks, depth, W = common.cdiv(T, CHUNK), K // 64, V // 64
    ring = min(4, (common.SMEM_LIMIT - 3072 - 4 * CHUNK * V * TERMS) // (2 * CHUNK * (K + V)))

    def kernel(k_ref, v_ref, decay_ref, out_ref, scratch):
        k_smem, v_smem, g_smem, w_smem, full, free = scratch
        b, h, wg = lax.axis_index('b'), lax.axis_index('h'), lax.axis_index('wg')
        place = lambda step: chunks - 1 - step if reverse else step

        @pl.when(wg < W)
        def _consume():
            if W > 1 and not interpret:
                plgpu.set_max_registers(232, action='increase')

            def decays(s):
                return accumulate.Decay(g_smem.at[lax.rem(s, ring)], reverse)

            def keep_values(s, at):
                """What the keys of a chunk write, decayed to its end."""
                plgpu.barrier_wait(full.at[lax.rem(s, ring)])
                values = plgpu.load(v_smem.at[lax.rem(s, ring), :, block(at)], layout=TILE).astype(jnp.float32)
                terms = accumulate.split(values * common.row(decays(s).write(ROW), SQUARE), TERMS, dtype, nearest=False)
                if not interpret:
                    common.together()  # products have read what was there
                for term, part in enumerate(terms):
                    w_smem.at[at, lax.rem(s, 2), term][...] = part
                plgpu.commit_smem()

            def step(s, S):
                here = wg if interpret else wg + common.opaque_zero()

                def write(*accumulators):
                    for i, acc in enumerate(accumulators):
                        for term in reversed(range(TERMS)):
                            acc.add(k_smem.at[lax.rem(s, ring), :, block(i)].T, w_smem.at[here, lax.rem(s, 2), term])
                    pl.when(s + 1 < chunks)(lambda: keep_values(s + 1, here))
                    total = decays(s).total()
                    # Not summed onto the state by the tensor core, which cuts digits off where an addition would round.
                    return tuple(total * x + acc.load() for x, acc in zip(S, accumulators))

                S = accumulate.scoped(write, *[SQUARE] * depth, interpret=interpret)
                plgpu.barrier_arrive(free.at[lax.rem(s, ring)])
                return S

            keep_values(0, wg)
            S = tuple(plgpu.layout_cast(jnp.zeros(SQUARE, jnp.float32), TILE) for _ in range(depth))
            for i, x in enumerate(lax.fori_loop(0, chunks, step, S)):
                out_ref.at[b, h, 0, block(i), block(wg)][...] = x

        @pl.when(wg == W)
        def _produce():
            if W > 1 and not interpret:
                plgpu.set_max_registers(40, action='decrease')

            def load(slot, c):
                for ref, to in ((k_ref, k_smem), (v_ref, v_smem)):
                    source = ref.at[b, pl.ds(c * CHUNK, CHUNK), h // (N // ref.shape[2])]
                    plgpu.copy_gmem_to_smem(source, to.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(common.entry(decay_ref, b, h, c), g_smem.at[slot], full.at[slot])

            common.feed(chunks, ring, place, free, lambda: load)

    def entry_point(*refs):
        pl.run_scoped(
            lambda *scratch: kernel(*refs, scratch),
            common.swizzled((ring, CHUNK, K), dtype),
            common.swizzled((ring, CHUNK, V), dtype),
            plgpu.SMEM((ring, 2, CHUNK), jnp.float32),
            common.swizzled((W, 2, TERMS, CHUNK, 64), dtype),
            plgpu.Barrier(num_arrivals=3, num_barriers=ring),
            plgpu.Barrier(num_arrivals=W, num_barriers=ring),
            collective_axes='wg',
        )

    entry_point.__name__ = 'states' + '_back' * reverse  # what profilers show
    out_type = jax.ShapeDtypeStruct((B, N, 1, K, V), jnp.float32)
    return common.launch(entry_point, out_type, {'b': B, 'h': N}, W + 1, interpret)(k, v, decay)
