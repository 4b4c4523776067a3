"""Attention whose logits flow: over several steps they follow a differential equation, each step from where the last ended.

Equation: step k = 1 … K, token t, word s: da_s/dr = u_k . ((Q_k x_t + b_k + r p_k) * x_s) + v_k a_s over r in [0, 1], from
    the logits of step k - 1, 0 at first;  c_k = sum_s softmax_s(a) x_s;  m_k = W_k [m_{k-1} ; c_k];  y = W_o m_K.
    The field is affine, so a_s = z_k . x_s with z_k = e^v z_{k-1} + phi1(v) u * (Q x_t + b) + phi2(v) u * p, where
    phi1 = (e^v - 1) / v, phi2 = (e^v - 1 - v) / v²: every step is softmax attention of a query that evolves.
    Transition length: sum over k >= 2 of the Jensen-Shannon divergence of steps k and k - 1, in units of log 2.
Paper: Learning dynamics of attention: human prior for interpretable machine reasoning (DAFT), 2019, arXiv 1905.11666.
Differs: the paper's question vector is each token itself, its words are the tokens that it sees, and the write of the MAC
    cell follows at once, without the read of an image. Heads, and the logits' constant b, which the softmax cancels and
    is left out, are ours; RK4 with fixed steps stands for the paper's adaptive solver.
Cost: train K softmax attentions, O(T²) time, O(T) memory, one call of the fused op; decode keeps 2 M numbers a token. The
    transition length, if reported, takes as long again (XLA, some rows at a time).
"""

import dataclasses

import jax.numpy as jnp

from attnx import ops
from attnx.nn import Linear, merge_heads, normal, param, softmax, split_heads
from attnx.ops.weighted_attention import by_rows, evaluate, index_of, num_rows, products
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(softmax.Options):
    num_heads: int = 1  # N
    steps: int = 4  # K: reasoning steps
    solver: str = 'exact'  # of the equation: exact, rk4
    solver_steps: int = 4  # of rk4, in each reasoning step
    report: bool = False  # the mean transition length, as aux 'transition_length'
    position: str = 'none'  # rope, none

    def __post_init__(self):
        super().__post_init__()
        softmax.check_choice('solver', self.solver, ('exact', 'rk4'))
        if self.solver == 'exact':
            softmax.refuse(self, "solver 'exact' takes no steps", 'solver_steps')
        if self.steps < 1 or self.solver_steps < 1:
            raise ValueError(f'steps {self.steps} and solver_steps {self.solver_steps} must be at least 1')
        if any(name in ('alibi', 't5') for name, *_ in self.scores):
            raise ValueError('scores: alibi and t5 differ by head, and would make steps of one head differ')

    @property
    def op_heads(self) -> int:
        return self.num_heads * self.steps


def flow(z, rate, drive, ramp, config: Config):
    """z(1) of dz/dr = rate z + drive + r ramp from z(0) = z."""
    if config.solver == 'rk4':
        h = 1 / config.solver_steps
        field = lambda r, z: rate * z + drive + r * ramp
        for number in range(config.solver_steps):
            r = number * h
            a = field(r, z)
            b = field(r + h / 2, z + h / 2 * a)
            c = field(r + h / 2, z + h / 2 * b)
            z = z + h / 6 * (a + 2 * b + 2 * c + field(r + h, z + h * c))
        return z
    small = jnp.abs(rate) < 1e-2
    v = jnp.where(small, 1.0, rate)
    first = jnp.where(small, 1 + rate / 2 + rate**2 / 6, jnp.expm1(v) / v)
    second = jnp.where(small, 0.5 + rate / 6 + rate**2 / 24, (jnp.expm1(v) - v) / v**2)
    return jnp.exp(rate) * z + first * drive + second * ramp


def transition_length(query, key, steps: int, scale: float, mask, score):
    """Sum over steps of the divergence of neighbouring maps, float32 [B, T, N]; query [B, T, N * steps, H]."""
    (batch, length, n, _), size = query.shape, key.shape[1]

    def step(carry, first, query):
        i = index_of(batch, query.shape[1], length, size, n, first)
        s = products(query, key, scale)
        p = ops.normalizers.softmax(evaluate(score, i, s), evaluate(mask, i)).reshape(batch, n // steps, steps, -1, size)
        a, b = p[:, :, 1:], p[:, :, :-1]
        middle = (a + b) / 2
        relative = lambda p: jnp.where(p > 0, p * jnp.log(jnp.maximum(p, 1e-30) / jnp.maximum(middle, 1e-30)), 0)
        found = (relative(a) + relative(b)).sum((2, 4)) / (2 * jnp.log(2.0))  # [B, N, t]
        return carry, jnp.swapaxes(found, 1, 2)

    return by_rows(step, (), query, num_rows(batch * n * size, length))[1]


class DynamicAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype, width = config, dims.dtype, dims.width
        n, k = config.num_heads, config.steps
        self.head_dim = softmax.heads_of(n, 0, width)
        draw = lambda shape, scale, axes: param(normal(rngs, shape, scale, dims.param_dtype), axes)
        self.question = draw((k, width, width), width**-0.5, (None, 'embed', 'heads'))
        self.question_bias = param(jnp.zeros((k, width), dims.param_dtype), (None, 'heads'))
        self.ramp = draw((k, width), width**-0.5, (None, 'heads'))
        self.direction = draw((k, width), self.head_dim**-0.5, (None, 'heads'))
        self.rate = param(jnp.zeros((k, n), dims.param_dtype), (None, 'heads'))
        self.start = draw((width,), 0.02, ('embed',))
        self.write = draw((k, 2 * width, width), (2 * width) ** -0.5, (None, 'heads', 'embed'))
        self.out = Linear(width, width, ('heads', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)
        self.core = softmax.Core(config, dims, n * k, self.head_dim, rngs=rngs)

    def init_state(self, batch, capacity, dtype=None):
        shape = (self.config.num_heads, self.head_dim)
        return self.core.init_state(batch, capacity, (shape, shape), dtype or self.dtype)

    def queries(self, x):
        """z of every step: x [B, T, M] -> [B, T, N * K, H], the steps of a head side by side."""
        n, found = self.config.num_heads, []
        heads = lambda p: p[...].astype(jnp.float32).reshape(self.config.steps, n, self.head_dim)
        ramp, direction, rate = heads(self.ramp), heads(self.direction), self.rate[...].astype(jnp.float32)
        asked = jnp.einsum('btm,kmw->kbtw', x, self.question[...].astype(x.dtype)).astype(jnp.float32)
        asked = split_heads(asked + self.question_bias[...][:, None, None], n)
        z = jnp.zeros((*x.shape[:2], n, self.head_dim), jnp.float32)
        for k in range(self.config.steps):
            u = direction[k]
            z = flow(z, rate[k][:, None], u * asked[k], u * ramp[k], self.config)
            found.append(z)
        return jnp.stack(found, axis=3).reshape(*x.shape[:2], -1, self.head_dim).astype(x.dtype)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        x, steps = x.astype(self.dtype), self.config.steps
        words = split_heads(x, self.config.num_heads)
        query, keys, state = self.core.extend(self.queries(x), words, (words,), ctx, state)
        mask, score = self.core.mask(keys), self.core.score(keys)
        out = self.core.attend(query, *keys.arrays, ctx, mask, score, scale=1.0)
        read = jnp.moveaxis(out.reshape(*x.shape[:2], -1, steps, self.head_dim), 3, 0)
        memory = jnp.broadcast_to(self.start[...].astype(x.dtype), x.shape)
        for part, write in zip(read, self.write[...].astype(x.dtype)):
            memory = jnp.concatenate([memory, merge_heads(part)], axis=-1) @ write
        aux = {}
        if self.config.report:
            key, scale = keys.arrays[0].astype(x.dtype), self.config.scale or 1.0
            aux['transition_length'] = transition_length(query, key, steps, scale, mask, score).mean()
        return Output(self.out(memory), state, aux)


SPEC = Spec(
    module=DynamicAttention,
    config=Config,
    paper='1905.11666',
    ops=('softmax_attention',),
    state='kv',
    example=Config(num_heads=2, steps=2, report=True),
    variants={'solver_steps': {'solver': 'rk4'}},
    flops=lambda config, dims, length: softmax.flops(
        config.num_heads * config.steps, dims.width // config.num_heads, dims, length
    ),
)
