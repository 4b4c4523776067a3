"""Small shared layers. Parameters are float32 unless told; the product runs in `dtype`; norms in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnx import ops
from attnx.nn.params import normal, param
from attnx.spec import Dims
from pallas_kernels.kept import kept


class Linear(nnx.Module):
    """y = x W (+ b), W [in, out] ~ N(0, scale²/in)."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        axes: tuple[str | None, str | None],
        dims: Dims,
        *,
        rngs: nnx.Rngs,
        bias: bool = False,
        scale: float = 1.0,
    ):
        if min(num_in, num_out) < 1:
            raise ValueError(f'a product with a [{num_in}, {num_out}] matrix: both widths must be at least 1')
        self.kernel = param(normal(rngs, (num_in, num_out), scale * num_in**-0.5, dims.param_dtype), axes)
        self.bias = param(jnp.zeros((num_out,), dims.param_dtype), axes[1:]) if bias else None
        self.dtype = dims.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.shape[-1:] != self.kernel.shape[:1]:
            raise ValueError(f'expected [..., {self.kernel.shape[0]}], as wide as the layer was built, given {list(x.shape)}')
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return kept(y if self.bias is None else y + self.bias[...].astype(self.dtype))


def together(x: jax.Array, *linears: Linear) -> list[jax.Array]:
    """The products of x [..., in] with several layers of one width and no bias, as one: narrow ones each wait for x."""
    first = linears[0]
    kernel = jnp.stack([linear.kernel[...] for linear in linears], axis=1).astype(first.dtype)
    y = kept(jnp.einsum('...m,mcn->...cn', x.astype(first.dtype), kernel))
    return [y[..., i, :] for i in range(len(linears))]


def rms_normalize(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / sqrt(mean(x²) + eps) over the last dimension, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def l2_normalize(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / sqrt(sum(x²) + eps) over the last dimension, in float32; the dtype of x comes back."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """rms_normalize(x) * scale over the last dimension (the width of a head, if x is [B, T, N, H])."""

    def __init__(self, width: int, dims: Dims, *, rngs: nnx.Rngs, eps: float = 1e-6, axis: str = 'embed'):
        self.scale = param(jnp.ones((width,), dims.param_dtype), (axis,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return (rms_normalize(x, self.eps) * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last dimension."""

    def __init__(self, width: int, dims: Dims, *, rngs: nnx.Rngs, eps: float = 1e-5, axis: str = 'embed'):
        self.scale = param(jnp.ones((width,), dims.param_dtype), (axis,))
        self.bias = param(jnp.zeros((width,), dims.param_dtype), (axis,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        mean = jnp.mean(y, axis=-1, keepdims=True)
        root = jax.lax.rsqrt(jnp.mean(jnp.square(y - mean), axis=-1, keepdims=True) + self.eps)
        # The backward pass finds these two numbers a row: else XLA computes y again for the scale's gradient and stores it.
        mean, root = jax.lax.optimization_barrier((mean, root))
        return ((y - mean) * root * self.scale[...] + self.bias[...]).astype(x.dtype)


NORMS = {'rmsnorm': RMSNorm, 'layernorm': LayerNorm}


class ShortConv(nnx.Module):
    """Depthwise causal convolution over time; windows do not cross documents. State: the last `taps` - 1 inputs."""

    def __init__(self, width: int, taps: int, dims: Dims, *, rngs: nnx.Rngs, axis: str = 'heads', identity: bool = False):
        """identity: begins as y = x."""
        first = jnp.zeros((taps, width), dims.param_dtype).at[-1].set(1) if identity else None
        drawn = normal(rngs, (taps, width), taps**-0.5, dims.param_dtype) if first is None else first
        self.kernel = param(drawn, ('conv', axis))

    def init_state(self, batch: int, dtype: Any) -> jax.Array:
        taps, width = self.kernel.shape
        return jnp.zeros((batch, taps - 1, width), dtype)

    def __call__(self, x, state=None, segment_ids=None, impl='auto', activation=None, unit_heads=None):
        """x [B, T, D] -> (y [B, T, D], next state [B, taps - 1, D])."""
        options = {'initial_state': state, 'segment_ids': segment_ids, 'activation': activation, 'unit_heads': unit_heads}
        return ops.short_conv(x, self.kernel[...].astype(x.dtype), impl=impl, **options)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes entries with probability `rate`, scales the rest; the identity without a key."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """[B, T, N * H] -> [B, T, N, H]"""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def merge_heads(x: jax.Array) -> jax.Array:
    """[B, T, N, H] -> [B, T, N * H]"""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
