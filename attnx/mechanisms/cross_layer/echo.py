"""EchoAtt: later layers of a block reuse the attention weights of its first layer, with values and outputs of their own.

Equation: o_t = sum_s w_ts v_s, w = softmax(scale q k^T) of the nearest earlier layer with `source` = 'own'; a layer with
    'shared' has W_v and W_o alone.
Paper: EchoAtt: attend, copy, then adjust for more efficient large language models, 2024, arXiv 2409.14595.
Differs: what is shared are queries, keys, masks and scores, from which the fused op makes the same weights again, so that
    no [T, S] array exists: W_q and W_k are saved, the products of scores are not. Dropout is each layer's own. Which layers
    copy is the pattern's choice (`('own', 'copy')` are blocks of two); the paper finds them by
    similarity, which `attnx.interop.prune.map_similarity` measures.
Cost: train O(T²) time, O(T) memory, through the fused op; decode keeps 2 K H numbers a token in a layer that computes, K H
    in one that copies.
"""

import dataclasses
from typing import Any, NamedTuple

import jax

from attnx.nn import attend_to, attention, merge_heads, softmax, split_heads
from attnx.spec import Context, Dims, Output, Spec

_OWN = ('dropout', 'scale')  # options of a copying layer; the others are its source's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    num_heads: int = 4  # N query heads; of a copying layer those of its source
    num_kv_heads: int = 2  # K key/value heads; divides num_heads
    source: str = 'own'  # own: computes weights and publishes them; shared: copies those published last
    name: str = 'attention'  # what they are published as, to tell blocks of layers apart

    def __post_init__(self):
        super().__post_init__()
        softmax.check_choice('source', self.source, ('own', 'shared'))
        fields = [f for f in dataclasses.fields(softmax.Options) if f.name not in _OWN]
        changed = [f.name for f in fields if getattr(self, f.name) != f.default]
        if self.source == 'shared' and changed:
            raise ValueError(f"{', '.join(changed)}: a layer that copies weights takes them from its source; set them there")


class Weights(NamedTuple):
    """What attention weights are made of."""

    query: jax.Array  # [B, T, N, H]
    key: jax.Array  # [B, S, K, H]
    mask: Any
    score: Any
    sinks: jax.Array | None  # float32 [N]


class EchoAttention(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        self.own = config.source == 'own'
        if not self.own:
            self.query = self.key = None

    def init_state(self, batch, capacity, dtype=None):
        shapes = ((self.num_kv_heads, self.head_dim),) * (2 if self.own else 1)
        return self.core.init_state(batch, capacity, shapes, dtype or self.dtype)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        name = self.config.name
        if self.own:
            query, key, value = self.project(x)
            query, keys, state = self.core.extend(query, key, (value,), ctx, state)
            key, value = keys.arrays
            made = Weights(query, key, self.core.mask(keys), self.core.score(keys), self.core.sinks())
        else:
            made = ctx.published(name)
            self.check(made)
            state, keys = attend_to(state, ctx, (split_heads(self.value(x), self.num_kv_heads),))
            (value,) = keys.arrays
        out = self.core.attend(made.query, made.key, value, ctx, made.mask, made.score, sinks=made.sinks)
        return Output(self.out(merge_heads(out)), state, shared={name: made} if self.own else {})

    def check(self, made):
        found = (made.query.shape[2], *made.key.shape[2:]) if isinstance(made, Weights) else type(made).__name__
        wanted = (self.config.num_heads, self.num_kv_heads, self.head_dim)
        if found != wanted:
            raise ValueError(
                f'echo copies weights of (num_heads, num_kv_heads, head_dim) {wanted} as {self.config.name!r}; the layer '
                f'before it publishes {found}'
            )


SPEC = Spec(
    module=EchoAttention,
    config=Config,
    paper='2409.14595',
    ops=('softmax_attention',),
    state='kv',
    example=(Config(scores=(('t5', 8),), sinks=True), Config(source='shared')),
    publishes=lambda config: (config.name,) if config.source == 'own' else (),
    reads=lambda config: (config.name,) if config.source == 'shared' else (),
    variants={'head_dim': {'head_dim': 4}},  # a layer alone may not have another width than its source
    flops=attention.flops,
)
