"""Attention-head embeddings: one query, key and value projection, which each head shifts or scales by vectors of its own.

Equation: q_h = W_q x + e^q_h, likewise k_h and v_h (`form` = 'add'); or q_h = W_q x * (1 + e^q_h), … ('mul');
    y = W_o [o_1 … o_N], o_h = softmax(H^-1/2 q_h k_h^T) v_h.
Paper: Pit one against many: leveraging attention-head embeddings for parameter-efficient multi-head attention, 2023,
    arXiv 2310.07911.
Differs: RoPE turns keys that carry their embedding; without a position the key embedding of 'add' cancels in the softmax.
    Embeddings begin as N(0, 1/H) ('add') and N(0, 0.01) ('mul'); equations from the abstract's counts, not the code.
Cost: train O(T²) time, O(T) memory, through the fused op, as multi-head attention; decode keeps 2 H + 1 numbers a token for
    all heads, and makes keys and values of N heads from them at each step.
"""

import dataclasses

import jax.numpy as jnp

from attnx.nn import Cache, Linear, attend_to, attention, merge_heads, normal, param, positions, softmax
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(softmax.Options):
    num_heads: int = 4  # N
    head_dim: int = 0  # H, also the width of the shared projections; 0: width / num_heads
    form: str = 'mul'  # add: x W + e; mul: x W (1 + e)

    def __post_init__(self):
        super().__post_init__()
        softmax.check_choice('form', self.form, ('add', 'mul'))


class HeadEmbeddingAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype = config, dims.dtype
        n, h = config.num_heads, softmax.heads_of(config.num_heads, config.head_dim, dims.width)
        into = lambda: Linear(dims.width, h, ('embed', 'head_dim'), dims, rngs=rngs)
        self.query, self.key, self.value = into(), into(), into()
        scale = h**-0.5 if config.form == 'add' else 0.1
        table = lambda: param(normal(rngs, (n, h), scale, dims.param_dtype), ('heads', 'head_dim'))
        self.query_heads, self.key_heads, self.value_heads = table(), table(), table()
        self.out = Linear(n * h, dims.width, ('heads', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)
        self.core = softmax.Core(config, dims, n, h, rngs=rngs)
        self.head_dim = h

    def init_state(self, batch, capacity, dtype=None):
        dtype = dtype or self.dtype
        return Cache.init(batch, capacity, ((self.head_dim,), (self.head_dim,), ()), (dtype, dtype, jnp.int32))

    def __call__(self, x, ctx: Context, state=None) -> Output:
        where = jnp.broadcast_to(positions(ctx, x.shape[1], 0 if state is None else state.index), x.shape[:2])
        state, keys = attend_to(state, ctx, (self.key(x), self.value(x), where))
        key, value, places = keys.arrays
        norm = lambda f, a: a if f is None else f(a)
        query = self.core.rotate(norm(self.core.query_norm, self.heads(self.query(x), self.query_heads)), where)
        key = self.core.rotate(norm(self.core.key_norm, self.heads(key, self.key_heads)), places)
        value = self.heads(value, self.value_heads)
        out = self.core.attend(query, key, value, ctx, self.core.mask(keys), self.core.score(keys))
        return Output(self.out(merge_heads(out)), state)

    def heads(self, x, table):
        """[B, S, H] -> [B, S, N, H]"""
        x, e = x.astype(self.dtype)[:, :, None], table[...].astype(self.dtype)
        return x + e if self.config.form == 'add' else x * (1 + e)


SPEC = Spec(
    module=HeadEmbeddingAttention,
    config=Config,
    paper='2310.07911',
    ops=('softmax_attention',),
    state='kv',
    example=Config(num_heads=4),
    flops=attention.flops,
)
