"""Short causal convolution, with SiLU and heads of unit length if asked for, on Hopper: one kernel each way.

    z_t = sum_{l < W} kernel_{W-1-l} x_{t-l}      s_t = silu(z_t) or z_t      y_t = s_t / sqrt(|s_t|^2 + eps) by head, or s_t

`short_conv` has the signature of `attnx.ops.short_conv` without `impl`; `unsupported` says why a call can't run here. A
warpgroup walks over `SPAN` tokens of 256 or 512 channels with the last W - 1 inputs in registers; backward also with the
gradients that are not complete and the taps' gradient: dy and x are read, dx is written, z is computed again.
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
from pallas_kernels.kept import kept_once

SPAN = 64  # tokens of a warpgroup
AHEAD = 8  # tokens whose loads are in flight at once
AHEAD_OF_UNIT = 2  # backward with heads of unit length: more would cost registers, of which blocks on a processor share 65,536
MOST_TAPS = 8
LANES, WARPS = 32, 4
LEAST = 2 * WARPS * LANES  # channels of a block: jax 0.12 moves no less than two 16-bit numbers a thread
UNIT = 4 * LANES  # channels that lie in a warp, where there are enough for a block
EPS = 1e-6  # as `attnx.ops.short_conv`


def unsupported(x, kernel, *, initial_state=None, segment_ids=None, activation=None, unit_heads=None) -> str | None:
    """Why this call can't run here, with the nearest choice that can; or None."""
    (_, T, D), (W, _) = x.shape, kernel.shape
    if T == 1:
        return 'one token is one small fusion of XLA; use impl="xla"'
    if jnp.result_type(x) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f'x must be bfloat16, float16 or float32, given {jnp.result_type(x)}; use impl="xla"'
    if D % UNIT or D < LEAST:
        return f'channels must be a multiple of {UNIT} and {LEAST} at least, given {D}; use impl="xla"'
    if W > MOST_TAPS:
        return f'up to {MOST_TAPS} taps, given {W}; use impl="xla"'
    warp, width = _each(D) * LANES, D // (unit_heads or D)
    if unit_heads and (warp % width or width % _each(D)):
        return f'heads of unit length must divide the {warp} channels of a warp, given {width}; use impl="xla"'
    return hardware()


def _each(D: int) -> int:
    """Neighbouring channels of a thread."""
    return 4 if D >= 2 * LEAST else 2


def short_conv(x, kernel, *, initial_state=None, segment_ids=None, activation=None, unit_heads=None, interpret=False):
    """As `attnx.ops.short_conv`, first derivatives only.

    Raises:
      ValueError: `unsupported` has a reason.
    """
    if reason := unsupported(x, kernel, unit_heads=unit_heads):
        raise ValueError(f'short_conv on mosaic_gpu: {reason}')
    static = activation == 'silu', unit_heads, interpret
    return _short_conv(static, x, kernel, initial_state, _age(segment_ids, kernel.shape[0]))


def _age(segment_ids, taps: int):
    """How many tokens before each one it may see, int32 [B, T]; None: as many as there are taps."""
    if segment_ids is None:
        return None
    reset = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)])
    t = jnp.arange(reset.shape[1], dtype=jnp.int32)
    return jnp.minimum(t - lax.cummax(jnp.where(reset, t, -taps), axis=1), taps - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _short_conv(static, x, kernel, first, age):
    silu, unit, interpret = static
    state = jnp.zeros((x.shape[0], kernel.shape[0] - 1, x.shape[2]), x.dtype) if first is None else first
    return outputs(x, kernel, first, age, silu=silu, unit=unit, interpret=interpret), last(x, state, age)


def plain(silu, unit, x, kernel, first, age, dtype=jnp.float32):
    """y by XLA."""
    length, taps = x.shape[1], kernel.shape[0]
    past = jnp.concatenate([first.astype(x.dtype), x], axis=1)
    z = jnp.zeros((), dtype)
    for tap in range(taps):
        shifted = past[:, tap : tap + length].astype(dtype)
        shifted = shifted if age is None else jnp.where(age[..., None] >= taps - 1 - tap, shifted, 0)
        z += kernel[tap].astype(dtype) * shifted
    y = jax.nn.silu(z) if silu else z
    if unit:
        heads = y.reshape(*y.shape[:2], unit, -1)
        y = (heads * lax.rsqrt(jnp.sum(jnp.square(heads), -1, keepdims=True) + EPS)).reshape(y.shape)
    return y.astype(x.dtype)


def last(x, first, age):
    """The window that the next token will see, [B, W - 1, D]."""
    kept = first.shape[1]
    last = jnp.concatenate([first, x[:, -kept:].astype(first.dtype)], axis=1)[:, -kept:] if kept else first
    if age is not None:
        last = jnp.where((age[:, -1:] >= jnp.arange(kept)[::-1])[..., None], last, 0)
    return last


def _forward(static, *args):
    args = jax.tree.map(lambda x: x.value, args, is_leaf=is_primal)
    y, window = _short_conv(static, *args)
    return (kept_once(y), window), args


def _backward(static, saved, cotangents):
    (x, kernel, first, age), (dy, dlast) = saved, cotangents
    silu, unit, interpret = static
    kept = kernel.shape[0] - 1
    state = jnp.zeros((x.shape[0], kept, x.shape[2]), x.dtype) if first is None else first
    dx, dkernel, dstate = jnp.zeros_like(x), jnp.zeros_like(kernel), jnp.zeros_like(state)
    if not isinstance(dy, SymbolicZero):
        dx, parts = gradients(x, kernel, dy, first, age, silu=silu, unit=unit, interpret=interpret)
        dkernel = parts.sum((0, 1)).astype(kernel.dtype)
        early = lambda state: plain(silu, unit, x[:, :kept], kernel, state, None if age is None else age[:, :kept])
        if first is not None and kept:
            (dstate,) = jax.vjp(early, state)[1](dy[:, :kept])
    if not isinstance(dlast, SymbolicZero) and kept:
        dtail, more = jax.vjp(lambda tail, state: last(tail, state, age), x[:, -kept:], state)[1](dlast)
        # Not `at[].add`: XLA (jax 0.11) can't update a kernel's result in place.
        dx = jnp.concatenate([dx[:, :-kept], dx[:, -kept:] + dtail], axis=1)
        dstate += more
    return dx, dkernel, None if first is None else dstate, None


_short_conv.defvjp(_forward, _backward, symbolic_zeros=True)


class _Part:
    """The channels of a block, [rows, width] in registers: a row a head where heads have unit length; and its tokens."""

    def __init__(self, x, kernel, unit: int | None):
        (self.B, self.T, self.D), self.W = x.shape, kernel.shape[0]
        each = _each(self.D)
        self.width = self.D // unit if unit else each * LANES
        of_warp = each * LANES // self.width
        self.rows = WARPS * of_warp
        tiles = [(self.rows, self.width), (of_warp, self.width), (each,)]
        if of_warp > 1:
            where = {'warp_dims': (-5,), 'lane_dims': (-3, -2)}
        else:
            del tiles[1]
            where = {'warp_dims': (-3,), 'lane_dims': (-2,)}
        self.layout = plgpu.Layout.TILED(plgpu.Tiling(tuple(tiles)), **where, vector_dim=-1)
        self.grid = self.B, common.cdiv(self.T, SPAN), common.cdiv(self.D // self.width, self.rows)

    def split(self, x):
        """[..., D] -> [..., D / width, width]"""
        return None if x is None else x.reshape(*x.shape[:-1], -1, self.width)

    def enter(self):
        self.b, self.span, part = (lax.axis_index(name) for name in 'btd')
        # The last block may share channels with the one before, and writes the same there.
        self.mine = pl.ds(jnp.minimum(part * self.rows, self.D // self.width - self.rows), self.rows)
        self.start = self.span * SPAN

    def constant(self, value):
        return plgpu.layout_cast(jnp.full((self.rows, self.width), value, jnp.float32), self.layout)

    def where(self, condition, x, y=None):
        y = self.constant(0.0) if y is None else y
        return jnp.where(jnp.broadcast_to(condition, (self.rows, self.width)), x, y)

    def load(self, ref, *at):
        return plgpu.load(ref.at[*at, self.mine], layout=self.layout, optimized=False)

    def token(self, ref, t):
        return self.load(ref, self.b, jnp.clip(t, 0, self.T - 1))

    def store(self, ref, t, value, condition=None):
        """At token t, where there is one and `condition` holds."""
        inside = None if self.T % SPAN == 0 else t < self.T
        both = [c for c in (inside, condition) if c is not None]

        def write():
            ref.at[self.b, t, self.mine][...] = value.astype(ref.dtype)

        pl.when(functools.reduce(jnp.logical_and, both))(write) if both else write()

    def before(self, x_ref, first_ref):
        """The W - 1 inputs before the block's first token, oldest first."""
        kept, found = self.W - 1, []
        for t in (self.start - kept + i for i in range(kept)):
            past = None if first_ref is None else self.load(first_ref, self.b, jnp.clip(t + kept, 0, kept - 1))
            past = None if past is None else past.astype(jnp.float32)
            found.append(self.where(t >= 0, self.token(x_ref, t).astype(jnp.float32), past))
        return tuple(found)

    def visible(self, age_ref, t):
        """(lag, x) -> x where token t may see what came `lag` tokens before, else 0."""
        if age_ref is None:
            return lambda lag, x: x
        age = age_ref[self.b, jnp.clip(t, 0, self.T - 1)]
        return lambda lag, x: x if lag == 0 else self.where(age >= lag, x)

    def over_heads(self, x):
        """The sum of each row, at all of its channels."""
        total = lax.broadcast_in_dim(x.sum(axis=1), (self.rows, self.width), (0,))
        return plgpu.layout_cast(total, self.layout)

    def call(self, body, name, out_type, interpret):
        body.__name__ = name  # what profilers show
        return plgpu.kernel(
            body,
            out_type=out_type,
            grid=self.grid,
            grid_names=('b', 't', 'd'),
            compiler_params=plgpu.CompilerParams(
                approx_math=True,
                lowering_semantics=plgpu.LoweringSemantics.Lane,
                unsafe_no_auto_barriers=True,  # no thread reads what another writes
            ),
            **common.interpreted(interpret),
        )


def _values(part, taps, felt, silu, unit):
    """s and sigmoid(z) of a token (or None), and 1 / sqrt(|s|^2 + eps) of heads (or None)."""
    value = sum(tap * x for tap, x in zip(taps, felt))
    share = None
    if silu:
        root = lax.rsqrt(1.0 + jnp.exp(-value))
        share = root * root  # an instruction; a division is ten
        value *= share
    return value, share, lax.rsqrt(part.over_heads(value * value) + EPS) if unit else None


@common.lowered_once('silu', 'unit', 'interpret')
def outputs(x, kernel, first, age, *, silu, unit=None, interpret=False):
    """y as x.

    Args:
      x: [B, T, D], D a multiple of `UNIT`, at least `LEAST`.
      kernel: [W, D].
      first: [B, W - 1, D], before the first token, or None.
      age: int32 [B, T], how many tokens before it each may see, or None.
    """
    part = _Part(x, kernel, unit)

    def body(x_ref, kernel_ref, first_ref, age_ref, y_ref):
        part.enter()
        taps = [part.load(kernel_ref, tap).astype(jnp.float32) for tap in range(part.W)]

        def some(i, window):
            tokens = [part.start + i * AHEAD + j for j in range(AHEAD)]
            for t, x in zip(tokens, [part.token(x_ref, t) for t in tokens]):
                visible = part.visible(age_ref, t)
                window = (*window, x.astype(jnp.float32))
                felt = [visible(part.W - 1 - tap, x) for tap, x in enumerate(window)]
                value, _, root = _values(part, taps, felt, silu, unit)
                part.store(y_ref, t, value if root is None else value * root)
                window = window[1:]
            return window

        lax.fori_loop(0, SPAN // AHEAD, some, part.before(x_ref, first_ref))

    out_type = jax.ShapeDtypeStruct(part.split(x).shape, x.dtype)
    run = part.call(body, 'short_conv_forward', out_type, interpret)
    return run(part.split(x), part.split(kernel), part.split(first) if part.W > 1 else None, age).reshape(x.shape)


@common.lowered_once('silu', 'unit', 'interpret')
def gradients(x, kernel, dy, first, age, *, silu, unit=None, interpret=False):
    """dx as x; and dkernel in parts, float32 [B, spans, W, D]. Arguments as of `outputs`, dy as x."""
    part, ahead = _Part(x, kernel, unit), AHEAD_OF_UNIT if unit else AHEAD
    W, kept = part.W, part.W - 1

    def body(x_ref, kernel_ref, dy_ref, first_ref, age_ref, dx_ref, parts_ref):
        part.enter()
        taps = [part.load(kernel_ref, tap).astype(jnp.float32) for tap in range(W)]

        def step(t, x, dy, carry, mine=True):
            """pending: what is known of dx of the window's tokens; mine: a token of this block, that counts in the sums."""
            window, pending, sums = carry  # oldest first
            visible = part.visible(age_ref, t)
            window = (*window, x.astype(jnp.float32))
            felt = [visible(W - 1 - tap, x) for tap, x in enumerate(window)]
            value, share, root = _values(part, taps, felt, silu, unit)
            dz = dy.astype(jnp.float32)
            if root is not None:
                dz = root * (dz - root * root * part.over_heads(value * dz) * value)
            if share is not None:
                dz *= share + value * (1.0 - share)
            if not mine or part.T % SPAN:
                dz = part.where(t < part.T, dz)
            pending = [x + visible(W - 1 - tap, taps[tap] * dz) for tap, x in enumerate((*pending, part.constant(0.0)))]
            if mine:
                sums = tuple(total + dz * x for total, x in zip(sums, felt))
            return pending[0], (window[1:], tuple(pending[1:]), sums)

        def some(i, carry, count=ahead, mine=True):
            tokens = [part.start + i * ahead + j for j in range(count)]
            loads = [(part.token(x_ref, t), part.token(dy_ref, t)) for t in tokens]
            for j, (t, (x, dy)) in enumerate(zip(tokens, loads)):
                dx, carry = step(t, x, dy, carry, mine)
                part.store(dx_ref, t - kept, dx, t - kept >= part.start if j < kept and mine else None)
            return carry

        zeros = lambda n: (part.constant(0.0),) * n
        carry = lax.fori_loop(0, SPAN // ahead, some, (part.before(x_ref, first_ref), zeros(kept), zeros(W)))
        some(SPAN // ahead, carry, kept, mine=False)
        for tap, total in enumerate(carry[2]):
            parts_ref.at[part.b, part.span, tap, part.mine][...] = total

    sums = jax.ShapeDtypeStruct((*part.grid[:2], W, part.D // part.width, part.width), jnp.float32)
    out_type = jax.ShapeDtypeStruct(part.split(x).shape, x.dtype), sums
    run = part.call(body, 'short_conv_backward', out_type, interpret)
    first = part.split(first) if kept else None
    dx, sums = run(part.split(x), part.split(kernel), part.split(dy), first, age)
    return dx.reshape(x.shape), sums.reshape(*part.grid[:2], W, part.D)
