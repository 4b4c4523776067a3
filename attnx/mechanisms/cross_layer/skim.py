"""Skim-attention: where tokens lie on the page decides, once for all layers, who attends to whom.

Equation: l_i = LayerNorm(sum of table entries of token i's box);  w = softmax((W_q l)(W_k l)^T scale) in the layer with
    `source` = 'own', the same w in later layers with 'shared';  o_i = sum_j w_ij W_v x_j in each. In layers with 'mask' the map
    chooses only: softmax attention of their own queries and keys, over the `top_k` keys of largest w_ij.
Paper: Skim-attention: learning to focus via document layout, 2021, arXiv 2109.01078.
Differs: queries and keys are shared instead of weights, so that the fused op makes them again without a [T, T] array; causal
    models are served too. `box` is a side input, int32 [B, T, 4]: x0, y0, x1, y1; width and height have tables of their own.
Cost: train O(T²) time, O(T) memory, through the fused op, but for layers with 'mask', which take some rows at a time (XLA,
    `weighted_attention`); decode keeps 2 N H numbers a token in the layer that owns the map, N H in those that share it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attnx.nn import LayerNorm, Linear, attention, merge_heads, normal, param, softmax, split_heads
from attnx.nn.state import attend_to
from attnx.ops.weighted_attention import products
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(softmax.Options):
    position: str = 'none'  # none: the layout is the position
    num_heads: int = 4  # N
    head_dim: int = 0  # H; 0: width / num_heads
    source: str = 'own'  # own: makes the map and publishes it; shared: uses the last one published; mask: as a choice of keys
    top_k: int = 0  # of mask: keys that a token sees, those alike included
    num_places: int = 1001  # coordinates, widths and heights that boxes may have: 0 to num_places - 1
    layout_width: int = 0  # of the layout embedding; 0: the model's

    def __post_init__(self):
        super().__post_init__()
        softmax.check_choice('source', self.source, ('own', 'shared', 'mask'))
        softmax.refuse(self, 'the layout is the position code', 'position', 'rope')
        if self.source == 'shared':
            softmax.refuse(self, 'a shared map is made in the layer that owns it', 'qk_norm')
        if self.source != 'own':
            softmax.refuse(self, 'a shared map is made in the layer that owns it', 'num_places', 'layout_width')
        if (self.source == 'mask') != (self.top_k > 0) or self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is the number of keys of source 'mask'; source is {self.source!r}")
        if self.num_places < 1 or self.layout_width < 0:
            raise ValueError(f'num_places {self.num_places} must be positive, layout_width {self.layout_width} not negative')


class SkimAttention(Mixer):
    across: Any  # like the next, a table of places; None where the map is shared
    down: Any
    wide: Any
    high: Any

    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype, n, own = config, dims.dtype, config.num_heads, config.source == 'own'
        self.head_dim = softmax.heads_of(n, config.head_dim, dims.width)
        wide = n * self.head_dim
        inner = (config.layout_width or dims.width) if own else dims.width
        self.core = softmax.Core(config, dims, n, self.head_dim, rngs=rngs)
        self.value = Linear(dims.width, wide, ('embed', 'heads'), dims, rngs=rngs)
        self.out = Linear(wide, dims.width, ('heads', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)
        into = lambda: Linear(inner, wide, ('embed', 'heads'), dims, rngs=rngs) if config.source != 'shared' else None
        self.query, self.key = into(), into()
        table = lambda: param(normal(rngs, (config.num_places, inner), 0.02, dims.param_dtype), (None, 'embed'))
        for name in ('across', 'down', 'wide', 'high'):
            setattr(self, name, table() if own else None)
        self.norm = LayerNorm(inner, dims, rngs=rngs) if own else None

    def init_state(self, batch, capacity, dtype=None):
        shape = (self.config.num_heads, self.head_dim)
        return self.core.init_state(batch, capacity, (shape,) * (2 if self.query else 1), dtype or self.dtype)

    def layout(self, box):
        """int32 [B, T, 4] -> [B, T, layout width]."""
        x0, y0, x1, y1 = jnp.moveaxis(box, -1, 0)
        parts = (self.across, x0), (self.across, x1), (self.down, y0), (self.down, y1)
        parts += (self.wide, jnp.abs(x1 - x0)), (self.high, jnp.abs(y1 - y0))
        return self.norm(sum(table[...].astype(self.dtype)[where] for table, where in parts))

    def __call__(self, x, ctx: Context, state=None) -> Output:
        heads = lambda a: split_heads(a, self.config.num_heads)
        value, shared = heads(self.value(x)), {}
        if self.query is not None:
            place = x if self.norm is None else self.layout(ctx.side('box'))
            query, key = heads(self.query(place)), heads(self.key(place))
            if self.core.query_norm is not None:
                query, key = self.core.query_norm(query), self.core.key_norm(key)
            state, keys = attend_to(state, ctx, (key, value))
            key, value = keys.arrays
            shared = {} if self.norm is None else {'skim': (query, key)}
        else:
            query, key = ctx.published('skim')
            state, keys = attend_to(state, ctx, (value,))
            (value,) = keys.arrays
        extra = {}
        if self.config.source == 'mask':
            extra = {'weights': self.choose(*ctx.published('skim')), 'pair_width': 2}
        out = self.core.attend(query, key, value, ctx, self.core.mask(keys), self.core.score(keys), **extra)
        return Output(self.out(merge_heads(out)), state, shared=shared)


    def choose(self, places, where):
        """A normalizer: the softmax over the keys of the largest logits of the map, whose queries and keys are given."""

        def weights(s, seen, i):
            rows = places[:, jnp.minimum(i.q[0, 0, :, 0], places.shape[1] - 1)]
            likeness = jnp.where(seen, products(rows, where), -jnp.inf)
            least = jax.lax.top_k(likeness, min(self.config.top_k, likeness.shape[-1]))[0][..., -1:]
            return self.core.weights()(s, seen & (likeness >= least), i)

        return weights


SPEC = Spec(
    module=SkimAttention,
    config=Config,
    paper='2109.01078',
    ops=('softmax_attention', 'weighted_attention'),
    state='kv',
    inputs={'box': 'int32 B T 4'},
    example=(Config(num_places=5, layout_width=16), Config(source='shared')),
    publishes=lambda config: ('skim',) if config.source == 'own' else (),
    reads=lambda config: ('skim',) if config.source != 'own' else (),
    variants={'top_k': {'source': 'mask', 'top_k': 2}},
    flops=attention.flops,
)
