"""One layer: token mixer, optional reader of a memory, MLP, each with norm and residual; and the unit that is scanned."""

import dataclasses

import jax
from flax import nnx

from attnx.models.config import Layer, ModelConfig
from attnx.nn import NORMS, ShortConv, dropout, mlp
from attnx.nn.state import Recurrent
from attnx.sharding import constrain
from attnx.spec import Context, Dims, Output


def _fold(key, number):
    return None if key is None else jax.random.fold_in(key, number)


class Block(nnx.Module):
    """x -> x + mixer(norm x) -> … + cross(norm x) -> … + mlp(norm x); or post-norm: norm(x + f(x))."""

    def __init__(self, layer: Layer, model: ModelConfig, dims: Dims, key: jax.Array, *, cross: Layer | None = None):
        # Each part draws from a key of its own, so that another mixer leaves the MLP's initial values as they are.
        rngs = [nnx.Rngs(jax.random.fold_in(key, number)) for number in range(4)]
        norm = lambda: NORMS[model.norm](dims.width, dims, rngs=rngs[3])
        self.mixer = layer.spec.build(layer.config, dims, rngs=rngs[0])
        self.mixer_norm = norm()
        self.cross = None if cross is None else cross.spec.build(cross.config, dims, rngs=rngs[1])
        self.cross_norm = None if cross is None else norm()
        self.mlp = mlp.build(layer.mlp or model.mlp, dims, rngs=rngs[2])
        self.mlp_norm = None if self.mlp is None else norm()
        taps = model.conv_taps
        self.conv = ShortConv(dims.width, taps, dims, rngs=rngs[3], axis='embed', identity=True) if taps else None
        self.pre, self.rate = model.norm_position == 'pre', model.dropout

    def init_state(self, batch, capacity, dtype):
        part = lambda m: None if m is None else m.init_state(batch, capacity, dtype)
        conv = None if self.conv is None else Recurrent.init(self.conv.init_state(batch, dtype))
        return {'mixer': part(self.mixer), 'cross': part(self.cross), 'conv': conv}

    def __call__(self, x, ctx: Context, state=None) -> Output:
        """x [B, T, M] -> x after the layer, its next state, what it publishes."""
        new, aux, shared = {}, {}, {}
        state = state or {}
        for number, (name, part, norm) in enumerate(
            (('mixer', self.mixer, self.mixer_norm), ('cross', self.cross, self.cross_norm), ('mlp', self.mlp, self.mlp_norm))
        ):
            if part is None:
                continue
            key = _fold(ctx.key, number)
            inner = norm(x) if self.pre else x
            if name == 'mlp':
                y, more = part(inner, rate=self.rate, key=key, segment_ids=ctx.segment_ids, inputs=ctx.inputs)
            else:
                if name == 'mixer' and self.conv is not None:
                    inner, new['conv'] = self.shift(inner, ctx, state.get('conv'))
                out = part(inner, dataclasses.replace(ctx, key=_fold(key, 0)), state.get(name))
                y, new[name], more = dropout(out.y, self.rate, _fold(key, 1)), out.state, out.aux
                shared |= out.shared
            for term, value in more.items():
                aux[term] = aux.get(term, 0.0) + value
            x = constrain(x + y.astype(x.dtype), ('batch', 'length', 'embed'))
            x = x if self.pre else norm(x)
        return Output(x, {'cross': None, 'conv': None, **new} if state else None, aux, shared)

    def shift(self, x, ctx: Context, state):
        """The short convolution before the mixer: x [B, T, M] -> (y, next state)."""
        window, ids = (None, ctx.segment_ids) if state is None else state.resume(ctx, *x.shape[:2])
        y, window = self.conv(x, window, ids, ctx.impl)
        return y, None if state is None else state.advance(window, ids)


class Unit(nnx.Module):
    """The layers of one repeat of the pattern."""

    def __init__(self, layers, model: ModelConfig, dims: Dims, keys: jax.Array, *, cross: Layer | None = None):
        self.layers = nnx.List([Block(layer, model, dims, key, cross=cross) for layer, key in zip(layers, keys)])

    def init_state(self, batch, capacity, dtype):
        return tuple(layer.init_state(batch, capacity, dtype) for layer in self.layers)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        """`ctx.layer` is the index of the first layer here."""
        states, total, shared = [], {}, {}
        for number, layer in enumerate(self.layers):
            index = ctx.layer + number
            inner = dataclasses.replace(ctx, layer=index, key=_fold(ctx.key, index), shared={**ctx.shared, **shared})
            x, new, aux, more = layer(x, inner, None if state is None else state[number])
            states.append(new)
            total = {k: total.get(k, 0.0) + aux.get(k, 0.0) for k in {**total, **aux}}
            shared |= more
        return Output(x, None if state is None else tuple(states), total, shared)
