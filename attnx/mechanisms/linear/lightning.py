"""Lightning attention of TransNormerLLM: a matrix state with a fixed decay per head and layer, no denominator.

Equation: S_t = lambda S_{t-1} + k_t^T v_t;  o_t = q_t S_t;  y = W_o (u * o / rms(o) over all heads), with
    q, k = silu(W x), v = W_v x, u = W_u x and, for head h of N in layer l of L,
    lambda = exp(-2^(-8 (h + 1) / N) (1 - l / (L - 1) + 1e-5)).
Paper: Lightning attention-2: a free lunch for handling unlimited sequence lengths in large language models, 2024,
    arXiv 2401.04658; TransNormerLLM, 2023, arXiv 2307.14995.
Differs: the release's decay is the default; decay='paper' is the formula of the text, exp(-(8 h / N) (1 - l / L)). LRPE
    positions (2307.09270) are an option: the release has them in its first layer only, so give that layer a mixer of its own.
    With them a decay makes LRPE-d. So are the activations that later modules put on v and on the gate u.
Cost: train O(T C + T H) time per channel, O(T) memory, through the fused op; decode keeps N H H numbers at any length, 2 N
    H H with unitary LRPE.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attnx import ops
from attnx.nn import Linear, Recurrent, merge_heads, normal, param, rms_normalize, softmax, split_heads
from attnx.nn.recurrence import document_positions
from attnx.spec import Context, Dims, Mixer, Output, Spec

LRPE = ('none', 'unitary', 'orthogonal', 'permutation')
ACTIVATIONS = {'none': lambda x: x, 'silu': jax.nn.silu, 'sigmoid': jax.nn.sigmoid}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_heads: int = 4  # N
    decay: str = 'release'  # release: ALiBi slopes times a factor of the layer; paper: the text's formula; none: 1
    lrpe: str = 'none'  # positions on q and k: unitary (cosines, learned angles; doubles the state), orthogonal (a learned
    # reflection, then half the channels turn by learned angles), permutation (of channels, its powers, fixed); none
    seed: int = 0  # of the permutations
    value_activation: str = 'none'  # none, silu, sigmoid
    gate_activation: str = 'none'  # none, silu, sigmoid

    def __post_init__(self):
        activations = (('value_activation', ACTIVATIONS), ('gate_activation', ACTIVATIONS))
        for field, valid in (('decay', DECAYS), ('lrpe', LRPE), *activations):
            if (given := getattr(self, field)) not in valid:
                raise ValueError(f'{field}: unknown {given!r}; valid: {", ".join(valid)}')
        if self.lrpe != 'permutation':
            softmax.refuse(self, f'lrpe {self.lrpe!r} draws nothing', 'seed')


def release_decay(num_heads: int, layer, num_layers: int):
    """-slope_h (1 - l / (L - 1) + 1e-5), slopes as in ALiBi: float32 [N]. `layer` may be traced."""
    last = max(num_layers - 1, 1)
    return -ops.scores.alibi_slopes(num_heads) * ((last - layer) / last + 1e-5)


def paper_decay(num_heads: int, layer, num_layers: int):
    """-(8 h / N) (1 - l / L), h = 0, …, N - 1: float32 [N]; head 0 never forgets. `layer` may be traced."""
    return -8 / num_heads * np.arange(num_heads, dtype=np.float32) * ((num_layers - layer) / num_layers)


DECAYS = {'release': release_decay, 'paper': paper_decay, 'none': lambda num_heads, layer, num_layers: None}


class Lightning(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.num_layers = config, dims.num_layers
        width, n = dims.width, config.num_heads
        if n < 1 or width % n:
            raise ValueError(f'width {width} does not divide into num_heads {n}')
        self.query = Linear(width, width, ('embed', 'heads'), dims, rngs=rngs)
        self.key = Linear(width, width, ('embed', 'heads'), dims, rngs=rngs)
        self.value = Linear(width, width, ('embed', 'heads'), dims, rngs=rngs)
        self.gate = Linear(width, width, ('embed', 'heads'), dims, rngs=rngs)
        self.out = Linear(width, width, ('heads', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)
        if config.lrpe == 'orthogonal' and width // n % 4:
            raise ValueError(f"lrpe 'orthogonal' turns pairs of half a head: its width {width // n} must divide by 4")
        count = {'unitary': width, 'orthogonal': width // 4}.get(config.lrpe, 0)
        theta = 10_000 ** (-2 * jnp.arange(count) / width)
        self.theta = param(theta.astype(dims.param_dtype), ('heads',)) if count else None
        normals = config.lrpe == 'orthogonal'
        self.normals = param(normal(rngs, (width,), 1.0, dims.param_dtype), ('heads',)) if normals else None

    def init_state(self, batch, capacity, dtype=None):
        n = self.config.num_heads
        head_dim = self.out.kernel.shape[-1] // n
        key_dim = head_dim * (2 if self.config.lrpe == 'unitary' else 1)
        memory = {'matrix': jnp.zeros((batch, n, key_dim, head_dim), jnp.float32)}
        if self.config.lrpe != 'none':
            memory['position'] = jnp.zeros((batch,), jnp.int32)
        return Recurrent.init(memory)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        config, n = self.config, self.config.num_heads
        memory, ids = ({}, ctx.segment_ids) if state is None else state.resume(ctx, *x.shape[:2])
        query, key = (split_heads(jax.nn.silu(f(x)), n) for f in (self.query, self.key))
        new = {}
        if config.lrpe != 'none':
            where = document_positions(ctx, ids, x.shape[1], memory.get('position'))
            query, key = self.place(query, where), self.place(key, where)
            new['position'] = where[:, -1] + 1
        out, new['matrix'] = ops.gated_linear(
            query,
            key,
            split_heads(ACTIVATIONS[config.value_activation](self.value(x)), n),
            DECAYS[config.decay](n, ctx.layer, self.num_layers),
            initial_state=memory.get('matrix'),
            segment_ids=ids,
            impl=ctx.impl,
        )
        y = self.out(rms_normalize(merge_heads(out)) * ACTIVATIONS[config.gate_activation](self.gate(x)))
        return Output(y, None if state is None else state.advance(new, ids))

    def place(self, x, where):
        """LRPE of queries or keys [B, T, N, H] at positions [B, T]."""
        n, positions = self.config.num_heads, ops.positions
        if self.config.lrpe == 'permutation':
            draw = np.random.default_rng(self.config.seed)
            return positions.permute(x, where, draw.permuted(np.tile(np.arange(x.shape[-1]), (n, 1)), axis=1))
        theta = self.theta[...].astype(jnp.float32).reshape(n, -1)
        if self.config.lrpe == 'unitary':
            return positions.lrpe(x, where, theta)
        x = positions.reflect(x, self.normals[...].reshape(n, -1))
        return positions.rotate(x, where[..., None, None] * theta, interleaved=True)


SPEC = Spec(
    module=Lightning,
    config=Config,
    paper='2401.04658',
    ops=('gated_linear',),
    state='matrix',
    causal='causal',
    example=Config(num_heads=4, lrpe='unitary'),
    variants={'seed': {'lrpe': 'permutation'}},
    flops=lambda config, dims, length: 4 * dims.width**2 * (2 if config.lrpe == 'unitary' else 1) / config.num_heads,
)
