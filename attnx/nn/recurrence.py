"""What recurrent mechanisms share beside their state: convolved projections, decays, positions, the delta-rule layer."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from attnx import ops
from attnx.nn.layers import Linear, RMSNorm, ShortConv, l2_normalize, merge_heads, split_heads, together
from attnx.nn.params import param
from attnx.nn.state import Recurrent
from attnx.spec import Context, Dims, Mixer, Output


class ConvLinear(nnx.Module):
    """activation(short_conv(x W) + b): how q, k and v are made in delta-rule and state-space mechanisms.

    taps 0: no convolution, and no window to keep. unit_heads: so many heads of unit length, or None: as they are.
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
        unit_heads: int | None = None,
    ):
        if taps < 0:
            raise ValueError(f'conv_taps {taps} is negative; 0 is no convolution')
        self.linear = Linear(num_in, num_out, axes, dims, rngs=rngs)
        self.conv = ShortConv(num_out, taps, dims, rngs=rngs, axis=axes[1]) if taps else None
        self.bias = param(jnp.zeros((num_out,), dims.param_dtype), axes[1:]) if bias else None
        self.activation, self.unit_heads = activation, unit_heads

    def init_state(self, batch: int, dtype) -> jax.Array | None:
        return None if self.conv is None else self.conv.init_state(batch, dtype)

    def __call__(self, x, window=None, segment_ids=None, impl='auto'):
        """x [B, T, in] -> (y [B, T, out], next window)."""
        y = self.linear(x)
        if self.conv is not None and self.bias is None and self.activation is jax.nn.silu:
            return self.conv(y, window, segment_ids, impl, activation='silu', unit_heads=self.unit_heads)
        if self.conv is not None:
            y, window = self.conv(y, window, segment_ids, impl)
        y = self.activation(y if self.bias is None else y + self.bias[...].astype(y.dtype))
        y = y if self.unit_heads is None else merge_heads(l2_normalize(split_heads(y, self.unit_heads)))
        return y, window


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


class DeltaMixer(Mixer):
    """q, k and v by short convolutions, q and k of unit length, the delta rule, a norm per head, a gate if asked for.

    config: num_heads, key_expansion, value_expansion, conv_taps, negative_eigenvalues, gate. `decay` and `log_decay` are for
    a mechanism to define: None here.
    """

    decay: Linear | None = None  # a number a head

    def __init__(self, config, dims: Dims, *, rngs):
        self.config, self.dtype = config, dims.dtype
        n = config.num_heads
        keys, values = round(dims.width * config.key_expansion), round(dims.width * config.value_expansion)
        if n < 1 or keys % n or values % n:
            raise ValueError(f'key width {keys} and value width {values} must divide into num_heads {n}')
        self.shape = (n, keys // n, values // n)
        into, options = ('embed', 'heads'), {'taps': config.conv_taps, 'rngs': rngs}
        self.query = ConvLinear(dims.width, keys, into, dims, **options, unit_heads=n)
        self.key = ConvLinear(dims.width, keys, into, dims, **options, unit_heads=n)
        self.value = ConvLinear(dims.width, values, into, dims, **options)
        self.beta = Linear(dims.width, n, into, dims, rngs=rngs)
        self.gate = Linear(dims.width, values, into, dims, rngs=rngs) if config.gate else None
        self.norm = RMSNorm(values // n, dims, rngs=rngs, axis='head_dim')
        self.out = Linear(values, dims.width, ('heads', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)

    def init_state(self, batch, capacity, dtype=None):
        windows = {k: getattr(self, k).init_state(batch, dtype or self.dtype) for k in ('query', 'key', 'value')}
        return Recurrent.init({'matrix': jnp.zeros((batch, *self.shape), jnp.float32), **windows})

    def log_decay(self, rate: jax.Array) -> jax.Array:
        """`decay(x)` [B, T, N] -> what `ops.delta_rule` takes as log_decay."""
        raise NotImplementedError

    def __call__(self, x, ctx: Context, state=None) -> Output:
        n, head_dim, _ = self.shape
        memory, ids = ({}, ctx.segment_ids) if state is None else state.resume(ctx, *x.shape[:2])
        new = {}
        query, new['query'] = self.query(x, memory.get('query'), ids, ctx.impl)
        key, new['key'] = self.key(x, memory.get('key'), ids, ctx.impl)
        value, new['value'] = self.value(x, memory.get('value'), ids, ctx.impl)
        beta, *rate = together(x, self.beta, *([] if self.decay is None else [self.decay]))
        beta = jax.nn.sigmoid(beta.astype(jnp.float32))
        out, new['matrix'] = ops.delta_rule(
            split_heads(query, n),
            split_heads(key, n),
            split_heads(value, n),
            2 * beta if self.config.negative_eigenvalues else beta,
            self.log_decay(*rate) if rate else None,
            initial_state=memory.get('matrix'),
            segment_ids=ids,
            scale=head_dim**-0.5,
            impl=ctx.impl,
        )
        y = merge_heads(self.norm(out))
        y = y if self.gate is None else y * jax.nn.silu(self.gate(x))
        return Output(self.out(y), None if state is None else state.advance(new, ids))
