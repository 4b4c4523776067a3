"""Cross-attention: tokens read a second sequence, the memory, such as an encoder's output.

Equation: o_t = sum_s softmax_s(scale q_t . k_s) v_s, q from the tokens, k and v from the memory.
Paper: Attention is all you need, 2017, arXiv 1706.03762.
Differs: key/value heads may be shared by query heads; QK-norm, sinks and softcap are options, off by default. No
    position code: the memory brings its own. All documents of a packed row read that row's memory.
Cost: train O(T S) time, O(T + S) memory, through the fused op; decode keeps and reads 2 K H numbers for each memory token,
    none for its own.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnx import ops
from attnx.nn import Linear, merge_heads, softmax, split_heads
from attnx.spec import Context, Dims, Mixer, Output, Spec

SCORES = ('softcap', 'temperature')  # those that make sense between two sequences


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(softmax.Options):
    num_heads: int = 4  # N query heads
    num_kv_heads: int = 0  # K key/value heads; divides num_heads; 0: as many as num_heads
    head_dim: int = 0  # H; 0: width / num_heads
    memory_width: int = 0  # width of the memory; 0: that of the model
    memory_length: int = 0  # most memory tokens that decoding has room for; 0: the model's max_length
    position: str = 'none'  # none: positions of two sequences have no difference

    def __post_init__(self):
        super().__post_init__()
        softmax.check_groups(self.num_heads, self.num_kv_heads)
        if min(self.memory_width, self.memory_length) < 0:
            raise ValueError(f'memory_width {self.memory_width} and memory_length {self.memory_length} must not be negative')
        if self.position != 'none' or self.masks or any(name not in SCORES for name, *_ in self.scores):
            raise ValueError(
                'a token and a memory entry have no distance: cross_attention takes '
                f"position='none', masks=() and scores of {SCORES}; "
                f'given position={self.position!r}, masks={self.masks}, scores={self.scores}'
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """The memory as the layer reads it; written by the calls that bring a memory."""

    key: jax.Array  # [B, S, K, H]
    value: jax.Array  # [B, S, K, H]
    real: jax.Array  # bool [B, S]


class CrossAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype = config, dims.dtype
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = softmax.heads_of(config.num_heads, config.head_dim, dims.width)
        self.width, self.room = config.memory_width or dims.width, config.memory_length or dims.max_length
        wide, narrow = config.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.query = Linear(dims.width, wide, ('embed', 'heads'), dims, rngs=rngs)
        self.key = Linear(self.width, narrow, ('embed', 'kv_heads'), dims, rngs=rngs)
        self.value = Linear(self.width, narrow, ('embed', 'kv_heads'), dims, rngs=rngs)
        self.out = Linear(wide, dims.width, ('heads', 'embed'), dims, rngs=rngs, scale=(2 * dims.num_layers) ** -0.5)
        self.core = softmax.Core(config, dims, config.num_heads, self.head_dim, rngs=rngs)

    def init_state(self, batch, capacity, dtype=None):
        shape = (batch, self.room, self.num_kv_heads, self.head_dim)
        empty = jnp.zeros(shape, dtype or self.dtype)
        return State(key=empty, value=empty, real=jnp.zeros(shape[:2], bool))

    def __call__(self, x, ctx: Context, state=None) -> Output:
        query = split_heads(self.query(x), self.config.num_heads)
        if self.core.query_norm is not None:
            query = self.core.query_norm(query)
        if ctx.memory is not None:
            key, value, real = self.project(ctx.memory, ctx.memory_mask)
            if state is not None:
                state = self.store(state, key, value, real)
        elif state is not None:
            key, value, real = state.key, state.value, state.real
        else:
            raise ValueError('cross_attention reads a memory: give Context(memory=[B, S, M]), or a state holding one')
        tokens = jnp.ones(x.shape[:2], bool) if ctx.segment_ids is None else ctx.segment_ids > 0
        mask = ops.masks.segments(tokens.astype(jnp.int32), real.astype(jnp.int32))
        score = None
        for name, *arguments in self.config.scores:
            term = getattr(ops.scores, name)(*arguments)
            score = term if score is None else score >> term
        return Output(self.out(merge_heads(self.core.attend(query, key, value, ctx, mask, score))), state)

    def project(self, memory, real):
        """memory [B, S, M] -> (key, value, which entries are real)."""
        if memory.ndim != 3 or memory.shape[-1] != self.width:
            raise ValueError(f'memory must be [B, S, {self.width}], was given {list(memory.shape)}')
        key, value = (split_heads(f(memory), self.num_kv_heads) for f in (self.key, self.value))
        key = key if self.core.key_norm is None else self.core.key_norm(key)
        return key, value, jnp.ones(memory.shape[:2], bool) if real is None else real.astype(bool)

    def store(self, state, key, value, real):
        if key.shape[1] > self.room:
            raise ValueError(
                f'a memory of {key.shape[1]} tokens exceeds the room for {self.room}; '
                'set memory_length of cross_attention'
            )
        write = lambda old, new: jnp.zeros_like(old).at[:, : new.shape[1]].set(new.astype(old.dtype))
        return State(key=write(state.key, key), value=write(state.value, value), real=write(state.real, real))


SPEC = Spec(
    module=CrossAttention,
    config=Config,
    paper='1706.03762',
    ops=('softmax_attention',),
    state='memory',
    needs=('memory',),
    example=Config(num_heads=4, num_kv_heads=2),
    flops=lambda config, dims, length: 2 * softmax.flops(
        config.num_heads, config.head_dim or dims.width // config.num_heads, dims, length
    )
    / (1 if dims.causal else 2),
)
