"""A model that points: an encoder reads objects that lie on a grid, a decoder says one after another which is looked at next.

    object    [content ; P(row) ; P(column) ; P(flag)], flag 1 of the last slot, which holds the object searched for, else 0
    decoder   a start token in the middle of the grid, then the objects looked at so far; sinusoids of their order are added
    logits_j  sum_h w_h (W_d,h dec) . (W_e,h enc_j) / sqrt(M) + b over the slots, and over one more, whose products are 0

The last slot ends the sequence. Places have a fixed table P, in which the cosine of two rows i and j is exp(-(i - j)² / 2 σ²),
exactly where a place has as many channels as there are rows. Nothing else tells objects apart: with mixers of the encoder that
know no positions, their order does not matter.

Paper: OAT: object-level attention transformer for gaze scanpath prediction, 2024, arXiv 2407.13335. Differs: content is a table
of kinds, where the paper has a network of image patches; P is an eigendecomposition, which the paper fits by gradient descent;
blocks are pre-norm unless `norm_position` says otherwise.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from attnx import ops
from attnx.models.config import ModelConfig
from attnx.models.transformer import ModelOutput, Transformer
from attnx.nn import Linear, dropout, normal, param, split_heads
from attnx.nn.state import positions as positions_of
from attnx.sharding import constrain
from attnx.spec import Context

HEADS = 2  # of the output
START = 0  # the token before the first object; 1 + j is object j


class Pointer(Transformer):
    """The model of a `ModelConfig` of kind encoder_decoder whose `output` is 'pointer'."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        dims = config.dims(causal=True, num_layers=config.num_layers)
        width = self.width = dims.width
        self.kind, half = 'pointer', width // 2
        self.embedding = param(normal(rngs, (config.vocab_size, half), 1.0), ('vocab', 'embed'))
        self.start = param(normal(rngs, (half,), 1.0), ('embed',))
        self.grid, self.code_width = config.grid, -(-(width - half) // 3)
        into = lambda: Linear(width, HEADS * width, ('embed', 'heads'), dims, rngs=rngs)
        self.point, self.place = into(), into()
        self.mixture = param(jnp.full((HEADS,), 1 / HEADS), (None,))
        self.mixture_bias = param(jnp.zeros((1,)), (None,))

    def objects(self, source, places):
        """Kinds int32 [B, S] at (row, column, flag) int32 [B, S, 3] -> [B, S, M]."""
        if places.shape != (*source.shape, 3):
            raise ValueError(f"the side input 'places' must be {[*source.shape, 3]}, was given {list(places.shape)}")
        return self.join(self.embedding[...].astype(self.dtype)[source], places)

    def join(self, content, places):
        table = jnp.asarray(ops.positions.gaussian(max(self.grid, 2), self.code_width), self.dtype)
        code = table[places].reshape(*places.shape[:-1], -1)
        return jnp.concatenate([content, code[..., : self.width - content.shape[-1]]], axis=-1)

    def fixated(self, tokens, objects, positions, key=None):
        """Tokens int32 [B, T], of objects [B, S, M] -> the decoder's input [B, T, M]."""
        middle = jnp.array([self.grid // 2, self.grid // 2, 0])
        first = self.join(self.start[...].astype(self.dtype)[None, None], middle[None, None])
        known = jnp.concatenate([jnp.broadcast_to(first, (objects.shape[0], 1, objects.shape[2])), objects], axis=1)
        x = jnp.take_along_axis(known, tokens[..., None], axis=1)
        x = x + ops.positions.sinusoidal(positions, x.shape[-1]).astype(x.dtype)
        return constrain(dropout(x, self.rate, key), ('batch', 'length', 'embed'))

    def encode(self, inputs, *, mask=None, key=None):
        """Objects [B, S, M] -> (the memory that the decoder reads, aux)."""
        ctx = self.context(None, None, None if mask is None else mask.astype(jnp.int32), None, None, key)
        x, _, aux = self.encoder(inputs, ctx)
        return self.encoder_norm(x), aux

    def slots(self, x, memory, mask=None):
        """Float32 logits [B, T, S + 1] of the decoder's output; slots that are no objects are never pointed at."""
        query, key = split_heads(self.point(x), HEADS), split_heads(self.place(memory), HEADS)
        s = jnp.einsum('bthc,bshc->bhts', query, key, preferred_element_type=jnp.float32) * x.shape[-1] ** -0.5
        s = jnp.pad(s, ((0, 0), (0, 0), (0, 0), (0, 1)))
        logits = jnp.einsum('bhts,h->bts', s, self.mixture[...].astype(jnp.float32)) + self.mixture_bias[...]
        if mask is None:
            return logits
        return jnp.where(jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True)[:, None], logits, -1e9)

    def __call__(
        self, tokens, *, source=None, source_mask=None, objects=None, memory=None, positions=None, segment_ids=None, key=None,
        step=None, inputs=None, state=None,
    ) -> ModelOutput:  # fmt: skip
        """tokens int32 [B, T] -> logits [B, T, S + 1] over the S slots of `source`, and none of them.

        Args: those of `Transformer`; the side input `places` int32 [B, S, 3] goes with the source. In decoding, `objects`
          and `memory` stand in its place, as `objects` and `encode` give them.
        """
        aux = {}
        if source is not None:
            objects = self.objects(source, Context(inputs=inputs or {}).side('places'))
            memory, aux = self.encode(objects, mask=source_mask, key=key)
        if objects is None or memory is None:
            raise ValueError('a model that points reads objects: give source [B, S] and the side input places [B, S, 3]')
        ctx = self.context(tokens, positions, segment_ids, memory, source_mask, key, step, inputs)
        x = self.fixated(tokens, objects, positions_of(ctx, tokens.shape[1]), key)
        x, state, more = self.body(x, ctx, state)
        aux = {k: aux.get(k, 0.0) + more.get(k, 0.0) for k in {**aux, **more}}
        return ModelOutput(self.slots(self.norm(x), memory, source_mask), state, aux)

    def trace(self, tokens, *, source, source_mask=None, positions=None, segment_ids=None, key=None, step=None, inputs=None):
        """Yields (name, activation) from input to output, layer by layer."""
        ids = None if source_mask is None else source_mask.astype(jnp.int32)
        objects = memory = self.objects(source, Context(inputs=inputs or {}).side('places'))
        for index, memory in self.encoder.trace(objects, self.context(None, None, ids, None, None, key)):
            yield f'encoder/layer_{index}', memory
        memory = self.encoder_norm(memory)
        ctx = self.context(tokens, positions, segment_ids, memory, source_mask, key, step, inputs)
        start = self.fixated(tokens, objects, positions_of(ctx, tokens.shape[1]), key)
        yield 'embedding', start
        for index, x in self.body.trace(start, ctx):
            yield f'layer_{index}', x
        yield 'logits', self.slots(self.norm(x), memory, source_mask)


@functools.partial(jax.jit, static_argnames='steps')
def scanpath(model: Pointer, source, places, *, steps: int, source_mask=None, key: jax.Array | None = None):
    """Which objects are looked at: int32 [B, steps], the last slot S - 1 from the end on; the first is an object.

    Args:
      source, places: kinds int32 [B, S] and where they lie, int32 [B, S, 3].
      key: of sampling; None: the likeliest.
    """
    objects = model.objects(source, places)
    memory, _ = model.encode(objects, mask=source_mask)
    size = source.shape[1]
    token, state = jnp.full((source.shape[0], 1), START), model.init_state(source.shape[0], steps)
    found, ended = [], jnp.zeros(source.shape[0], bool)
    for number in range(steps):
        at = jnp.full_like(token, number)
        out = model(token, objects=objects, memory=memory, source_mask=source_mask, positions=at, state=state)
        logits, state = out.logits[:, -1, :size], out.state
        logits = logits.at[:, -1].set(-jnp.inf) if number == 0 else logits
        drawn = jnp.argmax(logits, -1) if key is None else jax.random.categorical(jax.random.fold_in(key, number), logits)
        drawn = jnp.where(ended, size - 1, drawn).astype(jnp.int32)
        ended = ended | (drawn == size - 1)
        found.append(drawn)
        token = 1 + drawn[:, None]
    return jnp.stack(found, axis=1)
