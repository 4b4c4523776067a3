"""Sampling from a decoder: prefill once, then one step a token, through the same call as training."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnx.models.buckets import Buckets


class Sampling(NamedTuple):
    """How the next token is drawn. Filters apply in this order, to logits / temperature."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # keep the k likeliest; 0: all
    top_p: float = 1.0  # keep the least set of likeliest tokens whose mass reaches p; 1: all
    min_p: float = 0.0  # keep tokens at least min_p times as likely as the likeliest; 0: all

    def validate(self, vocab: int | None = None) -> None:
        """Raises ValueError for what can't be; vocab: ids there are, if that is known."""
        if self.temperature < 0:
            raise ValueError(f'temperature {self.temperature} is negative; 0 is greedy')
        if self.top_k < 0 or (vocab is not None and self.top_k > vocab):
            raise ValueError(f'top_k {self.top_k} is not in [0, {vocab or "…"}], the vocabulary')
        if not 0 < self.top_p <= 1:
            raise ValueError(f'top_p {self.top_p} is not in (0, 1]')
        if not 0 <= self.min_p <= 1:
            raise ValueError(f'min_p {self.min_p} is not in [0, 1]')


def filter_logits(logits: jax.Array, how: Sampling) -> jax.Array:
    """[…, V] logits / temperature with what `how` excludes at -inf."""
    logits = logits / how.temperature
    if how.top_k:
        kth = jax.lax.top_k(logits, how.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if how.top_p < 1.0:
        order = jnp.sort(logits, axis=-1)[..., ::-1]
        before = jnp.cumsum(jax.nn.softmax(order, axis=-1), axis=-1) - jax.nn.softmax(order, axis=-1)
        least = jnp.min(jnp.where(before < how.top_p, order, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if how.min_p > 0.0:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(how.min_p)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return logits


def draw(logits: jax.Array, how: Sampling, key: jax.Array) -> jax.Array:
    """int32 [B] from logits [B, V]."""
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filter_logits(logits, how), axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=('new', 'how', 'stop', 'pad'))
def _run(model, tokens, ids, positions, source, source_mask, key, *, new, how, stop, pad):
    batch, length = tokens.shape
    state = model.init_state(batch, length + new)
    first = model(
        tokens, positions=positions, segment_ids=ids, source=source, source_mask=source_mask, state=state,
        last=True,
    )  # fmt: skip

    def cond(carry):
        return (carry[0] < new) & ~jnp.all(carry[1])

    def step(carry):
        n, done, logits, state, out, trail = carry
        token = jnp.where(done, pad, draw(logits, how, jax.random.fold_in(key, n)))
        out, trail = out.at[:, n].set(token), trail.at[:, n].set(logits)
        ended = done | functools.reduce(jnp.logical_or, [token == s for s in stop], jnp.zeros_like(done))
        where = positions[:, -1:] + 1 + n
        result = model(token[:, None], positions=where, segment_ids=jnp.ones_like(where), state=state)
        return n + 1, ended, result.logits[:, -1], result.state, out, trail

    out = jnp.full((batch, new), pad, jnp.int32)
    trail = jnp.zeros((batch, new, first.logits.shape[-1]), jnp.float32)
    start = (jnp.int32(0), jnp.zeros((batch,), bool), first.logits[:, -1], first.state, out, trail)
    _, _, _, _, out, trail = jax.lax.while_loop(cond, step, start)
    return out, trail


def _rows(prompts, vocab: int) -> list[np.ndarray]:
    """The prompts as arrays of ids, or a ValueError."""
    rows = [np.asarray(p) for p in prompts]
    if wrong := [p for p in rows if p.ndim != 1 or (p.size and not np.issubdtype(p.dtype, np.integer))]:
        raise ValueError(f'prompts: a sequence of token ids for each row, such as [[1, 2], [3]]; one row is {wrong[0]!r:.60}')
    if not rows or any(p.size == 0 for p in rows):
        raise ValueError('prompts: at least one, each of at least one token (a newline, say)')
    low, high = min(p.min() for p in rows), max(p.max() for p in rows)
    if low < 0 or high >= vocab:
        raise ValueError(f'prompt tokens span {low}…{high}; the vocabulary is 0…{vocab - 1}')
    return rows


def _left_padded(rows: list[np.ndarray], pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segment ids and positions, int32 [B, T] each."""
    length = max(p.size for p in rows)
    tokens = np.full((len(rows), length), pad, np.int32)
    ids, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, prompt in enumerate(rows):
        tokens[row, length - prompt.size :] = prompt
        ids[row, length - prompt.size :] = 1
        positions[row, length - prompt.size :] = np.arange(prompt.size)
    return tokens, ids, positions


def generate(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: Sequence[int] | int = (),
    pad: int = 0,
    key: jax.Array | None = None,
    source: jax.Array | None = None,
    source_mask: jax.Array | None = None,
    return_logits: bool = False,
    bases: Sequence[float] = (),
):
    """Continues every prompt; prompts may differ in length.

    Args:
      prompts: token ids, one sequence a row, each with at least one token; they are padded on the left inside.
      max_new_tokens: how many tokens at most.
      temperature, top_k, top_p, min_p: see `Sampling`; temperature 0 is greedy.
      stop: tokens that end a row; the stop token is the row's last, `pad` follows.
      key: PRNG key; needed unless greedy.
      source, source_mask: the encoder's input, for encoder-decoders.
      bases: rotary bases, one a stream of attention buckets (`attnx.models.buckets`, 2312.04455); none: the model as it is.
      return_logits: also return the float32 logits [B, max_new_tokens, V] that each token was drawn from.

    Returns:
      list of token lists, the prompt excluded, cut after the stop token.

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, an option out of range, a layer that can't decode.
    """
    if model.kind in ('encoder', 'pointer') or model.classify or model.embedding is None:
        raise ValueError(f'this model of kind {model.kind!r} has no next token: it classifies, or reads no tokens')
    vocab = model.embedding[...].shape[0]
    rows = _rows(prompts, vocab)
    stop = (stop,) if isinstance(stop, int) else tuple(map(int, stop))
    if max_new_tokens < 1:
        raise ValueError(f'max_new_tokens {max_new_tokens} is not positive')
    how = Sampling(float(temperature), int(top_k), float(top_p), float(min_p))
    how.validate(vocab)
    if key is None:
        if how.temperature:
            raise ValueError('sampling needs a PRNG key; give key=jax.random.key(0), or temperature=0 for greedy')
        key = jax.random.key(0)
    stateless = [
        i
        for i, layer in enumerate(state for stack in model.init_state(1, 2) for state in stack)
        if layer['mixer'] is None
    ]
    if stateless:
        raise ValueError(f'layers {stateless} of the pattern keep no state and can not decode token by token')
    model = Buckets(model, bases) if len(bases) else model
    out, logits = _run(
        model, *_left_padded(rows, pad), source, source_mask, key, new=max_new_tokens, how=how, stop=stop, pad=pad,
    )  # fmt: skip
    found = []
    for row in np.asarray(out):
        ends = np.flatnonzero(np.isin(row, stop)) if len(stop) else np.empty(0, int)
        found.append(row[: ends[0] + 1].tolist() if ends.size else row.tolist())
    return (found, logits) if return_logits else found
