"""CoulGAT: graph attention whose nodes first average their neighbours by a screened Coulomb function of distance.

Equation: per head, z_l = W h_l + b_l;  m_j = sum_l softmax_l(A_jl) z_l;  h'_i = relu(sum_j softmax_j(e_ij) z_j).
    Of N slots: A_jl = (1 / r_jl²)^P_jl, learned P [N, N], b [N, F] and a [N, F] of each slot, e_ij = lrelu(a_i . m_j).
    Of any size: A_jl = exp(-kappa r_jl) / r_jl^P, learned kappa >= 0 and P, one b and vectors a, a', e_ij = lrelu(a . m_j +
    a' . m_i). Leaky slope 0.2; heads are concatenated.
Paper: CoulGAT: an experiment on interpretability of graph attention networks, 2019, arXiv 1912.08409.
Differs: the form of any size is ours; without its a' every node of a graph would get the same. Base A lies in [1e-5, 1e3],
    1e3 between a node and itself with slots, 1 without. A document is a graph, a token's slot its place in it.
Cost: O(T²) time and memory in plain XLA, quadratic as the distances that it is given; it needs the whole graph and can not
    decode.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from attnx.nn import Linear, merge_heads, normal, param, softmax, split_heads
from attnx.nn.grid import place
from attnx.ops import normalizers
from attnx.spec import Context, Dims, Mixer, Output, Spec

LEAST, MOST = 1e-5, 1e3  # of A before its power


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_heads: int = 4  # heads, concatenated
    slots: int = 0  # N: nodes of the largest graph, each with parameters of its own, as in the paper; 0: graphs of any size

    def __post_init__(self):
        if self.slots < 0:
            raise ValueError(f'slots {self.slots} is negative')


class CoulombAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype, n = config, dims.dtype, config.num_heads
        f = softmax.heads_of(n, 0, dims.width)
        self.project = Linear(dims.width, dims.width, ('embed', 'heads'), dims, rngs=rngs)
        draw = lambda shape, scale, axes: param(normal(rngs, shape, scale, dims.param_dtype), axes)
        slots = max(config.slots, 1)
        self.bias = param(jnp.zeros((slots, n, f), dims.param_dtype), (None, 'heads', 'head_dim'))
        self.target = draw((slots, n, f), f**-0.5, (None, 'heads', 'head_dim'))
        if config.slots:
            self.power = draw((n, slots, slots), slots**-0.5, ('heads', None, None))
            self.own = self.screening = None
        else:
            self.power = param(jnp.ones((n,), dims.param_dtype), ('heads',))
            self.screening = param(jnp.full((n,), math.log(math.expm1(0.1)), dims.param_dtype), ('heads',))
            self.own = draw((n, f), f**-0.5, ('heads', 'head_dim'))

    def weigh(self, distance, where):
        """A, float32 [B, N, T, T], of distances [B, T, T] and slots [B, T]."""
        far = jnp.log(jnp.maximum(distance.astype(jnp.float32), 1e-6))[:, None]
        own = jnp.eye(distance.shape[1], dtype=bool)
        power = self.power[...].astype(jnp.float32)
        if self.config.slots:
            base = jnp.where(own, math.log(MOST), jnp.clip(-2 * far, math.log(LEAST), math.log(MOST)))
            power = jnp.moveaxis(power[:, where[:, :, None], where[:, None]], 0, 1)
            return jnp.exp(power * base)
        heads = lambda p: p[None, :, None, None]
        screen = heads(jax.nn.softplus(self.screening[...].astype(jnp.float32)))
        fall = -screen * distance.astype(jnp.float32)[:, None] - heads(power) * far
        return jnp.where(own, 1.0, jnp.exp(jnp.clip(fall, math.log(LEAST), math.log(MOST))))

    def __call__(self, x, ctx: Context, state=None) -> Output:
        batch, length, _ = x.shape
        distance, ids = ctx.side('distances'), ctx.segment_ids
        if distance.shape != (batch, length, length):
            raise ValueError(f"the side input 'distances' must be {[batch, length, length]}, was given {list(distance.shape)}")
        ids = jnp.ones((batch, length), jnp.int32) if ids is None else jnp.broadcast_to(ids, (batch, length))
        where = place(ids)[1] if self.config.slots else jnp.zeros((batch, length), jnp.int32)
        seen = ((ids[:, :, None] == ids[:, None]) & (ids > 0)[:, :, None])[:, None]
        node = lambda p: p[...].astype(jnp.float32)[where]  # [B, T, N, F]
        z = split_heads(self.project(x), self.config.num_heads).astype(jnp.float32) + node(self.bias)
        near = normalizers.softmax(self.weigh(distance, where), seen)
        mean = jnp.einsum('bnjl,blnf->bjnf', near, z)
        logit = jnp.einsum('binf,bjnf->bnij', node(self.target), mean)
        if self.own is not None:
            logit = logit + jnp.einsum('nf,binf->bni', self.own[...].astype(jnp.float32), mean)[..., None]
        w = normalizers.softmax(jax.nn.leaky_relu(logit, 0.2), seen)
        y = merge_heads(jax.nn.relu(jnp.einsum('bnij,bjnf->binf', w, z))).astype(self.dtype)
        over = (where >= self.config.slots)[:, :, None] if self.config.slots else False
        return Output(jnp.where(over, jnp.nan, y))


SPEC = Spec(
    module=CoulombAttention,
    config=Config,
    paper='1912.08409',
    causal='bidirectional',
    inputs={'distances': 'float32 B T T'},
    limits={
        'decode': 'attends to the whole graph at once',
        'state': 'attends to the whole graph at once',
    },
    example=(Config(), Config(num_heads=2, slots=24)),
    flops=lambda config, dims, length: 6 * dims.width * length,
)
