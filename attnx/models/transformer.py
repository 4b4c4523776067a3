"""Decoder, encoder and encoder-decoder transformers: embeddings, stacks of scanned units, a head.

Repeats of the pattern share one `lax.scan`, so compile time does not grow with depth; an override ends one stack and begins
another. Only this file stacks modules.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import layout

from attnx import ops, sharding
from attnx.models import fixed as fixed_lib
from attnx.models.block import Unit
from attnx.models.config import DTYPES, Layer, ModelConfig, units
from attnx.nn import NORMS, Linear, dropout, normal, param, stack
from attnx.nn.state import positions as positions_of
from attnx.sharding import constrain
from attnx.spec import Context, Dims
from pallas_kernels import kept

_POLICIES = {'full': None, 'dots': kept.POLICY}


class ModelOutput(NamedTuple):
    logits: jax.Array  # float32 [B, T, V], or [B, num_classes] of a classifier
    state: Any = None
    aux: Mapping[str, jax.Array] = MappingProxyType({})


def _of_last(ctx: Context) -> Context:
    """The context of the last token; readers cut what was published to their own tokens."""
    cut = lambda a: None if a is None else a[:, -1:]
    return dataclasses.replace(
        ctx,
        positions=cut(ctx.positions),
        segment_ids=cut(ctx.segment_ids),
        inputs={name: cut(value) for name, value in ctx.inputs.items()},
        shared={**ctx.shared, 'embedding': cut(ctx.shared['embedding'])},
    )


class Stack(nnx.Module):
    """Layers as stacks of repeated units."""

    def __init__(self, layers: tuple[Layer, ...], period: int, model: ModelConfig, dims: Dims, *, rngs, cross=None):
        plan = units(layers, period)
        self.repeats = tuple(n for _, n in plan)
        self.lengths = tuple(len(unit) for unit, _ in plan)
        build = lambda unit: lambda keys: Unit(unit, model, dims, keys, cross=cross)
        # A key a layer, whatever its neighbours are: models that differ in one layer begin with equal others.
        key = rngs.params()
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(layers)))
        ends = list(itertools.accumulate(n * length for n, length in zip(self.repeats, self.lengths)))
        parts = [keys[end - n * length : end].reshape(n, length) for end, n, length in zip(ends, self.repeats, self.lengths)]
        self.stacks = nnx.List([stack(build(unit), part) for (unit, _), part in zip(plan, parts)])
        self.remat, self.unroll = model.remat, model.unroll

    def init_state(self, batch: int, capacity: int, dtype: Any):
        def one(unit, repeats):
            state = jax.tree.map(lambda v: v[0], unit).init_state(batch, capacity, dtype)
            return jax.tree.map(lambda s: jnp.broadcast_to(s, (repeats, *s.shape)), state)

        return tuple(map(one, self.stacks, self.repeats))

    def __call__(self, x, ctx: Context, state=None, last: bool = False):
        """x [B, T, M] -> (x, next state, aux summed over layers).

        What a layer publishes is seen by later layers of its unit, and by later stacks if its unit is not repeated.
        last: the last token alone is wanted; final stacks without a state of their own then run on it alone (YOCO's early
        exit, 2405.05254).
        """
        first, states, total = 0, [], {}
        ctx = dataclasses.replace(ctx, shared={'embedding': x, **ctx.shared})
        for number, (repeats, length) in enumerate(zip(self.repeats, self.lengths)):
            if last and state is not None and x.shape[1] > 1 and not jax.tree.leaves(state[number:]):
                x, ctx = x[:, -1:], _of_last(ctx)

            def body(x, scanned, length=length, first=first, ctx=ctx, single=repeats == 1):
                unit, index, old = scanned
                x, new, aux, shared = unit(x, dataclasses.replace(ctx, layer=first + index * length), old)
                return x, (new, aux, dict(shared) if single else {})

            if self.remat != 'none':
                # A loop keeps XLA from undoing it, where it turns; else a barrier must.
                body = jax.checkpoint(body, prevent_cse=self.unroll != 1 or repeats == 1, policy=_POLICIES[self.remat])
            scanned = self.stacks[number], jnp.arange(repeats), None if state is None else state[number]
            loop = kept.looped() if 0 < self.unroll < repeats else contextlib.nullcontext()
            with loop:
                x, (new, aux, shared) = jax.lax.scan(body, x, scanned, unroll=self.unroll or True)
            states.append(new)
            ctx = dataclasses.replace(ctx, shared={**ctx.shared, **jax.tree.map(lambda v: v[0], shared)})
            total = {k: total.get(k, 0.0) + jnp.sum(aux[k], axis=0) if k in aux else total[k] for k in {**total, **aux}}
            first += repeats * length
        return x, (None if state is None else tuple(states)), total

    def walk(self, x, ctx: Context):
        """Yields (layer index, its block, x before it, x after it, its context), without scan: for a look inside."""
        index, shared = 0, {'embedding': x, **ctx.shared}
        for stacked, repeats in zip(self.stacks, self.repeats):
            for repeat in range(repeats):
                inside = shared
                for block in jax.tree.map(lambda v, r=repeat: v[r], stacked).layers:
                    here = dataclasses.replace(ctx, layer=index, shared=inside)
                    y, _, _, more = block(x, here)
                    yield index, block, x, y, here
                    x, inside, index = y, {**inside, **more}, index + 1
            shared = inside if repeats == 1 else shared

    def trace(self, x, ctx: Context):
        """Yields (layer index, x after it), one layer after another: for finding where a NaN is born."""
        for index, _, _, y, _ in self.walk(x, ctx):
            yield index, y


class Transformer(nnx.Module):
    """The model of a `ModelConfig`; see `build`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        if not config.input_dim and config.vocab_size < 1:
            raise ValueError(f'vocab_size {config.vocab_size}: a model of tokens needs a vocabulary of at least 1')
        both = config.kind == 'encoder_decoder'
        dims = config.dims(causal=config.kind != 'encoder', num_layers=config.num_layers)
        features = config.input_dim
        self.project = Linear(features, dims.width, ('features', 'embed'), dims, rngs=rngs, bias=True) if features else None
        table = lambda rows, axis: param(normal(rngs, (rows, dims.width), 0.02), (axis, 'embed'))
        self.embedding = None if features else table(config.vocab_size, 'vocab')
        self.table = table(dims.max_length, 'features') if config.positions == 'learned' else None
        cross = config.mixer(config.cross) if both else None
        self.body = Stack(config.layers(), len(config.pattern), config, dims, rngs=rngs, cross=cross)
        self.norm = NORMS[config.norm](dims.width, dims, rngs=rngs)
        inner = config.dims(causal=False, num_layers=config.encoder.num_layers)
        layers = config.encoder_layers() if both else ()
        self.encoder = Stack(layers, len(config.encoder.pattern), config, inner, rngs=rngs) if both else None
        self.encoder_norm = NORMS[config.norm](dims.width, dims, rngs=rngs) if both else None
        outputs = config.num_classes or config.vocab_size or features
        axes = ('embed', 'features' if config.num_classes else 'vocab')
        self.head = None if config.tied else Linear(dims.width, outputs, axes, dims, rngs=rngs, bias=config.num_classes > 0)
        self.kind, self.classify, self.impl = config.kind, config.num_classes > 0, config.impl
        self.positions, self.softcap, self.rate = config.positions, config.logit_softcap, config.dropout
        self.dtype, self.fixed = DTYPES[config.dtype], config.fixed

    def init_state(self, batch: int, capacity: int, dtype: Any = None):
        """The state before the first token, with room for `capacity` tokens."""
        return self.body.init_state(batch * (2 if self.fixed else 1), capacity, dtype or self.dtype)

    def embed(self, inputs, positions, key=None):
        """tokens int32 [B, T], or [B, T, input_dim] -> [B, T, M]."""
        if self.embedding is None:
            x = self.project(inputs)
        else:
            if inputs.ndim != 2 or not jnp.issubdtype(inputs.dtype, jnp.integer):
                raise ValueError(f'tokens must be integers [B, T], were given {inputs.dtype}{list(inputs.shape)}')
            # Looked up in whole rows: a table cut along M would give the tokens' vectors cut the same way. In float32, so
            # that the gradients of a token's occurrences are added up in it.
            table = constrain(self.embedding[...], ('vocab', None))
            if sharding.active() is not None:  # put together along M, XLA would have M outermost and add number by number
                table = layout.with_layout_constraint(table, layout.Layout((0, 1)))
            x = table[inputs].astype(self.dtype)
        if self.table is not None:
            x = x + constrain(self.table[...], ('features', None))[positions].astype(x.dtype)
        elif self.positions == 'sinusoidal':
            x = x + ops.positions.sinusoidal(positions, x.shape[-1]).astype(x.dtype)
        x = dropout(x, self.rate, None if key is None else jax.random.fold_in(key, 2**20))
        return constrain(x, ('batch', 'length', 'embed'))

    def enter(self, tokens, ctx: Context):
        """(the first layer's input, its context), with a fixed sequence beside each row where there is one."""
        x = self.embed(tokens, positions_of(ctx, tokens.shape[1]), ctx.key)
        return fixed_lib.beside(self, self.fixed, x, ctx) if self.fixed else (x, ctx)

    def encode(self, inputs, *, mask=None, key=None):
        """The memory [B, S, M] that the decoder reads; mask bool [B, S], True where real."""
        ids = None if mask is None else mask.astype(jnp.int32)
        ctx = self.context(inputs, None, ids, None, None, key)
        x, _, aux = self.encoder(self.embed(inputs, positions_of(ctx, inputs.shape[1]), key), ctx)
        return self.encoder_norm(x), aux

    def context(self, tokens, positions, segment_ids, memory, memory_mask, key, step=None, inputs=None) -> Context:
        return Context(
            positions=positions,
            segment_ids=segment_ids,
            memory=memory,
            memory_mask=memory_mask,
            key=key,
            step=step,
            inputs={**({} if self.embedding is None else {'tokens': tokens}), **(inputs or {})},
            impl=self.impl,
        )

    def __call__(
        self,
        tokens,
        *,
        positions=None,
        segment_ids=None,
        source=None,
        source_mask=None,
        memory=None,
        key=None,
        step=None,
        inputs=None,
        state=None,
        last=False,
    ) -> ModelOutput:
        """tokens [B, T] (or [B, T, input_dim]) -> logits.

        Args:
          positions: int32 [B, T], position inside the document; None: consecutive. With a state and absolute positions on
            the embeddings they must be given.
          segment_ids: int32 [B, T], documents of a packed row, 0 = padding.
          source: the encoder's input of an encoder-decoder [B, S]; `memory` is its encoded form, if at hand.
          key: PRNG key of dropout; None: deterministic.
          step: int32 [], number of the training step, for mechanisms that alternate what they train.
          inputs: name -> array, side inputs of mechanisms that need them (`Spec.inputs`); tokens are always among them.
          state: of `init_state`, or the last output's.
          last: only the logits of the last token, [B, 1, V], as for a prompt.
        """
        if self.kind == 'encoder_decoder' and source is None and memory is None and state is None:
            raise ValueError('an encoder-decoder reads a source: give source [B, S] or memory [B, S, M]')
        aux = {}
        if source is not None:
            memory, aux = self.encode(source, mask=source_mask, key=key)
        ctx = self.context(tokens, positions, segment_ids, memory, source_mask, key, step, inputs)
        if state is not None and positions is None and (self.fixed or self.positions != 'none'):
            raise ValueError(f'positions={self.positions!r}, fixed={self.fixed!r} with a state: give positions [B, T]')
        if tokens.ndim != (2 if self.project is None else 3):
            wanted = 'tokens must be integers [B, T]' if self.project is None else 'inputs must be [B, T, input_dim]'
            raise ValueError(f'{wanted}, were given {tokens.dtype}{list(tokens.shape)}')
        x, state, more = self.body(*self.enter(tokens, ctx), state, last)
        x = x[::2] if self.fixed else x
        x, segment_ids = (x[:, -1:], None) if last else (x, segment_ids)
        aux = {k: aux.get(k, 0.0) + more.get(k, 0.0) for k in {**aux, **more}}
        return ModelOutput(self.read(self.norm(x), segment_ids), state, aux)

    def read(self, x, segment_ids=None):
        """The head: float32 logits."""
        if self.classify:
            real = jnp.ones(x.shape[:2], jnp.float32) if segment_ids is None else (segment_ids > 0).astype(jnp.float32)
            total = jnp.einsum('btm,bt->bm', x.astype(jnp.float32), real)
            x = (total / jnp.maximum(real.sum(-1, keepdims=True), 1)).astype(x.dtype)
        if self.head is None:
            logits = x @ self.embedding[...].astype(x.dtype).T
        else:
            logits = self.head(x)
        logits = logits.astype(jnp.float32)
        logits = self.softcap * jnp.tanh(logits / self.softcap) if self.softcap else logits
        return logits if self.classify else constrain(logits, ('batch', 'length', 'vocab'))

    def trace(
        self, tokens, *, positions=None, segment_ids=None, source=None, source_mask=None, key=None, step=None, inputs=None
    ):
        """Yields (name, activation) from input to output, layer by layer."""
        memory = None
        if source is not None:
            ids = None if source_mask is None else source_mask.astype(jnp.int32)
            ctx = self.context(source, None, ids, None, None, key)
            x = self.embed(source, positions_of(ctx, source.shape[1]), key)
            for index, memory in self.encoder.trace(x, ctx):
                yield f'encoder/layer_{index}', memory
            memory = self.encoder_norm(memory)
        ctx = self.context(tokens, positions, segment_ids, memory, source_mask, key, step, inputs)
        x, ctx = self.enter(tokens, ctx)
        yield 'embedding', x
        for index, y in self.body.trace(x, ctx):
            yield f'layer_{index}', y
        yield 'logits', self.read(self.norm(y[::2] if self.fixed else y), segment_ids)


def build(config: ModelConfig, *, rngs: nnx.Rngs) -> Transformer:
    """Builds the model; `jax.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))` costs no memory.

    Raises:
      ValueError: a mixer that is unknown or can't serve this kind of model, heads that do not divide the width, …
    """
    if config.output == 'pointer':
        from attnx.models.pointer import Pointer  # which builds on this file

        return Pointer(config, rngs=rngs)
    return Transformer(config, rngs=rngs)
