"""What recurrent mechanisms share beside their state: convolved projections, decay parameters, document positions."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from attnx.nn.layers import Linear, ShortConv
from attnx.nn.params import param
from attnx.spec import Context, Dims


class ConvLinear(nnx.Module):
    """activation(short_conv(x W) + b): how q, k and v are made in delta-rule and state-space mechanisms.

    taps 0: no convolution, and no window to keep.
    """

    def __init__(
        self,
        num_in: int,
        num_out: int,
        axes: tuple[str | None, str | None],
        dims: Dims,
        *,
        taps: int,
        rngs: nnx.Rngs,
        bias: bool = False,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    ):
        if taps < 0:
            raise ValueError(f'conv_taps {taps} is negative; 0 is no convolution')
        self.linear = Linear(num_in, num_out, axes, dims, rngs=rngs)
        self.conv = ShortConv(num_out, taps, dims, rngs=rngs, axis=axes[1]) if taps else None
        self.bias = param(jnp.zeros((num_out,), dims.param_dtype), axes[1:]) if bias else None
        self.activation = activation

    def init_state(self, batch: int, dtype) -> jax.Array | None:
        return None if self.conv is None else self.conv.init_state(batch, dtype)

    def __call__(self, x, window=None, segment_ids=None, impl='auto'):
        """x [B, T, in] -> (y [B, T, out], next window)."""
        y = self.linear(x)
        if self.conv is not None:
            y, window = self.conv(y, window, segment_ids, impl)
        y = y if self.bias is None else y + self.bias[...].astype(y.dtype)
        return self.activation(y), window


def log_rate(rngs: nnx.Rngs, num: int, low: float, high: float, dims: Dims) -> nnx.Param:
    """log of rates ~ Uniform(low, high), one a head: Mamba's A_log."""
    rate = jax.random.uniform(rngs.params(), (num,), jnp.float32, max(low, 1e-4), high)
    return param(jnp.log(rate).astype(dims.param_dtype), ('heads',))


def dt_bias(rngs: nnx.Rngs, num: int, dims: Dims, *, low: float = 1e-3, high: float = 1e-1) -> nnx.Param:
    """The bias b for which step sizes softplus(b) lie log-uniformly in [low, high], one a head."""
    step = jnp.exp(jax.random.uniform(rngs.params(), (num,), jnp.float32, math.log(low), math.log(high)))
    step = jnp.maximum(step, 1e-4)
    return param((step + jnp.log(-jnp.expm1(-step))).astype(dims.param_dtype), ('heads',))


def document_positions(ctx: Context, ids: jax.Array | None, length: int, start: jax.Array | None = None) -> jax.Array:
    """int32 [B or 1, T]: the context's positions, or 0, 1, … from where each document begins.

    ids: int [B, T] or None: one document. start [B]: position of the first token, if it goes on in a document; a
    mechanism keeps `result[:, -1] + 1` in its state for that.
    """
    if ctx.positions is not None:
        return ctx.positions
    steps = jnp.arange(length)[None]
    first = 0 if start is None else start[:, None]
    if ids is None:
        return first + steps
    begins = jnp.where(ids[:, 1:] != ids[:, :-1], steps[:, 1:], 0)
    begins = jnp.pad(jax.lax.cummax(begins, axis=1), ((0, 0), (1, 0)))
    return steps - begins + jnp.where(begins == 0, first, 0)
