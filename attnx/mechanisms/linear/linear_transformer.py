"""Linear attention: softmax's exponential becomes a product of feature maps, so that sums over the past are a state.

Equation: o_t = phi(q_t) S_t / (phi(q_t) z_t + eps), S_t = sum phi(k_s)^T v_s, z_t = sum phi(k_s) over s <= t, or over
    all tokens where the model is bidirectional; y = W_o o. Not normalised: y = W_o RMSNorm(phi(q_t) S_t) per head.
Paper: Transformers are RNNs: fast autoregressive transformers with linear attention, 2020, arXiv 2006.16236; maps: t2r
    2103.13076, dpfp 2102.11174, hedgehog 2402.04347, taylor 2402.18668 (the 'approximate' attention of 2510.11602).
Differs: without the denominator, and with a norm instead, it is the form of later work (2210.10340). Hedgehog's map is
    by default the softmax over its features, the stable variant of the paper's exponentials.
Cost: train O(T C + T F) time per channel, O(T) memory, through the fused op, twice that over documents if bidirectional;
    decode keeps N F (Hv + 1) numbers whatever the length.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from attnx import ops
from attnx.dispatch import nearest
from attnx.nn import Linear, Recurrent, RMSNorm, merge_heads, normal, param, split_heads
from attnx.spec import Context, Dims, Mixer, Output, Spec

LEARNED = ('t2r', 'hedgehog', 'product')
SIGNED = ('identity', 'silu', 'product')  # their weights have both signs, so their sum may vanish


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_heads: int = 4  # N
    feature_map: str = 'elu1'  # t2r, hedgehog, product (learned), or a name of attnx.ops.feature_maps.FIXED
    feature_dim: int = 0  # F of learned maps (hedgehog makes 2 F features of it); 0: the head width
    hedgehog_normalize: str = 'joint'  # joint, halves, none: how hedgehog's exponentials are normalised
    normalize: bool = True  # divide by the summed weights; else RMSNorm per head
    eps: float = 1e-6  # added to the denominator

    def __post_init__(self):
        if self.feature_map not in (valid := (*ops.feature_maps.FIXED, *LEARNED)):
            raise ValueError(f'unknown feature_map {self.feature_map!r}; {nearest(self.feature_map, valid)}')
        if self.normalize and self.feature_map in SIGNED:
            raise ValueError(f'feature_map {self.feature_map!r} has weights of both signs: set normalize to False')
        if self.feature_dim < 0:
            raise ValueError(f'feature_dim {self.feature_dim} must not be negative')
        if self.feature_dim and self.feature_map not in LEARNED:
            raise ValueError(f'feature_dim is for the maps {", ".join(LEARNED)}, not for {self.feature_map!r}')
        if self.hedgehog_normalize not in (valid := ('joint', 'halves', 'none')):
            raise ValueError(
                f'unknown hedgehog_normalize {self.hedgehog_normalize!r}; {nearest(self.hedgehog_normalize, valid)}'
            )
        if self.hedgehog_normalize != 'joint' and self.feature_map != 'hedgehog':
            raise ValueError(f'hedgehog_normalize is for the map hedgehog, not for {self.feature_map!r}')

    def num_features(self, head_dim: int) -> int:
        """Features of a head of that width."""
        if self.feature_map in LEARNED:
            return (self.feature_dim or head_dim) * (2 if self.feature_map == 'hedgehog' else 1)
        return ops.feature_maps.width(self.feature_map, head_dim)


class FeatureMap(nnx.Module):
    """phi of heads [B, T, N, H] -> [B, T, N, F], with its own parameters where it is learned."""

    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config = config
        if config.feature_map not in LEARNED:
            return
        n, head_dim = config.num_heads, dims.width // config.num_heads
        width = config.feature_dim or head_dim
        axes = ('heads', 'head_dim', 'features')
        matrix = lambda: normal(rngs, (n, head_dim, width), head_dim**-0.5, dims.param_dtype)
        if config.feature_map == 'hedgehog' and width == head_dim:  # the paper's start
            self.weight = param(jnp.tile(jnp.eye(width, dtype=dims.param_dtype), (n, 1, 1)), axes)
        else:
            self.weight = param(matrix(), axes)
        if config.feature_map == 'product':
            self.other = param(matrix(), axes)
        else:
            self.bias = param(jnp.zeros((n, width), dims.param_dtype), ('heads', 'features'))

    def __call__(self, x):
        name, cast = self.config.feature_map, lambda p: p[...].astype(x.dtype)
        if name == 'hedgehog':
            how = self.config.hedgehog_normalize
            return ops.feature_maps.hedgehog(x, cast(self.weight), cast(self.bias), normalize=how)
        if name == 't2r':
            return ops.feature_maps.t2r(x, cast(self.weight), cast(self.bias))
        if name == 'product':
            return ops.feature_maps.product(x, cast(self.weight), cast(self.other))
        return ops.feature_maps.fixed(name)(x)


def bidirectional(query, key, value, segment_ids=None, impl='auto'):
    """sum_s (q_t . k_s) v_s over all tokens s of t's document: [B, T, N, F] twice, [B, T, N, Hv] -> [B, T, N, Hv].

    Over documents: the sum up to t plus the sum from t on, less t's own term, which is in both.
    """
    if segment_ids is None:
        state = jnp.einsum('bsnf,bsnv->bnfv', key, value, preferred_element_type=value.dtype)
        return jnp.einsum('btnf,bnfv->btnv', query, state, preferred_element_type=value.dtype)
    flip = lambda x: jnp.flip(x, axis=1)
    past, _ = ops.gated_linear(query, key, value, segment_ids=segment_ids, impl=impl)
    future, _ = ops.gated_linear(*map(flip, (query, key, value)), segment_ids=flip(segment_ids), impl=impl)
    own = jnp.einsum('btnf,btnf->btn', query, key, preferred_element_type=value.dtype)
    return past + flip(future) - own[..., None] * value


class LinearTransformer(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.causal = config, dims.causal
        width, n = dims.width, config.num_heads
        if n < 1 or width % n:
            raise ValueError(f'width {width} does not divide into num_heads {n}')
        self.query = Linear(width, width, ('embed', 'heads'), dims, rngs=rngs)
        self.key = Linear(width, width, ('embed', 'heads'), dims, rngs=rngs)
        self.value = Linear(width, width, ('embed', 'heads'), dims, rngs=rngs)
        self.out = Linear(width, width, ('heads', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)
        self.query_map = FeatureMap(config, dims, rngs=rngs)
        self.key_map = FeatureMap(config, dims, rngs=rngs)
        self.norm = None if config.normalize else RMSNorm(width // n, dims, rngs=rngs, axis='head_dim')

    def init_state(self, batch, capacity, dtype=None):
        if not self.causal:
            return None
        n, width = self.config.num_heads, self.out.kernel.shape[-1]
        shape = (batch, n, self.config.num_features(width // n), width // n + self.config.normalize)
        return Recurrent.init(jnp.zeros(shape, jnp.float32))

    def __call__(self, x, ctx: Context, state=None) -> Output:
        if state is not None and not self.causal:
            raise ValueError('a bidirectional LinearTransformer reads the whole sequence at once: it takes no state')
        n = self.config.num_heads
        memory, ids = (None, ctx.segment_ids) if state is None else state.resume(ctx, *x.shape[:2])
        query = self.query_map(split_heads(self.query(x), n))
        key = self.key_map(split_heads(self.key(x), n))
        value = split_heads(self.value(x), n).astype(jnp.float32)
        if self.config.normalize:  # z is the state's last column, that of a value 1
            value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
        if self.causal:
            out, memory = ops.gated_linear(query, key, value, initial_state=memory, segment_ids=ids, impl=ctx.impl)
        else:
            out = bidirectional(query, key, value, ids, ctx.impl)
        out = out[..., :-1] / (out[..., -1:] + self.config.eps) if self.config.normalize else self.norm(out)
        return Output(self.out(merge_heads(out)), None if state is None else state.advance(memory, ids))


def flops(config: Config, dims: Dims, length: int) -> float:
    head_dim = dims.width // config.num_heads
    return 4 * config.num_heads * config.num_features(head_dim) * head_dim


SPEC = Spec(
    module=LinearTransformer,
    config=Config,
    paper='2006.16236',
    ops=('gated_linear',),
    state='matrix',
    causal='both',
    example=Config(num_heads=4, feature_map='hedgehog'),
    flops=flops,
)
