"""Attention with fewer matrices: one for queries and keys, none for values or the output.

Equation: o_t = sum_s softmax_s(scale s(x_t, x_s)) v_s per head;  s = W_q x_t . W_k x_s (separate), W x_t . W x_s (shared),
    x_t . W x_s (merged, W [M, M]), or L^T x_t . L^T x_s with a lower-triangular L [M, M] (cholesky: W = L L^T is positive
    semi-definite); v = W_v x or x; y = W_o o or o.
Paper: Reducing the transformer architecture to a minimum, 2024, arXiv 2410.13732.
Differs: causal models too; `shared` and `separate` take several heads. Its fourth option, a model without MLPs, is
    `model.mlp.kind = 'none'`. merged and cholesky, and values of x itself, are of one head, as in the paper.
Cost: train O(T²) time, O(T) memory, through the fused op; decode keeps 2 N H numbers a token, M twice where they are x.
"""

import dataclasses

import jax.numpy as jnp

from attnx.nn import Linear, merge_heads, normal, param, softmax, split_heads
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(softmax.Options):
    num_heads: int = 1  # N
    similarity: str = 'merged'  # separate, shared (W_k = W_q), merged (one matrix), cholesky (one triangular matrix)
    values: bool = False  # project values; else they are x
    output: bool = False  # project the output; else it is o
    position: str = 'none'  # rope, none

    def __post_init__(self):
        super().__post_init__()
        softmax.check_choice('similarity', self.similarity, ('separate', 'shared', 'merged', 'cholesky'))
        if self.num_heads != 1 and (self.similarity in ('merged', 'cholesky') or not self.values):
            raise ValueError(
                f'num_heads {self.num_heads}: similarity {self.similarity!r} with values={self.values} compares or returns '
                'whole tokens, which is one head'
            )
        if self.similarity in ('shared', 'cholesky') and self.qk_norm:
            raise ValueError(f'qk_norm has scales of queries and of keys; similarity {self.similarity!r} has one for both')


class MinimalAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype, width = config, dims.dtype, dims.width
        self.head_dim = softmax.heads_of(config.num_heads, 0, width)
        matrix = lambda: Linear(width, width, ('embed', 'heads'), dims, rngs=rngs)
        self.query = None if config.similarity == 'cholesky' else matrix()
        self.key = matrix() if config.similarity == 'separate' else None
        if config.similarity == 'cholesky':  # the lower triangle, row by row
            scale = width**-0.5
            self.triangle = param(normal(rngs, (width * (width + 1) // 2,), scale, dims.param_dtype), ('features',))
        self.value = matrix() if config.values else None
        scale = (2 * dims.num_layers) ** -0.5
        self.out = Linear(width, width, ('heads', 'embed'), dims, rngs=rngs, scale=scale) if config.output else None
        self.core = softmax.Core(config, dims, config.num_heads, self.head_dim, rngs=rngs)

    def init_state(self, batch, capacity, dtype=None):
        shape = (self.config.num_heads, self.head_dim)
        return self.core.init_state(batch, capacity, (shape, shape), dtype or self.dtype)

    def compare(self, x):
        """(queries, keys) [B, T, M]."""
        if self.config.similarity == 'cholesky':
            width = x.shape[-1]
            lower = jnp.zeros((width, width), x.dtype).at[jnp.tril_indices(width)].set(self.triangle[...].astype(x.dtype))
            query = x @ lower
        else:
            query = self.query(x)
        return query, {'separate': lambda: self.key(x), 'merged': lambda: x}.get(self.config.similarity, lambda: query)()

    def __call__(self, x, ctx: Context, state=None) -> Output:
        x = x.astype(self.dtype)
        value = x if self.value is None else self.value(x)
        query, key, value = (split_heads(a, self.config.num_heads) for a in (*self.compare(x), value))
        out, state = self.core(query, key, value, ctx, state)
        out = merge_heads(out)
        return Output(out if self.out is None else self.out(out), state)


SPEC = Spec(
    module=MinimalAttention,
    config=Config,
    paper='2410.13732',
    ops=('softmax_attention',),
    state='kv',
    example=(Config(similarity='cholesky'), Config(num_heads=2, similarity='shared', values=True, output=True)),
    flops=lambda config, dims, length: softmax.flops(1, dims.width, dims, length),
)
