"""Multi-head latent attention: keys and values of all heads come from one small latent, which is all that is cached.

Equation: [c_t ; r_t] = W_dkv x_t, c_t <- RMSNorm(c_t), r_t <- RoPE(r_t);  k_th = [W_uk,h c_t ; r_t], v_th = W_uv,h c_t;
    q_th = [n_th ; RoPE(r'_th)] = W_q x_t, or W_uq RMSNorm(W_dq x_t);
    o_th = sum_s w_ths v_sh, w_th = softmax_s((Hn + Hr)^-1/2 q_th . k_sh).
    Absorbed: q_th . k_sh = [W_uk,h^T n_th ; r'_th] . [c_s ; r_s], o_th = W_uv,h sum_s w_ths c_s: one key/value head.
Paper: DeepSeek-V2, 2024, arXiv 2405.04434; DeepSeek-V3 technical report, 2024, arXiv 2412.19437;
    with no latent of queries and a squared-ReLU MLP (`mlp.kind` = 'relu2'): PLM: efficient peripheral language models
    hardware-co-designed for ubiquitous computing, 2025, arXiv 2503.12167; made from a trained model by SVD
    (`attnx.interop.convert`): X-EcoMLA: upcycling pre-trained attention into MLA for efficient and extreme KV compression,
    2025, arXiv 2503.11132.
Differs: the rotation pairs channels by halves, the released code neighbours; widths of 0 keep the paper's ratios to the
    width of a head.
Cost: train O(T²) time, O(T) memory, through the fused op; decode keeps R + Hr numbers a token, and reads them once for all
    heads.
"""

import dataclasses
import math

import jax.numpy as jnp

from attnx.nn import Linear, RMSNorm, merge_heads, positions, softmax, split_heads
from attnx.nn.state import attend_to
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(softmax.Options):
    num_heads: int = 4  # N
    head_dim: int = 0  # Hn: width of queries and keys without position; 0: width / num_heads
    rope_dim: int = 0  # Hr: width of the shared, rotated part of queries and keys; 0: head_dim / 2
    value_dim: int = 0  # Hv: width of a value head; 0: head_dim
    kv_rank: int = 0  # R: width of the latent of keys and values; 0: 4 head_dim
    query_rank: int = 0  # width of the latent of queries; 0: none, as in the lite models
    latent_norm: bool = True  # RMSNorm of the latents; False where they were made from another model by SVD

    def __post_init__(self):
        super().__post_init__()
        if self.qk_norm:
            raise ValueError('qk_norm: keys normalised per head can not be read from the latent, normed itself')
        if min(self.rope_dim, self.value_dim, self.kv_rank, self.query_rank) < 0 or self.rope_dim % 2:
            raise ValueError('rope_dim must be even, and rope_dim, value_dim, kv_rank and query_rank not negative')

    def sizes(self, width: int) -> tuple[int, int, int, int]:
        """(Hn, Hr, Hv, R) at a model width."""
        h = softmax.heads_of(self.num_heads, self.head_dim, width)
        return h, self.rope_dim or max(2, h // 4 * 2), self.value_dim or h, self.kv_rank or 4 * h


def _identity(latent):
    return latent


class MultiHeadLatentAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.num_heads, self.dtype = config.num_heads, dims.dtype
        self.sizes = head, rope, value, rank = config.sizes(dims.width)
        wide = config.num_heads * (head + rope)
        norm = lambda width: RMSNorm(width, dims, rngs=rngs, axis='rank') if config.latent_norm else _identity
        if config.query_rank:
            self.query_down = Linear(dims.width, config.query_rank, ('embed', 'rank'), dims, rngs=rngs)
            self.query_norm = norm(config.query_rank)
            self.query = Linear(config.query_rank, wide, ('rank', 'heads'), dims, rngs=rngs)
        else:
            self.query_down = self.query_norm = None
            self.query = Linear(dims.width, wide, ('embed', 'heads'), dims, rngs=rngs)
        self.down = Linear(dims.width, rank + rope, ('embed', 'rank'), dims, rngs=rngs)
        self.norm = norm(rank)
        self.key = Linear(rank, config.num_heads * head, ('rank', 'heads'), dims, rngs=rngs)
        self.value = Linear(rank, config.num_heads * value, ('rank', 'heads'), dims, rngs=rngs)
        scale = (2 * dims.num_layers) ** -0.5
        self.out = Linear(config.num_heads * value, dims.width, ('heads', 'embed'), dims, rngs=rngs, scale=scale)
        self.core = softmax.Core(config, dims, config.num_heads, head + rope, rngs=rngs)
        # YaRN's attention factor is in the rotated half already: give the other half the same.
        yarn = config.position == 'rope' and config.rope.scaling == 'yarn' and config.rope.factor > 1
        self.sharpen = (0.1 * math.log(config.rope.factor) + 1) ** 2 if yarn else 1.0

    def init_state(self, batch, capacity, dtype=None):
        _, rope, _, rank = self.sizes
        return self.core.init_state(batch, capacity, ((1, rank + rope),), dtype or self.dtype)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        head, rope, value, rank = self.sizes
        length = x.shape[1]
        where = positions(ctx, length, 0 if state is None else state.index)
        query = self.query(x if self.query_down is None else self.query_norm(self.query_down(x)))
        plain, rotated = jnp.split(split_heads(query, self.num_heads), [head], axis=-1)
        plain, rotated = plain * self.sharpen, self.core.rotate(rotated, where)
        latent, shared = jnp.split(self.down(x), [rank], axis=-1)
        shared = self.core.rotate(shared[:, :, None], where)
        entry = jnp.concatenate([self.norm(latent)[:, :, None], shared], axis=-1)  # [B, T, 1, R + Hr]
        state, keys = attend_to(state, ctx, (entry,))
        (entry,) = keys.arrays
        # Both forms are exact: take the one of fewer products. A step absorbs; a long prefill expands the cache once.
        absorb = state is not None and length * (2 * rank - head - value) <= rank * (head + value)
        form = self.absorbed if absorb else self.expanded
        attend = lambda q, k, v: self.core.attend(
            q, k, v, ctx, self.core.mask(keys), self.core.score(keys), scale=(head + rope) ** -0.5
        )
        return Output(self.out(merge_heads(form(plain, rotated, entry.astype(plain.dtype), attend))), state)

    def expanded(self, plain, rotated, entry, attend):
        """Keys and values of every head from the latents: entry [B, S, 1, R + Hr] -> out [B, T, N, Hv]."""
        latent, shared = jnp.split(entry, [self.sizes[3]], axis=-1)
        key = split_heads(self.key(latent[:, :, 0]), self.num_heads)
        value = split_heads(self.value(latent[:, :, 0]), self.num_heads)
        key = jnp.concatenate([key, jnp.broadcast_to(shared, (*key.shape[:-1], shared.shape[-1]))], axis=-1)
        return attend(jnp.concatenate([plain, rotated], axis=-1), key, value)

    def absorbed(self, plain, rotated, entry, attend):
        """Queries into the latent space, whose entries are the keys and values of one shared head."""
        per_head = lambda f: f.kernel[...].astype(plain.dtype).reshape(self.sizes[3], self.num_heads, -1)
        query = jnp.einsum('btnh,rnh->btnr', plain, per_head(self.key))
        out = attend(jnp.concatenate([query, rotated], axis=-1), entry, entry[..., : self.sizes[3]])
        return jnp.einsum('btnr,rnh->btnh', out, per_head(self.value))


def _flops(config, dims, length):
    head, rope, value, _ = config.sizes(dims.width)
    return softmax.flops(config.num_heads, head + rope, dims, length, value_dim=value)


SPEC = Spec(
    module=MultiHeadLatentAttention,
    config=Config,
    paper='2405.04434',
    ops=('softmax_attention',),
    state='latent',
    example=Config(num_heads=4, rope_dim=4, kv_rank=16, query_rank=12),
    flops=_flops,
)
