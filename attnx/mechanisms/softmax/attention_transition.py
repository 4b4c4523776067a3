"""Attention transition: in a prompt's pass, some rows' weights are moved on to the tokens that an earlier layer dealt with.

Equation: grouped-query attention; then in a pass of several tokens with a state, layer l of L, prompt of n tokens, edited rows:
    inner, l <= L - 2: c = ceil((n - b - t - 3) / (L + 3)), rows s … min(s + c, n - t) - 1 with s = (l + 3) c + b + 3, whose
    targets are as many columns, from 3 lengths of that before s on; threshold inner / (s - b);
    outer, 1 <= l <= L - 2: the last t rows; targets (l + 2) c' + 3 … of length c' = ceil((n - t - 3) / (L + 3));
    threshold outer / (n - t).
    A row with a target above the threshold loses all weights below it, and strength times their sum goes to its targets, in
    parts of 100 to those at or above the threshold and 5 to the others.
Paper: Empower your model with longer and better context comprehension, 2023, arXiv 2307.13365.
Differs: built from the released code, whose match with the paper is of the abstract only. Each row of the batch and each
    document is edited by its own length, where the code edits the first row alone. Training and single tokens are untouched.
Cost: train as grouped-query attention, by the fused op; a prompt's pass O(T²) time, masked pairs too, some rows at a time
    (`weighted_attention`, XLA); decode keeps and reads 2 K H numbers a token.
"""

import dataclasses

import jax.numpy as jnp

from attnx import ops
from attnx.nn import attention, merge_heads, softmax
from attnx.nn.state import starts
from attnx.ops.chunks import at_the_end
from attnx.spec import Context, Dims, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(attention.Options):
    begin: int = 5  # b: first tokens of a prompt, which are left alone; 5 to 100
    tail: int = 50  # t: last tokens of a prompt, which read the outer targets; 50 to 200
    inner: float = 0.5  # of the inner threshold
    outer: float = 0.4  # of the outer threshold
    strength: float = 4.0  # what is lost comes back so many times
    renormalize: bool = False  # divide edited rows by their sum (ours)

    def __post_init__(self):
        super().__post_init__()
        softmax.refuse(self, 'a transition edits weights of a plain softmax', 'sinks', 'off_by_one')
        if min(self.begin, self.tail, self.inner, self.outer, self.strength) < 0:
            raise ValueError('begin, tail, inner, outer and strength must not be negative')


def edit(weights, seen, rows, columns, size, layer, num_layers: int, config: Config):
    """The edited weights [B, N, t, S].

    Args:
      seen: bool [B, 1, t, S].
      rows: int [B, t], places of queries in their documents; columns: int [B, S], those of keys.
      size: int [B, t], the lengths of the queries' documents.
    """
    b, t = config.begin, config.tail
    p, n = rows[:, None, :, None], size[:, None, :, None]
    c = -(-(n - b - t - 3) // (num_layers + 3))
    start = (layer + 3) * c + b + 3
    end = jnp.minimum(start + c, n - t)
    inner = (n > b + t + 3) & (p >= start) & (p < end) & (layer <= num_layers - 2)
    wide = -(-(n - t - 3) // (num_layers + 3))
    outer = (n > t + 3) & (p >= n - t) & (layer >= 1) & (layer <= num_layers - 2)
    low = jnp.where(inner, start - 3 * (end - start), (layer + 2) * wide + 3)
    high = jnp.where(inner, start - 2 * (end - start), low + wide)
    share = jnp.where(inner, config.inner / jnp.maximum(start - b, 1), config.outer / jnp.maximum(n - t, 1))
    at = columns[:, None, None]
    target = seen & (at >= low) & (at < high) & (inner | outer)
    active = jnp.any(target & (weights > share), axis=-1, keepdims=True)
    kept = jnp.where(weights < share, 0, weights)
    part = jnp.where(target, jnp.where(kept >= share, 100.0, 5.0), 0.0)
    lost = 1 - kept.sum(-1, keepdims=True)
    moved = kept + config.strength * lost * part / jnp.maximum(part.sum(-1, keepdims=True), 1.0)
    moved = moved / moved.sum(-1, keepdims=True) if config.renormalize else moved
    return jnp.where(active, moved, weights)


class AttentionTransition(attention.Attention):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        super().__init__(config, dims, rngs=rngs)
        self.num_layers = dims.num_layers

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query, key, value = self.project(x)
        query, keys, new = self.core.extend(query, key, (value,), ctx, state)
        options = {}
        if state is not None and x.shape[1] > 1:
            columns = jnp.arange(keys.length) - starts(keys.key_ids)
            rows, size = keys.of_queries(columns), keys.of_queries(at_the_end(columns, keys.key_ids) + 1)

            def weights(s, seen, i):
                w, here = ops.normalizers.softmax(s, seen), jnp.minimum(i.q[0, 0, :, 0], i.q_len - 1)
                at = rows[:, here], columns, size[:, here]
                return edit(w, seen, *at, ctx.layer, self.num_layers, self.config)

            options['weights'] = weights
        out = self.core.attend(query, *keys.arrays, ctx, self.core.mask(keys), self.core.score(keys), **options)
        return Output(self.out(merge_heads(out)), new)


SPEC = Spec(
    module=AttentionTransition,
    config=Config,
    paper='2307.13365',
    ops=('softmax_attention', 'weighted_attention'),
    state='kv',
    causal='causal',
    limits={'decode': 'a prompt of several tokens is edited, single tokens are not: that is the mechanism'},
    example=Config(num_heads=4, num_kv_heads=2, begin=1, tail=4),
    flops=attention.flops,
)
