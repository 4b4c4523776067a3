"""What softmax mechanisms share: positions, masks, scores, sinks, dropout and the cache around the op.

A mechanism projects; `Core` does the rest. Every option here works for every mechanism built on it, in training,
prefill and decoding, through whichever implementation of the op runs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnx import ops
from attnx.dispatch import nearest
from attnx.nn.layers import RMSNorm
from attnx.nn.params import normal, param
from attnx.nn.state import Cache, Keys, attend_to, positions
from attnx.ops.softmax_attention import Dropout
from attnx.spec import Context, Dims

MASKS = ('window', 'dilated', 'strided', 'global_window', 'block_causal')
ABSOLUTE = ('global_window', 'block_causal')  # masks of positions in a document; the others see differences only
SCORES = ('alibi', 'softcap', 'temperature', 't5')
POSITIONS = ('rope', 'none')
# Codes that are more than a rotation or a term of the score: mechanisms, which can not be joined to another one.
MECHANISMS = ('coca', 'cope', 'dual_rope', 'dynamic_bias', 'equal_distance', 'music', 'mvpa', 'rcmha', 'shaw', 'transformer_xl')
SCALINGS = ('none', 'linear', 'ntk', 'yarn')  # dynamic would turn cached keys by angles of another length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions."""

    base: float = 10_000.0  # the frequencies run from 1 to about 1 / base; 100 is usual for images
    fraction: float = 1.0  # share of the head width that is rotated, rounded down to whole pairs
    scaling: str = 'none'  # none, linear (2306.15595), ntk, yarn (2309.00071)
    factor: float = 1.0  # context extension of the scaling
    original_length: int = 2048  # length the frequencies were trained for (yarn)
    grid: int = 0  # tokens in a row of a 2-D grid: half of the pairs turn by row p // grid, half by column; 0: a line

    def __post_init__(self):
        if self.scaling not in SCALINGS:
            raise ValueError(f'unknown rope scaling {self.scaling!r}; {nearest(self.scaling, SCALINGS)}')
        if self.base <= 1 or not 0 < self.fraction <= 1 or self.grid < 0:
            raise ValueError(
                f'rope: base {self.base} must exceed 1, fraction {self.fraction} be in (0, 1], '
                f'grid {self.grid} not negative'
            )
        if self.factor < 1 or (self.factor == 1) != (self.scaling == 'none'):
            raise ValueError(f'rope: a scaling needs a factor > 1, and a factor a scaling; given {self.scaling}, {self.factor}')
        if self.original_length != 2048 and self.scaling != 'yarn':
            raise ValueError(f'rope: original_length {self.original_length} belongs to yarn; scaling is {self.scaling!r}')
        if self.grid and self.scaling != 'none':
            raise ValueError(f'rope: scaling {self.scaling!r} is of positions on a line, not on a grid of {self.grid}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every softmax mechanism; its Config inherits them."""

    position: str = 'rope'  # rope, none
    rope: Rope = Rope()  # used where position is rope
    masks: tuple = ()  # further masks, all must allow: (('window', 1024), ('strided', 64))
    scores: tuple = ()  # score terms, applied in order: (('alibi',), ('softcap', 30.0))
    qk_norm: bool = False  # RMSNorm of queries and keys per head, learned scale (QK-norm: 2010.04245, 2302.05442)
    sinks: bool = False  # a learned logit per head in the denominator (attention sinks: 2309.17453)
    off_by_one: bool = False  # a logit of 0 in the denominator: 1 + sum exp (E. Miller, Attention is off by one, 2023)
    dropout: float = 0.0  # of attention weights
    scale: float = 0.0  # multiplies logits; 0: head_dim ** -0.5

    def __post_init__(self):
        asked = (self.position, *(entry[0] for entry in self.scores if isinstance(entry, tuple) and entry))
        if codes := [name for name in asked if name in MECHANISMS]:
            raise ValueError(
                f'{codes[0]} is a mechanism of its own, kind={codes[0]!r}, being more than a rotation or a term of the score: '
                f'no position or score of another; positions are {", ".join(POSITIONS)}, scores {", ".join(SCORES)}'
            )
        if self.position not in POSITIONS:
            raise ValueError(f'unknown position {self.position!r}; {nearest(self.position, POSITIONS)}')
        if self.position != 'rope' and self.rope != Rope():
            raise ValueError(f'rope is set, but position is {self.position!r}: {self.rope}')
        makers = {name: getattr(ops.masks, name) for name in MASKS}
        terms = {name: getattr(ops.scores, name) for name in SCORES} | {'alibi': _alibi, 't5': _t5}
        for what, entries, valid in (('masks', self.masks, makers), ('scores', self.scores, terms)):
            for entry in entries:
                if not isinstance(entry, tuple) or not entry or entry[0] not in valid:
                    name = entry[0] if isinstance(entry, tuple) and entry else entry
                    raise ValueError(f"{what}: {entry!r} is not ('name', parameters…); {nearest(name, valid)}")
                try:
                    valid[entry[0]](*entry[1:])
                except TypeError as error:
                    raise ValueError(f'{what}: {entry!r} has other parameters than it takes: {error}') from None
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f'dropout {self.dropout} is not in [0, 1)')
        if self.sinks and self.off_by_one:
            raise ValueError('sinks and off_by_one are one learned and one fixed logit in the denominator: choose one')


def _alibi():
    """A score ('alibi',): nothing to set, its slopes are those of the paper."""


def _t5(num_buckets: int = 32, max_distance: int = 128):
    """A score ('t5', buckets, distance of the last bucket)."""
    ops.scores.t5_buckets(0, num_buckets, max_distance, bidirectional=num_buckets % 4 == 0)


def heads_of(num_heads: int, head_dim: int, width: int) -> int:
    """The head width: `head_dim`, or width / num_heads where it is 0."""
    if head_dim < 0 or num_heads < 1:
        raise ValueError(f'head_dim {head_dim} must not be negative, and num_heads {num_heads} be at least 1')
    if head_dim:
        return head_dim
    if width % num_heads:
        raise ValueError(f'width {width} does not divide into {num_heads} heads; set head_dim, or heads that divide it')
    return width // num_heads


def check_groups(num_heads: int, num_kv_heads: int) -> None:
    """Raises ValueError unless num_kv_heads divides num_heads; 0 stands for as many."""
    if num_heads < 1 or num_kv_heads < 0 or num_heads % (num_kv_heads or num_heads):
        raise ValueError(f'num_kv_heads {num_kv_heads} does not divide num_heads {num_heads}')


def check_choice(field: str, given: str, valid: tuple[str, ...]) -> None:
    """Raises ValueError unless `given` is one of `valid`."""
    if given not in valid:
        raise ValueError(f'unknown {field} {given!r}; {nearest(given, valid)}')


def refuse(config: 'Options', why: str, *fields: str) -> None:
    """Raises ValueError where one of `fields` of a Config is not its default."""
    default = type(config).__dataclass_fields__
    for field in fields:
        if (given := getattr(config, field)) != default[field].default:
            raise ValueError(f'{field}={given!r}: {why}')


class Core(nnx.Module):
    """Softmax attention of projected heads under `Options`."""

    def __init__(self, options: Options, dims: Dims, num_heads: int, head_dim: int, *, rngs: nnx.Rngs):
        self.options, self.causal, self.num_heads = options, dims.causal, num_heads
        norm = lambda: RMSNorm(head_dim, dims, rngs=rngs, axis='head_dim') if options.qk_norm else None
        self.query_norm, self.key_norm = norm(), norm()
        self.sink = param(jnp.zeros((num_heads,), dims.param_dtype), ('heads',)) if options.sinks else None
        buckets = next((s[1] if len(s) > 1 else 32 for s in options.scores if s[0] == 't5'), 0)
        table = lambda: param(normal(rngs, (buckets, num_heads), 0.02, dims.param_dtype), ('features', 'heads'))
        self.buckets = table() if buckets else None

    def rotate(self, x: jax.Array, where: jax.Array) -> jax.Array:
        """Applies the position code to heads [B, T, N, H] at positions [B or 1, T]."""
        if self.options.position == 'none':
            return x
        rope = self.options.rope
        part = 4 if rope.grid else 2
        rotary = int(x.shape[-1] * rope.fraction) // part * part
        if rope.grid:
            coordinates = jnp.stack([where // rope.grid, where % rope.grid], axis=-1)
            return ops.positions.axial_rope(x, coordinates, base=rope.base, rotary_dim=rotary)
        scaling = None
        if rope.scaling != 'none':
            scaling = ops.positions.Scaling(rope.scaling, rope.factor, rope.original_length)
        return ops.positions.rope(x, where, base=rope.base, rotary_dim=rotary, scaling=scaling)

    def mask(self, keys: Keys, *, causal: bool | None = None):
        """The conjunction of causality, documents and the options' masks."""
        slots = keys.query_slots, keys.key_slots
        found = []
        if self.causal if causal is None else causal:
            found.append(ops.masks.causal(*slots))
        if keys.query_ids is not None:
            found.append(ops.masks.segments(keys.query_ids, keys.key_ids))
        for name, *arguments in self.options.masks:
            query, key = keys.in_documents() if name in ABSOLUTE else slots
            found.append(getattr(ops.masks, name)(*arguments, query_positions=query, key_positions=key))
        mask = None
        for m in found:
            mask = m if mask is None else mask & m
        return mask

    def score(self, keys: Keys):
        """The options' score terms in order."""
        far, both = keys.distances(), not self.causal
        score = None
        for name, *arguments in self.options.scores:
            if name == 'alibi':
                slopes = ops.scores.alibi_slopes(self.num_heads)
                if far is None:
                    term = ops.scores.alibi(slopes, bidirectional=both)
                else:
                    term = ops.scores.relative(slopes[:, None] * (-abs(far) if both else far).astype(jnp.float32))
            elif name == 't5':
                table, limit = self.buckets[...], dict(zip(('max_distance',), arguments[1:]))
                if far is None:
                    term = ops.scores.t5(table, keys.length, bidirectional=both, **limit)
                else:
                    where = ops.scores.t5_buckets(far, table.shape[0], bidirectional=both, **limit)
                    term = ops.scores.relative(table[where].T)
            else:
                term = getattr(ops.scores, name)(*arguments)
            score = term if score is None else score >> term
        return score

    def init_state(self, batch: int, capacity: int, shapes, dtype: Any, window: int = 0) -> Cache:
        return Cache.init(batch, min(window, capacity) if window else capacity, shapes, dtype, ring=bool(window))

    def extend(self, query, key, values, ctx: Context, state: Cache | None = None):
        """Normalises and rotates queries and keys; appends the keys and `values`, a tuple of [B, T, …], to the state.

        Returns:
          (query, all that there is to attend to, next state)
        """
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        where = positions(ctx, query.shape[1], 0 if state is None else state.index)
        state, keys = attend_to(state, ctx, (self.rotate(key, where), *values))
        return self.rotate(query, where), keys, state

    def __call__(self, query, key, value, ctx: Context, state: Cache | None = None, **extra):
        """query [B, T, N, H], key [B, T, K, H], value [B, T, K, Hv] -> (out [B, T, N, Hv], next state)."""
        query, keys, state = self.extend(query, key, (value,), ctx, state)
        return self.attend(query, *keys.arrays, ctx, self.mask(keys), self.score(keys), **extra), state

    def sinks(self) -> jax.Array | None:
        """Logits in the denominator, float32 [N]."""
        if self.options.off_by_one:
            return jnp.zeros((self.num_heads,), jnp.float32)
        return None if self.sink is None else self.sink[...].astype(jnp.float32)

    def weights(self):
        """The options' softmax, sinks included, as a normalizer for `ops.weighted_attention`."""
        sinks = self.sinks()
        return ops.normalizers.softmax if sinks is None else ops.normalizers.sinks(sinks)

    def dropout(self, ctx: Context) -> Dropout | None:
        """The options' dropout of weights, in a call with a key."""
        if not self.options.dropout or ctx.key is None:
            return None
        return Dropout(self.options.dropout, jax.random.bits(ctx.key, (), jnp.uint32))

    def attend(
        self, query, key, value, ctx: Context, mask, score, *, scale: float | None = None, weights=None, **extra
    ):
        """The op under the options' scale (else `scale`, else head_dim ** -0.5), sinks and dropout; `extra` overrides.

        weights: of `ops.normalizers`, in place of the softmax; a mechanism that gives some refuses sinks and off_by_one.
        """
        key, value = (x.astype(query.dtype) for x in (key, value))
        options = {'mask': mask, 'score': score, 'scale': self.options.scale or scale, 'dropout': self.dropout(ctx)}
        options |= {'impl': ctx.impl}
        if weights is not None:
            return ops.weighted_attention(query, key, value, weights=weights, **options | extra)
        return ops.softmax_attention(query, key, value, **{**options, 'sinks': self.sinks(), **extra})


def flops(num_heads: int, head_dim: int, dims: Dims, length: int, value_dim: int = 0) -> float:
    """Forward FLOPs a token of scores and weighted values: every query meets T keys, half of them if causal."""
    keys = length / 2 if dims.causal else length
    return 2 * num_heads * (head_dim + (value_dim or head_dim)) * keys
