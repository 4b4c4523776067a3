"""Talking-heads attention: learned mixtures of heads before and after the softmax.

Equation: J_k = scale q_k . k_k for Nk heads of queries and keys;  L_n = score(sum_k P_kn J_k), W_n = softmax(L_n) for N heads;
    U_v = sum_n P'_nv W_n, o_v = U_v v_v for Nv heads of values;  y = W_o [o_1 …].
Paper: Talking-heads attention, 2020, arXiv 2003.02436.
Differs: scale H^-1/2 rather than in the initial variance of W_q; P and P' begin as the identity where they are square, so
    that the first step is multi-head attention, as ports do. Masks and scores come after P. No dynamic projections.
Cost: train O(T²) time in plain XLA, some query rows at a time: O(T) memory, logits of all heads of those rows live; no
    fused kernel can hold them. Decode keeps (Nk H + Nv H) numbers a token.
"""

import dataclasses

import jax.numpy as jnp

from attnx.nn import Linear, merge_heads, normal, param, softmax, split_heads
from attnx.ops import normalizers
from attnx.ops.weighted_attention import by_rows, evaluate, index_of, num_rows, products, read, thinned
from attnx.sharding import constrain
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(softmax.Options):
    num_heads: int = 4  # N: heads of the softmax
    key_heads: int = 0  # Nk: heads of queries and keys; 0: num_heads
    value_heads: int = 0  # Nv: heads of values; 0: num_heads
    head_dim: int = 0  # H; 0: width / num_heads

    def __post_init__(self):
        super().__post_init__()
        if min(self.key_heads, self.value_heads) < 0:
            raise ValueError(f'key_heads {self.key_heads} and value_heads {self.value_heads} must not be negative')


def talking_heads(
    query, key, value, before, after, *, mask, score, scale, weights=normalizers.softmax, dropout=None, rows=None
):
    """The op: query [B, T, Nk, H], key [B, S, Nk, H], value [B, S, Nv, Hv], before [Nk, N], after [N, Nv].

    weights: a normalizer; dropout: of its weights; rows: how many to take at once, chosen by default.

    Returns:
      [B, T, Nv, Hv]
    """
    (batch, length, key_heads, _), size, (num_heads, value_heads) = query.shape, key.shape[1], after.shape
    # Keys whole on every device: XLA's partitioner gives `after` a wrong gradient where queries and keys are both cut.
    key, value = (constrain(x, ('batch', None, 'kv_heads', 'head_dim')) for x in (key, value))

    def step(carry, first, query):
        i = index_of(batch, query.shape[1], length, size, num_heads, first)
        s = jnp.einsum('bkts,kn->bnts', products(query, key, scale), before.astype(jnp.float32))
        w = thinned(weights(evaluate(score, i, s), evaluate(mask, i), i), i, dropout)
        return carry, read(jnp.einsum('bnts,nv->bvts', w, after.astype(jnp.float32)), value)

    rows = rows or num_rows(batch * max(key_heads, num_heads, value_heads) * size, length)
    return by_rows(step, (), query, rows)[1]


class TalkingHeadsAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype, n = config, dims.dtype, config.num_heads
        self.head_dim = h = softmax.heads_of(n, config.head_dim, dims.width)
        self.key_heads, self.value_heads = config.key_heads or n, config.value_heads or n
        into = lambda count, axis: Linear(dims.width, count * h, ('embed', axis), dims, rngs=rngs)
        self.query, self.key = into(self.key_heads, 'heads'), into(self.key_heads, 'kv_heads')
        self.value = into(self.value_heads, 'kv_heads')

        def mix(a, b):
            start = jnp.eye(a, dtype=dims.param_dtype) if a == b else normal(rngs, (a, b), a**-0.5, dims.param_dtype)
            return param(start, (None, None))

        self.before, self.after = mix(self.key_heads, n), mix(n, self.value_heads)
        scale = (2 * dims.num_layers) ** -0.5
        self.out = Linear(self.value_heads * h, dims.width, ('heads', 'embed'), dims, rngs=rngs, scale=scale)
        self.core = softmax.Core(config, dims, n, h, rngs=rngs)

    def init_state(self, batch, capacity, dtype=None):
        shapes = (self.key_heads, self.head_dim), (self.value_heads, self.head_dim)
        return self.core.init_state(batch, capacity, shapes, dtype or self.dtype)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query, key = (split_heads(f(x), self.key_heads) for f in (self.query, self.key))
        query, keys, state = self.core.extend(query, key, (split_heads(self.value(x), self.value_heads),), ctx, state)
        key, value = (a.astype(query.dtype) for a in keys.arrays)
        out = talking_heads(
            query, key, value, self.before[...], self.after[...],
            mask=self.core.mask(keys), score=self.core.score(keys), scale=self.config.scale or self.head_dim**-0.5,
            weights=self.core.weights(), dropout=self.core.dropout(ctx),
        )  # fmt: skip
        return Output(self.out(merge_heads(out)), state)


def _flops(config, dims, length):
    h, n = config.head_dim or dims.width // config.num_heads, config.num_heads
    k, v = config.key_heads or n, config.value_heads or n
    # a head's products of width H for scores and for values, and two mixtures a pair
    return softmax.flops(1, k * h + n * (k + v), dims, length, value_dim=v * h)


SPEC = Spec(
    module=TalkingHeadsAttention,
    config=Config,
    paper='2003.02436',
    state='kv',
    example=Config(num_heads=4, key_heads=2, value_heads=6, head_dim=8),
    flops=_flops,
)
