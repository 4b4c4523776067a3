"""Pattern-injected heads: chosen heads see what people found useful: equal tokens, their sentence, a neighbour.

Equation: o_h = softmax(H^-1/2 q_h k_h^T) v_h over the keys that head h's pattern shows to token i, all of its own document:
    'matching': tokens equal to i, i itself not, or all where there are none;  'sentence': those of i's sentence;
    'next', 'previous': i + 1, i - 1;  other heads see all.
Paper: Human guided exploitation of interpretable attention patterns in summarization and topic segmentation, 2022,
    arXiv 2112.05364.
Differs: neighbours are masked to one key, whose weight is then 1, as the paper's synthesised weights are; at an edge, where
    there is none, the head gives 0 (the released code: the mean). A sentence ends with a token of `separators`. Patterns
    go over the layer's own heads; in a causal model they see past tokens, and 'next' is refused.
Cost: train O(T²) time, O(T) memory through the fused op, one comparison a pair to find tokens without a match; decode keeps
    2 N H numbers and the token's id.
"""

import dataclasses

import jax.numpy as jnp

from attnx import ops
from attnx.dispatch import nearest
from attnx.nn import Cache, Linear, attention, merge_heads, softmax, split_heads
from attnx.spec import Context, Dims, Mixer, Output, Spec

PATTERNS = ('matching', 'sentence', 'next', 'previous')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(softmax.Options):
    num_heads: int = 4  # N
    head_dim: int = 0  # H; 0: width / num_heads
    patterns: tuple = ('matching', 'previous')  # of the first heads: matching, sentence, next, previous; the rest are free
    separators: tuple = (10,)  # ids of tokens that end a sentence; 10 is the newline of bytes
    unmatched: tuple = ()  # ids of tokens that match nothing: stop words, special tokens

    def __post_init__(self):
        super().__post_init__()
        for name in self.patterns:
            if name not in PATTERNS:
                raise ValueError(f'unknown pattern {name!r}; {nearest(name, PATTERNS)}')
        if len(self.patterns) > self.num_heads:
            raise ValueError(f'{len(self.patterns)} patterns for num_heads {self.num_heads}')
        for pattern, field in (('sentence', 'separators'), ('matching', 'unmatched')):
            if pattern not in self.patterns:
                softmax.refuse(self, f'no head has the pattern {pattern!r}', field)


def _shown(i, code, q, k, q_token, k_token, alone, q_sentence, k_sentence):
    matching = alone | ((q_token == k_token) & (q != k))
    return (
        (code < 0)
        | ((code == 0) & matching)
        | ((code == 1) & (q_sentence == k_sentence))
        | ((code == 2) & (k == q + 1))
        | ((code == 3) & (k == q - 1))
    )


def _among(tokens, ids):
    return (tokens[..., None] == jnp.asarray(ids, jnp.int32).reshape(-1)).any(axis=-1)


def guide(config: Config, keys, tokens, causal: bool) -> ops.masks.Mask:
    """The mask of all heads' patterns; tokens int32 [B, S]: ids of the keys."""
    where = jnp.arange(keys.length)[None]
    q, k = (where, where) if keys.query_slots is None else (keys.query_slots, keys.key_slots)
    ends = _among(tokens, config.separators).astype(jnp.int32)
    sentence = jnp.cumsum(ends, axis=1) - ends  # number of the sentence, along the row
    silent = _among(tokens, config.unmatched)
    key_token, query_token = jnp.where(silent, -1, tokens), keys.of_queries(jnp.where(silent, -2, tokens))
    match = (query_token[:, :, None] == key_token[:, None]) & (q[:, :, None] != k[:, None])
    if keys.query_ids is not None:
        match &= keys.query_ids[:, :, None] == keys.key_ids[:, None]
    if causal:
        match &= k[:, None] < q[:, :, None]
    code = [PATTERNS.index(name) for name in config.patterns] + [-1] * (config.num_heads - len(config.patterns))
    batch = lambda a: jnp.broadcast_to(a, (tokens.shape[0], a.shape[1]))
    operands = [(jnp.array(code, jnp.int32), 'h'), (batch(q), 'bq'), (batch(k), 'bk'), (query_token, 'bq'), (key_token, 'bk')]
    operands += [(~match.any(axis=2), 'bq'), (keys.of_queries(sentence), 'bq'), (sentence, 'bk')]
    return ops.masks.Mask(_shown, tuple(ops.masks.Operand(*o) for o in operands))


class GuidedHeads(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        if dims.causal and 'next' in config.patterns:
            raise ValueError("pattern 'next': a causal model has no next token to see; valid: matching, previous, sentence")
        self.config, self.dtype, self.causal = config, dims.dtype, dims.causal
        self.head_dim = softmax.heads_of(config.num_heads, config.head_dim, dims.width)
        wide = config.num_heads * self.head_dim
        into = lambda: Linear(dims.width, wide, ('embed', 'heads'), dims, rngs=rngs)
        self.query, self.key, self.value = into(), into(), into()
        self.out = Linear(wide, dims.width, ('heads', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)
        self.core = softmax.Core(config, dims, config.num_heads, self.head_dim, rngs=rngs)

    def init_state(self, batch, capacity, dtype=None):
        shape, dtype = (self.config.num_heads, self.head_dim), dtype or self.dtype
        return Cache.init(batch, capacity, (shape, shape, ()), (dtype, dtype, jnp.int32))

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query, key, value = (split_heads(f(x), self.config.num_heads) for f in (self.query, self.key, self.value))
        query, keys, state = self.core.extend(query, key, (value, ctx.side('tokens')), ctx, state)
        key, value, tokens = keys.arrays
        mask = guide(self.config, keys, tokens, self.causal)
        rest = self.core.mask(keys)
        mask = mask if rest is None else rest & mask
        out = self.core.attend(query, key, value, ctx, mask, self.core.score(keys))
        return Output(self.out(merge_heads(out)), state)


SPEC = Spec(
    module=GuidedHeads,
    config=Config,
    paper='2112.05364',
    ops=('softmax_attention',),
    state='kv',
    inputs={'tokens': 'int32 B T'},
    example=Config(num_heads=4, patterns=('matching', 'sentence', 'previous'), separators=(0,), unmatched=(3,)),
    variants={
        'patterns': {'patterns': ('sentence', 'matching', 'next')},
        'separators': {'separators': (1,)},
        'unmatched': {'unmatched': (2,)},
    },
    flops=attention.flops,
)
