"""One token of a batch of sequences, for both recurrences: the state is read once and written once.

    S' = exp(g) S        u = v, or beta (v - k S')        S <- S' + k^T u        o = scale q S

The copy engine brings tiles of the state, a head and some columns of v each, to shared memory and takes them back. As many
warpgroups as fit share the tiles, each with a ring of them: some come and one leaves while one is computed. Arithmetic is
float32 throughout, so that nothing here is less exact than the XLA form.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common
from pallas_kernels.common import COL, ROW, TILE

COLUMNS = 32  # of v in a tile
RING = 3  # tiles of a warpgroup in shared memory
LN2 = 0.693145751953125, 1.42860677e-6  # their sum; of the first, multiples to 2^8 are exact
block = lambda i, size=64: pl.ds(i * size, size)
f32 = lambda x: None if x is None else x.astype(jnp.float32)


def one_token(static, query, key, value, beta, log_decay, initial_state):
    """The ops' arguments for T = 1, in any layout and width -> out [B, 1, N, V] and the new state [B, N, K, V]."""
    (B, _, N, V), K = value.shape, key.shape[3]

    def pad(x, *axes):
        return jnp.pad(x, [(0, -n % 64 if i in axes else 0) for i, n in enumerate(x.shape)])

    state = jnp.zeros((B, N, K, V), jnp.float32) if initial_state is None else initial_state.astype(jnp.float32)
    if log_decay is not None and log_decay.ndim > 1:
        log_decay = log_decay[:, 0] if log_decay.ndim == 3 else pad(log_decay[:, 0], 2)
    q, k, v = (pad(x[:, 0], 2) for x in (query, key, value))
    out, state = step(static, q, k, v, None if beta is None else beta[:, 0], log_decay, pad(state, 2, 3))
    return out[:, None, :, :V], state[:, :, :K, :V]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def step(static, query, key, value, beta, log_decay, state):
    """out [B, N, V] in value's dtype and the new state.

    Args:
      static: (scale, interpret).
      query, key: [B, heads, K], heads divide N.
      value: [B, N, V].
      beta: [B, N], or None for the gated linear recurrence.
      log_decay: None, [N], [B, N] or [B, N, K], natural log.
      state: float32 [B, N, K, V], K and V multiples of 64.
    """
    scale, interpret = static
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, value.shape[:2])
    (B, N, V), K = value.shape, key.shape[2]
    groups, depth, tile = N // key.shape[1], K // 64, (64, COLUMNS)
    parts = V // COLUMNS
    tiles = B * N * parts
    blocks = min(tiles, common.PROCESSORS * (4 if K <= 128 else 2))
    wide = lambda x: common.row(f32(x), tile)

    def one_token(q_ref, k_ref, v_ref, beta_ref, decay_ref, state_ref, out_ref, new_ref, s_smem, bars):
        me = lax.axis_index('block')
        count = (tiles - me + blocks - 1) // blocks

        def place(i):
            """Batch, head, and columns of the block's i-th tile, or of the last there is."""
            n = jnp.minimum(me + i * blocks, tiles - 1)
            head = n // parts
            return head // N, lax.rem(head, N), block(lax.rem(n, parts), COLUMNS)

        def fetch(i):
            (b, h, cols), slot = place(i), lax.rem(i, RING)
            for j in range(depth):
                plgpu.copy_gmem_to_smem(state_ref.at[b, h, block(j), cols], s_smem.at[slot, j], bars.at[slot])

        def vectors(i):
            b, h, cols = place(i)
            load = lambda ref, head, at, layout: plgpu.load(ref.at[b, head, at], layout=layout, optimized=False)
            rows = lambda ref, head: tuple(load(ref, head, block(j), ROW) for j in range(depth))
            decay = None if decay_ref is None else decay_ref[b, h] if len(decay_ref.shape) == 2 else rows(decay_ref, h)
            beta = None if beta_ref is None else beta_ref[b, h]
            return rows(q_ref, h // groups), rows(k_ref, h // groups), load(v_ref, h, cols, COL), beta, decay

        def compute(i, now):
            queries, keys, value, beta, decay = now
            (b, h, cols), slot = place(i), lax.rem(i, RING)
            following = vectors(i + 1)  # asked for before they are needed
            factor = decay if decay is None or isinstance(decay, tuple) else _exp(decay)
            plgpu.barrier_wait(bars.at[slot])

            def before(j):
                x = plgpu.load(s_smem.at[slot, j], layout=TILE)
                return x if factor is None else x * (common.row(_exp(factor[j]), tile) if isinstance(factor, tuple) else factor)

            state, u = [before(j) for j in range(depth)], f32(value)
            if beta is not None:
                u = (u - sum(x * wide(key) for x, key in zip(state, keys)).sum(axis=0)) * beta
            new = [x + wide(key) * common.col(u, tile) for x, key in zip(state, keys)]
            for j in range(depth):
                s_smem.at[slot, j][...] = new[j]
            plgpu.commit_smem()
            for j in range(depth):
                plgpu.copy_smem_to_gmem(s_smem.at[slot, j], new_ref.at[b, h, block(j), cols])
            out = sum(x * wide(query) for x, query in zip(new, queries)).sum(axis=0)
            out_ref.at[b, h, cols][...] = (out * scale).astype(value.dtype)
            plgpu.wait_smem_to_gmem(depth, wait_read_only=True)  # what the tile before left: its place is free
            pl.when(i + RING - 1 < count)(lambda: fetch(i + RING - 1))
            return following

        for i in range(RING - 1):
            pl.when(i < count)(functools.partial(fetch, i))
        lax.fori_loop(0, count, compute, vectors(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    run = plgpu.kernel(
        one_token,
        out_type=(jax.ShapeDtypeStruct((B, N, V), value.dtype), jax.ShapeDtypeStruct((B, N, K, V), jnp.float32)),
        scratch_types=(
            common.swizzled((RING, depth, *tile), jnp.float32),
            plgpu.Barrier(num_arrivals=depth, num_barriers=RING),
        ),
        grid=(blocks,),
        grid_names=('block',),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        **common.interpreted(interpret),
    )
    return common.waited(run(query, key, value, f32(beta), f32(log_decay), state), interpret)


def _exp(x):
    """exp to float32: its approximation is given what is left of whole powers of two."""
    x = jnp.maximum(x, -104.0)  # below, it is 0 in float32
    whole = common.whole(x * common.LOG2E)
    return common.power_of_two(whole) * jnp.exp2(((x - whole * LN2[0]) - whole * LN2[1]) * common.LOG2E)


def plain(static, query, key, value, beta, log_decay, state):
    """The same without a kernel, for derivatives."""
    scale, *_ = static
    wide = lambda x: jnp.repeat(x.astype(jnp.float32), value.shape[1] // x.shape[1], 1)
    q, k, u = scale * wide(query), wide(key), value.astype(jnp.float32)
    if log_decay is not None:
        decay = jnp.exp(log_decay.astype(jnp.float32))
        state = state * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
    if beta is not None:
        u = beta.astype(jnp.float32)[..., None] * (u - jnp.einsum('bnk,bnkv->bnv', k, state, precision='highest'))
    state = state + k[..., :, None] * u[..., None, :]
    return jnp.einsum('bnk,bnkv->bnv', q, state, precision='highest').astype(value.dtype), state


def _backward(static, arguments, cotangents):
    return jax.vjp(functools.partial(plain, static), *arguments)[1](cotangents)


step.defvjp(lambda static, *arguments: (step(static, *arguments), arguments), _backward)
