"""Attention maps from elsewhere: queries and keys come from token embeddings, noise or a fixed text, values from x.

Equation: o_t = sum_s softmax_s(scale W_q z_t . W_k z_s) W_v x_s, z the normed input of the model's first layer; or what this
    layer's input is where a fixed sequence passes the model (`model.fixed`: noise, a text), the same for all rows; or noise
    N(0, 1) of a position, in all layers the same. So maps do not depend on the input.
Paper: Deconstructing attention: investigating design principles for effective language modeling, 2025, arXiv 2510.11602
    (the variants 'static-embedding'; with source 'fixed' 'random-fixed' and 'text-fixed').
Differs: source 'noise', each layer projecting noise itself, is a cheap form of 'random-fixed' that the paper has not.
    z of embeddings is RMS-normalised, as the first layer's own input is.
Cost: train O(T²) time, O(T) memory, through the fused op; decode reads and keeps 2 K H numbers a token. A fixed sequence
    makes the whole model cost twice as much.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx.nn import attention, merge_heads, positions, rms_normalize, softmax, split_heads
from attnx.spec import Context, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    source: str = 'embedding'  # of queries and keys: embedding; noise; fixed: the sequence of `model.fixed`
    seed: int = 0  # of the noise

    def __post_init__(self):
        super().__post_init__()
        softmax.check_choice('source', self.source, ('embedding', 'noise', 'fixed'))
        if self.source != 'noise':
            softmax.refuse(self, f'source {self.source!r} has no noise', 'seed')


class StaticQueries(attention.Attention):
    def __call__(self, x, ctx: Context, state=None) -> Output:
        if self.config.source == 'embedding':
            z = rms_normalize(ctx.published('embedding')).astype(x.dtype)
        elif self.config.source == 'fixed':
            z = x[ctx.published('fixed')]
        else:
            where = positions(ctx, x.shape[1], 0 if state is None else state.index)
            z = jnp.broadcast_to(noise(self.config.seed, where, self.width), x.shape).astype(x.dtype)
        query, key = split_heads(self.query(z), self.config.num_heads), split_heads(self.key(z), self.num_kv_heads)
        value = split_heads(self.value(x), self.num_kv_heads)
        query, keys, state = self.core.extend(query, key, (value,), ctx, state)
        return Output(self.out(merge_heads(self.attend(query, keys, ctx))), state)


def noise(seed: int, where, width: int):
    """N(0, 1) of each position: int [B, T] -> float32 [B, T, width]."""
    draw = lambda at: jax.random.normal(jax.random.fold_in(jax.random.key(seed), at), (width,))
    return jax.vmap(jax.vmap(draw))(where)


SPEC = Spec(
    module=StaticQueries,
    config=Config,
    paper='2510.11602',
    ops=('softmax_attention',),
    state='kv',
    example=(Config(num_heads=4, num_kv_heads=2), Config(num_heads=2, source='noise')),
    reads=lambda config: (config.source,) if config.source != 'noise' else (),
    flops=attention.flops,
)
