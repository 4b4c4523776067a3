"""Label attention: each label is a head with a learned query; what it reads from the sentence is added to every token.

Equation: a_l = softmax_t(M^-1/2 q_l . W_k,l x_t), c_l = sum_t a_lt W_v,l x_t;
    z_tl = LayerNorm((x_t + W_o c_l) W_r), y_t = W_y [z_t1 … z_tL].
Paper: Rethinking self-attention: towards interpretability in neural parsing, 2020, arXiv 1911.03875.
Differs: W_y brings the labels' outputs back to the width of the model, which the paper feeds to its parser as they are
    (`labels` returns them); content and position are one vector; no matrix of queries, no dropout of c. A row may hold
    `documents` packed documents, each with its own c; the output of further ones is NaN: they have none.
Cost: train O(T L) time and O(T) memory, a label at a time, in plain XLA; it needs the whole sequence and can not decode.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx.nn import LayerNorm, Linear, normal, param
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_labels: int = 112  # L: labels, which are the heads
    key_dim: int = 128  # width of queries and keys
    value_dim: int = 128  # width of values
    label_dim: int = 128  # width of a label's output
    documents: int = 1  # most documents packed into a row

    def __post_init__(self):
        if min(self.num_labels, self.key_dim, self.value_dim, self.label_dim, self.documents) < 1:
            raise ValueError('num_labels, key_dim, value_dim, label_dim and documents must be at least 1')


class LabelAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype, width, n = config, dims.dtype, dims.width, config.num_labels
        make = lambda shape, axes, scale: param(normal(rngs, shape, scale, dims.param_dtype), axes)
        self.query = make((n, config.key_dim), ('heads', 'head_dim'), 1.0)
        self.key = make((n, width, config.key_dim), ('heads', 'embed', None), width**-0.5)
        self.value = make((n, width, config.value_dim), ('heads', 'embed', None), width**-0.5)
        self.back = Linear(config.value_dim, width, ('head_dim', 'embed'), dims, rngs=rngs)
        self.reduce = Linear(width, config.label_dim, ('embed', 'head_dim'), dims, rngs=rngs)
        self.norm = LayerNorm(config.label_dim, dims, rngs=rngs, axis='head_dim')
        scale = (2 * dims.num_layers * n * config.label_dim) ** -0.5
        self.out = make((n, config.label_dim, width), ('heads', 'head_dim', 'embed'), scale)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        x = x.astype(self.dtype)
        contexts, number = self.contexts(x, ctx)
        plain = self.reduce(x)

        @jax.checkpoint
        def add(y, label):
            context, out = label
            return y + (self.of_label(plain, context, number) @ out.astype(x.dtype)).astype(jnp.float32), None

        zero = jnp.zeros(x.shape, jnp.float32)
        y = jax.lax.scan(add, zero, (jnp.moveaxis(contexts, 2, 0), self.out[...]))[0].astype(x.dtype)
        y = jnp.where((number >= 0)[:, :, None], y, 0)
        return Output(jnp.where((number >= self.config.documents)[:, :, None], jnp.nan, y))

    def labels(self, x, ctx: Context) -> jax.Array:
        """What each label makes of each token, kept apart: z [B, T, L, label_dim]."""
        contexts, number = self.contexts(x.astype(self.dtype), ctx)
        plain = self.reduce(x)
        return jnp.stack([self.of_label(plain, contexts[:, :, l], number) for l in range(self.config.num_labels)], axis=2)

    def of_label(self, plain, context, number):
        """x W_r [B, T, P] and a label's (W_o c) W_r [B, D, P] -> z [B, T, P]."""
        mine = jnp.take_along_axis(context, jnp.maximum(number, 0)[:, :, None], axis=1, mode='clip')
        return self.norm(plain + mine)

    def contexts(self, x, ctx):
        """((W_o c) W_r of every document and label [B, D, L, P]; the number of each token's document, -1 = padding)."""
        weights, number = self.weights(x, ctx)
        pooled = jnp.einsum('bdlt,btm->bdlm', weights.astype(x.dtype), x)  # before W_v: no value of a label and token
        context = jnp.einsum('bdlm,lmv->bdlv', pooled, self.value[...].astype(x.dtype))
        return self.reduce(self.back(context)), number

    def weights(self, x, ctx):
        """(a of every document [B, D, L, T], float32; the number of each token's document [B, T])."""
        ids = jnp.ones(x.shape[:2], jnp.int32) if ctx.segment_ids is None else ctx.segment_ids
        first = jnp.diff(ids, axis=1, prepend=0) != 0
        number = jnp.where(ids > 0, jnp.cumsum(first & (ids > 0), axis=1) - 1, -1)
        absorbed = jnp.einsum('lmk,lk->lm', self.key[...], self.query[...]).astype(x.dtype)
        logits = jnp.einsum('btm,lm->blt', x, absorbed, preferred_element_type=jnp.float32) * x.shape[-1] ** -0.5
        mine = number[:, None] == jnp.arange(self.config.documents)[:, None]  # [B, D, T]
        logits = jnp.where(mine[:, :, None], logits[:, None], -jnp.inf)
        top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
        weights = jnp.exp(logits - jnp.where(top == -jnp.inf, 0, top))
        return weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30), number


SPEC = Spec(
    module=LabelAttention,
    config=Config,
    paper='1911.03875',
    causal='bidirectional',
    limits={
        'decode': 'labels read the whole sequence',
        'state': 'labels read the whole sequence',
    },
    documents=lambda config: config.documents,
    example=Config(num_labels=4, key_dim=8, value_dim=8, label_dim=8, documents=2),
    flops=lambda config, dims, length: 2 * config.num_labels * (2 * config.documents * dims.width + config.label_dim),
)
