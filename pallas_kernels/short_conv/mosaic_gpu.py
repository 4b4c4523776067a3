"""Short causal convolution, with SiLU if asked for: forward in XLA, backward in one kernel on Hopper.

    z_t = sum_{l < W} kernel_{W-1-l} x_{t-l}        y_t = silu(z_t) or z_t

`short_conv` has the signature of `attnx.ops.short_conv` without `impl`; `unsupported` says why a call can't run here. XLA makes
one kernel of the forward pass, which reads x and writes y; the backward pass takes it three, which move eight times x's size.
Here a warpgroup walks over 32 tokens of 128 to 512 channels with the last W - 1 inputs, the gradients that are not complete and
the taps' gradient in registers: dy and x are read, dx is written, z is computed again.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import common
from pallas_kernels.gated_linear.mosaic_gpu import hardware, is_primal

SPAN = 32  # tokens of a warpgroup
MOST_TAPS = 8
LANES = 128


def unsupported(x, kernel, *, initial_state=None, segment_ids=None, activation=None) -> str | None:
    """Why this call can't run here, with the nearest choice that can; or None."""
    (_, T, D), (W, _) = x.shape, kernel.shape
    if T == 1:
        return 'one token is one small fusion of XLA; use impl="xla"'
    if jnp.result_type(x) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f'x must be bfloat16, float16 or float32, given {jnp.result_type(x)}; use impl="xla"'
    if D % LANES:
        return f'channels must be a multiple of {LANES}, given {D}; use impl="xla"'
    if W > MOST_TAPS:
        return f'up to {MOST_TAPS} taps, given {W}; use impl="xla"'
    return hardware()


def short_conv(x, kernel, *, initial_state=None, segment_ids=None, activation=None, interpret=False):
    """As `attnx.ops.short_conv`, first derivatives only.

    Raises:
      ValueError: `unsupported` has a reason.
    """
    if reason := unsupported(x, kernel):
        raise ValueError(f'short_conv on mosaic_gpu: {reason}')
    return _short_conv((activation == 'silu', interpret), x, kernel, initial_state, _age(segment_ids, kernel.shape[0]))


def _age(segment_ids, taps: int):
    """How many tokens before each one it may see, int32 [B, T]; None: as many as there are taps."""
    if segment_ids is None:
        return None
    reset = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)])
    t = jnp.arange(reset.shape[1], dtype=jnp.int32)
    return jnp.minimum(t - lax.cummax(jnp.where(reset, t, -taps), axis=1), taps - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _short_conv(static, x, kernel, first, age):
    state = jnp.zeros((x.shape[0], kernel.shape[0] - 1, x.shape[2]), x.dtype) if first is None else first
    return outputs(static[0], x, kernel, state, age), last(x, state, age)


def outputs(silu, x, kernel, first, age, dtype=jnp.float32):
    length, taps = x.shape[1], kernel.shape[0]
    past = jnp.concatenate([first.astype(x.dtype), x], axis=1)
    z = jnp.zeros((), dtype)
    for tap in range(taps):
        shifted = past[:, tap : tap + length].astype(dtype)
        shifted = shifted if age is None else jnp.where(age[..., None] >= taps - 1 - tap, shifted, 0)
        z += kernel[tap].astype(dtype) * shifted
    return (jax.nn.silu(z) if silu else z).astype(x.dtype)


def last(x, first, age):
    """The window that the next token will see, [B, W - 1, D]."""
    kept = first.shape[1]
    last = jnp.concatenate([first, x[:, -kept:].astype(first.dtype)], axis=1)[:, -kept:] if kept else first
    if age is not None:
        last = jnp.where((age[:, -1:] >= jnp.arange(kept)[::-1])[..., None], last, 0)
    return last


def _forward(static, *args):
    args = jax.tree.map(lambda x: x.value, args, is_leaf=is_primal)
    return _short_conv(static, *args), args


def _backward(static, saved, cotangents):
    (x, kernel, first, age), (dy, dlast) = saved, cotangents
    silu, interpret = static
    kept = kernel.shape[0] - 1
    state = jnp.zeros((x.shape[0], kept, x.shape[2]), x.dtype) if first is None else first
    dx, dkernel, dstate = jnp.zeros_like(x), jnp.zeros_like(kernel), jnp.zeros_like(state)
    if not isinstance(dy, SymbolicZero):
        dx, parts = gradients(x, kernel, dy, state, age, silu=silu, interpret=interpret)
        dkernel = parts.sum((0, 1)).astype(kernel.dtype)
        early = lambda state: outputs(silu, x[:, :kept], kernel, state, None if age is None else age[:, :kept])
        if first is not None and kept:
            (dstate,) = jax.vjp(early, state)[1](dy[:, :kept])
    if not isinstance(dlast, SymbolicZero) and kept:
        dtail, more = jax.vjp(lambda tail, state: last(tail, state, age), x[:, -kept:], state)[1](dlast)
        # Not `at[].add`: XLA (jax 0.11) can't update a kernel's result in place.
        dx = jnp.concatenate([dx[:, :-kept], dx[:, -kept:] + dtail], axis=1)
        dstate += more
    return dx, dkernel, None if first is None else dstate, None


_short_conv.defvjp(_forward, _backward, symbolic_zeros=True)


@common.lowered_once('silu', 'interpret')
def gradients(x, kernel, dy, first, age, *, silu, interpret=False):
    """dx as x; and dkernel in parts, float32 [B, spans, W, D].

    Args:
      x, dy: [B, T, D], D a multiple of 128.
      kernel: [W, D].
      first: [B, W - 1, D], before the first token.
      age: int32 [B, T], how many tokens before it each may see, or None.
    """
    (B, T, D), W, dtype, f32 = x.shape, kernel.shape[0], x.dtype, jnp.float32
    each = next(n for n in (4, 2, 1) if D % (n * LANES) == 0)  # more would leave too few warpgroups a processor
    width, spans, kept = LANES * each, common.cdiv(T, SPAN), W - 1
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=each)

    def body(x_ref, kernel_ref, dy_ref, first_ref, age_ref, dx_ref, parts_ref):
        b, part, span = lax.axis_index('b'), lax.axis_index('d'), lax.axis_index('t')
        cols, start = pl.ds(part * width, width), span * SPAN
        load = lambda ref, *at: plgpu.load(ref.at[*at, cols], layout=layout, optimized=False).astype(f32)
        constant = lambda value: plgpu.layout_cast(jnp.full((width,), value, f32), layout)
        where = lambda condition, x: jnp.where(jnp.broadcast_to(condition, (width,)), x, constant(0.0))
        row = lambda ref, t: load(ref, b, jnp.clip(t, 0, T - 1))
        taps = [load(kernel_ref, tap) for tap in range(W)]

        def before(t):
            """x of a token before the span."""
            past = load(first_ref, b, jnp.clip(t + kept, 0, kept - 1))
            return jnp.where(jnp.broadcast_to(t >= 0, (width,)), row(x_ref, t), past)

        def step(i, carry):
            window, pending, sums, newest, dz = carry  # oldest first; pending: dx of the window's tokens
            t = start + i
            ahead = row(x_ref, t + 1), row(dy_ref, t + 1)  # while this token is computed
            seen = None if age_ref is None else age_ref[b, jnp.clip(t, 0, T - 1)]
            visible = lambda lag, x: x if lag == 0 or seen is None else where(seen >= lag, x)
            window = (*window, newest)
            felt = [visible(W - 1 - tap, x) for tap, x in enumerate(window)]
            if silu:
                z = sum(tap * x for tap, x in zip(taps, felt))
                s = 1.0 / (1.0 + jnp.exp(-z))
                dz = dz * s * (1.0 + z * (1.0 - s))
            dz = where(t < T, dz)
            pending = [x + visible(W - 1 - tap, taps[tap] * dz) for tap, x in enumerate((*pending, constant(0.0)))]
            mine = jnp.where(i < SPAN, 1.0, 0.0)
            sums = tuple(total + mine * dz * x for total, x in zip(sums, felt))
            done = t - kept

            @pl.when((done >= start) & (done < T))
            def _():
                dx_ref.at[b, done, cols][...] = pending[0].astype(dtype)

            return window[1:], tuple(pending[1:]), sums, *ahead

        zeros = lambda n: tuple(constant(0.0) for _ in range(n))
        window = tuple(before(start - kept + i) for i in range(kept))
        first_rows = row(x_ref, start), row(dy_ref, start)
        _, _, sums, *_ = lax.fori_loop(0, SPAN + kept, step, (window, zeros(kept), zeros(W), *first_rows))
        for tap, total in enumerate(sums):
            parts_ref.at[b, span, tap, cols][...] = total

    body.__name__ = 'short_conv_backward'  # what profilers show
    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((B, spans, W, D), f32)),
        grid=(B, D // width, spans),
        grid_names=('b', 'd', 't'),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({'interpret': plgpu.InterpretGPUParams(detect_races=True)} if interpret else {}),
    )(x, kernel, dy, first if kept else None, age)
