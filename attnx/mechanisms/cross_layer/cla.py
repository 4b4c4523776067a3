"""Cross-layer attention: a layer makes keys and values, later layers read them with queries of their own.

Equation: o_t = sum_s softmax_s(scale q_t . k_s) v_s as in grouped-query attention; k, v = W_k x, W_v x in a layer with
    `source` = 'own', those of the nearest such layer before it in one with 'shared', which has W_q and W_o alone.
Paper: Reducing transformer key-value cache size with cross-layer attention (KV sharing), 2024, arXiv 2405.12981;
    You only cache once (YOCO), 2024, arXiv 2405.05254.
Differs: keys are shared rotated, which is the same as rotating in each layer. YOCO's second half, whose layers all read
    one pair of keys and values made from RMSNorm(x): the norm is the block's, its scale folded into W_k and W_v; in the
    layer that makes them, queries of all tokens are computed, also for a prompt, whose later layers see its last token alone.
Cost: train O(T²) time, O(T) memory, through the fused op; decode keeps 2 K H numbers a token in a layer with its own keys,
    none in one that reads.
"""

import dataclasses

import jax.numpy as jnp

from attnx.nn import attention, merge_heads, positions, softmax, split_heads
from attnx.spec import Context, Dims, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    num_kv_heads: int = 2  # K key/value heads; divides num_heads; those of a 'shared' layer are its source's
    source: str = 'own'  # own: makes keys and values and publishes them; shared: reads those published last
    name: str = 'kv'  # what they are published as, to tell groups of layers apart

    def __post_init__(self):
        super().__post_init__()
        softmax.check_choice('source', self.source, ('own', 'shared'))


class CrossLayerAttention(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        self.own = config.source == 'own'
        if not self.own:
            self.key = self.value = self.core.key_norm = None

    def init_state(self, batch, capacity, dtype=None):
        return super().init_state(batch, capacity, dtype) if self.own else ()

    def __call__(self, x, ctx: Context, state=None) -> Output:
        shared = {}
        if self.own:
            query, key, value = self.project(x)
            query, keys, state = self.core.extend(query, key, (value,), ctx, state)
            shared = {self.config.name: keys}
        else:
            query = split_heads(self.query(x), self.config.num_heads)
            keys = ctx.published(self.config.name)
            self.check(keys)
            keys = keys.of_last(x.shape[1])
            query = query if self.core.query_norm is None else self.core.query_norm(query)
            start = 0 if keys.query_slots is None else keys.query_slots[0, 0]
            query = self.core.rotate(query, positions(ctx, x.shape[1], start))
        return Output(self.out(merge_heads(self.attend(query, keys, ctx))), state, shared=shared)

    def check(self, keys):
        found = [a.shape[2:] for a in keys.arrays] if hasattr(keys, 'arrays') else jnp.shape(keys)
        if found != [(self.num_kv_heads, self.head_dim)] * 2:
            raise ValueError(
                f'cla reads keys and values of {self.num_kv_heads} heads of width {self.head_dim} as '
                f'{self.config.name!r}; the layer before it publishes {found}'
            )


SPEC = Spec(
    module=CrossLayerAttention,
    config=Config,
    paper='2405.12981',
    ops=('softmax_attention',),
    state='kv',
    example=(Config(), Config(source='shared')),
    publishes=lambda config: (config.name,) if config.source == 'own' else (),
    reads=lambda config: (config.name,) if config.source == 'shared' else (),
    variants={'head_dim': {'head_dim': 4}},  # a layer alone may not have another width than its source
    flops=attention.flops,
)
