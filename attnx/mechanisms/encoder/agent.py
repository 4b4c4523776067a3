"""Agent attention: a few pooled queries, the agents, read the sequence, and every token reads the agents.

Equation: A = pool(Q) in n places;  V_A = softmax(H^-1/2 A K^T + B1) V;  O = softmax(H^-1/2 Q A^T + B2) V_A + DWConv(V);
    y = W_o O. Pooling is the adaptive average over n stretches of a document, or sqrt(n) x sqrt(n) patches of a grid.
    B1[a, s] and B2[s, a] are learned tables, coarse over the document plus fine along each of its dimensions, stretched
    to its size.
Paper: Agent attention: on the integration of softmax and linear attention, 2023, arXiv 2312.08874.
Differs: sequences (`grid` = 0) beside images; no class token; biases are interpolated to any size, fine ones too. A row
    may hold `documents` packed documents, each with its own agents; the output of further ones is NaN: they have none.
Cost: train O(T n) time and memory a document slot, through the fused op; it needs the whole sequence and can not decode.
"""

import dataclasses
import math

import jax.numpy as jnp

from attnx import ops
from attnx.nn import Linear, merge_heads, normal, param, softmax, split_heads
from attnx.nn.grid import neighbours, place
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_heads: int = 4  # N
    num_agents: int = 49  # n agents a document; a square number on a grid
    grid: int = 0  # tokens in a row of a 2-D grid, laid out row by row; 0: a sequence
    coarse: int = 7  # entries of the coarse bias tables, along each dimension
    fine: int = 14  # entries of the fine bias tables, along one dimension
    conv: int = 3  # taps of the depthwise convolution of values, along each dimension; odd; 0: none
    documents: int = 1  # most documents packed into a row
    bias: bool = False  # biases of the projections to queries, keys and values

    def __post_init__(self):
        if min(self.num_agents, self.coarse, self.fine, self.documents) < 1 or self.grid < 0:
            raise ValueError('num_agents, coarse, fine and documents must be at least 1, grid at least 0')
        if self.grid and math.isqrt(self.num_agents) ** 2 != self.num_agents:
            raise ValueError(f'num_agents {self.num_agents} is no square number: on a grid agents stand in a square')
        if self.conv < 0 or (self.conv and self.conv % 2 == 0):
            raise ValueError(f'conv {self.conv} must be odd, or 0 for none')


def _bins(where, size, count: int):
    """Adaptive pooling, bool [B, T, count]: is `where` in bin [floor(j size / count), ceil((j + 1) size / count))."""
    j, where, size = jnp.arange(count), where[:, :, None], size[:, :, None]
    return (j * size // count <= where) & (where < -(-(j + 1) * size // count))


def _interpolation(where, size, count: int):
    """float32 [B, T, count]: weights that read a table of `count` entries, stretched over `size`, at `where`."""
    at = jnp.clip((where + 0.5) / jnp.maximum(size, 1) * count - 0.5, 0, count - 1)
    return jnp.maximum(1 - jnp.abs(at[:, :, None] - jnp.arange(count)), 0)


class AgentAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config = config
        n, width = config.num_heads, dims.width
        softmax.heads_of(n, 0, width)
        into = lambda: Linear(width, width, ('embed', 'heads'), dims, rngs=rngs, bias=config.bias)
        self.query, self.key, self.value = into(), into(), into()
        scale = (2 * dims.num_layers) ** -0.5
        self.out = Linear(width, width, ('heads', 'embed'), dims, rngs=rngs, bias=True, scale=scale)
        sizes = [(config.coarse,) * (2 if config.grid else 1), *[(config.fine,)] * (2 if config.grid else 1)]

        def tables(name):
            for number, size in enumerate(sizes):
                shape = (n, config.num_agents, *size)
                axes = ('heads', *[None] * (len(shape) - 1))
                setattr(self, f'{name}_{number}', param(normal(rngs, shape, 0.02, dims.param_dtype), axes))

        tables('read')  # agents read tokens: B1
        tables('tell')  # tokens read agents: B2
        if config.conv:
            taps = config.conv ** (2 if config.grid else 1)
            self.conv_kernel = param(normal(rngs, (taps, width), taps**-0.5, dims.param_dtype), ('conv', 'heads'))
            self.conv_bias = param(jnp.zeros((width,), dims.param_dtype), ('heads',))
        else:
            self.conv_kernel = self.conv_bias = None

    def __call__(self, x, ctx: Context, state=None) -> Output:
        config = self.config
        ids = jnp.ones((1, x.shape[1]), jnp.int32) if ctx.segment_ids is None else ctx.segment_ids
        first = jnp.diff(ids, axis=1, prepend=0) != 0
        number = jnp.cumsum(first & (ids > 0), axis=1) * (ids > 0)  # documents of the row: 1, 2, …; 0 = padding
        slots = jnp.arange(1, config.documents + 1)
        member = number[:, :, None] == slots  # [B, T, documents]
        size = jnp.einsum('btd,bsd->bt', member.astype(jnp.int32), member.astype(jnp.int32))
        row, column = place(ids, config.grid)
        rows, columns = (-(-size // config.grid), jnp.full_like(size, config.grid)) if config.grid else (size, size)
        if config.grid:
            side = math.isqrt(config.num_agents)
            bins = _bins(row, rows, side)[:, :, :, None] & _bins(column, columns, side)[:, :, None]
        else:
            bins = _bins(column, columns, config.num_agents)
        bins = bins.reshape(*bins.shape[:2], 1, config.num_agents) & member[..., None]
        bins = bins.reshape(*bins.shape[:2], -1).astype(jnp.float32)  # [B, T, documents * agents]
        count = bins.sum(axis=1)
        agent_ids = jnp.where(count > 0, jnp.repeat(slots, config.num_agents), 0)

        query, key, value = self.query(x), self.key(x), self.value(x)
        pool = bins / jnp.maximum(count, 1)[:, None]
        pool = jnp.broadcast_to(pool, (x.shape[0], *pool.shape[1:]))
        agents = jnp.einsum('bta,btm->bam', pool, query.astype(jnp.float32)).astype(query.dtype)
        heads = lambda a: split_heads(a, config.num_heads)
        whole = lambda a: jnp.broadcast_to(a, (x.shape[0], *a.shape[1:]))
        number, agent_ids = whole(number), whole(agent_ids)

        def attend(q, k, v, query_ids, key_ids, bias):
            mask = ops.masks.segments(query_ids, key_ids)
            return ops.softmax_attention(q, k, v, mask=mask, bias=bias, impl=ctx.impl)

        read, tell = self.biases(row, column, rows, columns)
        gathered = attend(heads(agents), heads(key), heads(value), agent_ids, number, read)
        out = attend(heads(query), heads(agents), gathered, number, agent_ids, jnp.swapaxes(tell, 2, 3))
        out = merge_heads(out)
        if self.conv_kernel is not None:
            reach, kernel = config.conv // 2, self.conv_kernel[...].astype(value.dtype)
            around = neighbours(value, whole(ids), reach, reach, config.grid)
            out = out + sum(k * v for k, (v, _) in zip(kernel, around)) + self.conv_bias[...].astype(value.dtype)
        y = self.out(out)
        return Output(jnp.where((number > config.documents)[:, :, None], jnp.nan, y))

    def biases(self, row, column, rows, columns):
        """B1 and B2 as [B or 1, N, documents * agents, T]."""
        config = self.config
        coarse, fine = (
            [_interpolation(*at, count) for at in ((row, rows), (column, columns))][0 if config.grid else 1 :]
            for count in (config.coarse, config.fine)
        )
        found = []
        for name in ('read', 'tell'):
            tables = [getattr(self, f'{name}_{i}')[...].astype(jnp.float32) for i in range(1 + len(fine))]
            equation = 'hnyx,bty,btx->bhnt' if config.grid else 'hnx,btx->bhnt'
            bias = jnp.einsum(equation, tables[0], *coarse)
            for table, weights in zip(tables[1:], fine):
                bias = bias + jnp.einsum('hnx,btx->bhnt', table, weights)
            found.append(jnp.tile(bias, (1, 1, config.documents, 1)))
        return found


SPEC = Spec(
    module=AgentAttention,
    config=Config,
    paper='2312.08874',
    ops=('softmax_attention',),
    causal='bidirectional',
    limits={
        'decode': 'agents are pooled from the whole sequence',
        'state': 'agents are pooled from the whole sequence',
    },
    example=Config(num_heads=4, num_agents=4, coarse=3, fine=5, documents=2),
    documents=lambda config: config.documents,
    flops=lambda config, dims, length: 8 * dims.width * config.num_agents * config.documents,
)
