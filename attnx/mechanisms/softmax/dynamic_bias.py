"""Dynamic position bias: a small network turns a distance into a bias per head, so that any length has one.

Equation: s_ij = scale q_i . k_j + f(d_ij)_h, o_i = sum_j softmax_j(s_ij) v_j;  f: d -> `depth` layers silu(LayerNorm(W z + b))
    of `hidden` units -> a number a head;  d = i - j, or sign(i - j) log(1 + |i - j|);  of a grid d = (rows, columns) between.
Paper: CrossFormer: a versatile vision transformer hinging on cross-scale attention, 2021, arXiv 2108.00154.
Differs: along a line it is the form of a common library (lucidrains' x-transformers), which the paper, of windows of images,
    does not have; grids need no size here, so that distances count in tokens. The paper has 3 layers with ReLU.
Cost: train O(T²) time, O(T) memory and 2 T evaluations of f, through the fused op; of a grid masked pairs too, some rows of
    pairs at a time, no [T, T] array (`weighted_attention`, XLA). Decode keeps 2 K H numbers a token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attnx import ops
from attnx.nn import LayerNorm, Linear, attention, softmax
from attnx.ops.weighted_attention import products
from attnx.spec import Context, Dims, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    position: str = 'none'  # none: the code is the mechanism
    hidden: int = 0  # units of a layer of f; 0: width / 4
    depth: int = 2  # hidden layers of f
    norm: bool = True  # LayerNorm in each of them
    log_distance: bool = False  # f reads the logarithm of the distance
    grid: int = 0  # tokens in a row of a 2-D grid; 0: a line

    def __post_init__(self):
        super().__post_init__()
        softmax.refuse(self, 'the bias is the position code', 'position', 'rope')
        if min(self.hidden, self.grid) < 0 or self.depth < 1:
            raise ValueError(f'hidden {self.hidden} and grid {self.grid} must not be negative, depth {self.depth} at least 1')


class DynamicBiasAttention(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        hidden, inputs = config.hidden or max(dims.width // 4, 8), 2 if config.grid else 1
        make = lambda rows, axes: Linear(rows, hidden, axes, dims, rngs=rngs, bias=True)
        axes = [(None, 'features')] + [('features', None)] * (config.depth - 1)
        self.layers = nnx.List([make(inputs if n == 0 else hidden, axes[n]) for n in range(config.depth)])
        self.norms = nnx.List([LayerNorm(hidden, dims, rngs=rngs, axis='features') for _ in axes]) if config.norm else None
        self.bias = Linear(hidden, config.num_heads, ('features', 'heads'), dims, rngs=rngs)

    def distance_bias(self, d: jax.Array) -> jax.Array:
        """f: distances, query minus key, [..., 1 or 2] -> float32 [..., N]."""
        z = d.astype(jnp.float32)
        z = (jnp.sign(z) * jnp.log1p(jnp.abs(z)) if self.config.log_distance else z).astype(self.dtype)
        for number, layer in enumerate(self.layers):
            z = layer(z)
            z = jax.nn.silu(z if self.norms is None else self.norms[number](z))
        return self.bias(z).astype(jnp.float32)

    def attend(self, query, keys, ctx: Context):
        if self.config.grid:
            return self.attend_on_grid(query, keys, ctx)
        far = keys.distances()
        far = jnp.arange(1 - keys.length, query.shape[1]) if far is None else far  # key minus query
        term, score = ops.scores.relative(self.distance_bias(-far[:, None]).T), self.core.score(keys)
        return self.core.attend(query, *keys.arrays, ctx, self.core.mask(keys), term if score is None else term >> score)

    def attend_on_grid(self, query, keys, ctx):
        """Pairs of positions have one of (2 rows - 1) (2 columns - 1) distances: f of each, then picked from."""
        across = self.config.grid
        at, where = keys.in_documents()
        at, where = (jnp.arange(keys.length)[None] if x is None else x for x in (at, where))
        down = -(-keys.length // across)
        steps = jnp.stack(jnp.meshgrid(jnp.arange(1 - down, down), jnp.arange(1 - across, across), indexing='ij'), axis=-1)
        table = self.distance_bias(steps)  # [2 rows - 1, 2 columns - 1, N]
        scale = self.config.scale or self.head_dim**-0.5

        def logits(query, key, i):
            q, to = at[:, jnp.minimum(i.q[0, 0, :, 0], i.q_len - 1), None], jnp.maximum(where, 0)[:, None]
            bias = table[q // across - to // across + down - 1, q % across - to % across + across - 1]  # [B, t, S, N]
            return products(query, key, scale) + jnp.moveaxis(bias, -1, 1)

        extra = {'weights': self.core.weights(), 'logits': logits, 'pair_width': 2}
        return self.core.attend(query, *keys.arrays, ctx, self.core.mask(keys), self.core.score(keys), **extra)


SPEC = Spec(
    module=DynamicBiasAttention,
    config=Config,
    paper='2108.00154',
    ops=('softmax_attention', 'weighted_attention'),
    state='kv',
    example=Config(num_heads=4, num_kv_heads=2, hidden=6),
    flops=attention.flops,
)
