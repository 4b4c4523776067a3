"""Decoupled embeddings: one table of token embeddings finds a token's past, another is what is read from it.

Equation: s_tj = a(t) . a(j) / sqrt(A) over earlier tokens j, w = softmax over the top_k largest;  c_t = sum_j w_tj e(j);
    y_t = W_2 relu(W_1 [e(t) * c_t ; c_t ; e(t)]);  a and e look token ids up in tables of widths A and E.
Paper: Long-sequence recommendation models need decoupled embeddings (DARE), 2024, arXiv 2410.02604.
Differs: every token is a target and the tokens before it its history; there is no term of time but for the options'
    `scores`. Search and attention share one exact pass. The layer reads token ids alone, not its input x; an id that the
    tables do not have gives NaN.
Cost: train O(T²) time, masked pairs too, O(T) memory: some rows at a time, with a top-k of each (`weighted_attention`,
    XLA; no fused kernel); decode keeps A + E numbers a token and compares A of them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx import ops
from attnx.nn import Linear, normal, param, softmax
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(softmax.Options):
    vocab_size: int = 256  # rows of both tables; at least the model's
    match_dim: int = 0  # A: width of the embeddings that are compared; 0: half of content_dim
    content_dim: int = 0  # E: width of those that are read; 0: half of the model's
    top_k: int = 32  # earlier tokens that are read
    hidden: int = 0  # hidden width of the MLP; 0: that of the model
    position: str = 'none'  # rope, none

    def __post_init__(self):
        super().__post_init__()
        softmax.refuse(self, 'the top-k softmax has no learned logit in its denominator', 'sinks')
        if min(self.vocab_size, self.top_k) < 1 or min(self.match_dim, self.content_dim, self.hidden) < 0:
            raise ValueError('vocab_size and top_k must be at least 1; match_dim, content_dim and hidden not negative')


class DecoupledEmbeddings(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype, width = config, dims.dtype, dims.width
        self.content = config.content_dim or max(2, width // 2)
        self.match = config.match_dim or max(2, self.content // 4 * 2)
        table = lambda n: param(normal(rngs, (config.vocab_size, n), 1.0, dims.param_dtype), ('vocab', 'features'))
        self.match_table, self.content_table = table(self.match), table(self.content)
        hidden = config.hidden or width
        self.up = Linear(3 * self.content, hidden, (None, 'mlp'), dims, rngs=rngs, bias=True)
        self.down = Linear(hidden, width, ('mlp', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)
        self.core = softmax.Core(config, dims, 1, self.match, rngs=rngs)

    def init_state(self, batch, capacity, dtype=None):
        return self.core.init_state(batch, capacity, ((1, self.match), (1, self.content)), dtype or self.dtype)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        tokens = ctx.side('tokens')
        find = lambda p, dtype: jnp.take(p[...].astype(dtype), tokens, axis=0, mode='fill', fill_value=jnp.nan)[:, :, None]
        # What is chosen should not depend on the dtype of the computation.
        match, content = find(self.match_table, jnp.float32), find(self.content_table, self.dtype)
        query, keys, state = self.core.extend(match, match, (content,), ctx, state)
        others = _others
        if keys.query_slots is not None:
            operands = ops.masks.Operand(keys.query_slots, 'bq'), ops.masks.Operand(keys.key_slots, 'bk')
            others = ops.masks.Mask(_other_slots, operands)
        mask = self.core.mask(keys)
        mask = ops.masks.as_mask(others) if mask is None else mask & others
        normalizer = ops.normalizers.off_by_one if self.config.off_by_one else ops.normalizers.softmax
        weights = ops.normalizers.top_k(self.config.top_k, normalizer)
        read = self.core.attend(query, *keys.arrays, ctx, mask, self.core.score(keys), weights=weights)
        read = read.astype(self.dtype)
        hidden = jax.nn.relu(self.up(jnp.concatenate([content * read, read, content], axis=-1)[:, :, 0]))
        return Output(self.down(hidden), state)


def _others(i):
    return i.k != i.q + (i.k_len - i.q_len)


def _other_slots(i, query, key):
    return query != key


def _flops(config, dims, length):
    content = config.content_dim or max(2, dims.width // 2)
    return 2 * length * ((config.match_dim or max(2, content // 4 * 2)) + content)


SPEC = Spec(
    module=DecoupledEmbeddings,
    config=Config,
    paper='2410.02604',
    ops=('weighted_attention',),
    state='kv',
    causal='causal',
    inputs={'tokens': 'int32 B T'},
    example=Config(vocab_size=8, top_k=5),
    flops=_flops,
)
