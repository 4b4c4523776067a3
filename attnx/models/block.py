"""One layer: token mixer, optional reader of a memory, MLP, each with norm and residual; and the unit that is scanned."""

import dataclasses

import jax
from flax import nnx

from attnx.models.config import Layer, ModelConfig
from attnx.nn import NORMS, dropout, mlp
from attnx.sharding import constrain
from attnx.spec import Context, Dims


def _fold(key, number):
    return None if key is None else jax.random.fold_in(key, number)


class Block(nnx.Module):
    """x -> x + mixer(norm x) -> … + cross(norm x) -> … + mlp(norm x); or post-norm: norm(x + f(x))."""

    def __init__(self, layer: Layer, model: ModelConfig, dims: Dims, *, rngs: nnx.Rngs, cross: Layer | None = None):
        norm = lambda: NORMS[model.norm](dims.width, dims, rngs=rngs)
        self.mixer = layer.spec.build(layer.config, dims, rngs=rngs)
        self.mixer_norm = norm()
        self.cross = None if cross is None else cross.spec.build(cross.config, dims, rngs=rngs)
        self.cross_norm = None if cross is None else norm()
        self.mlp = mlp.build(layer.mlp or model.mlp, dims, rngs=rngs)
        self.mlp_norm = None if self.mlp is None else norm()
        self.pre, self.rate = model.norm_position == 'pre', model.dropout

    def init_state(self, batch, capacity, dtype):
        part = lambda m: None if m is None else m.init_state(batch, capacity, dtype)
        return {'mixer': part(self.mixer), 'cross': part(self.cross)}

    def __call__(self, x, ctx: Context, state=None):
        """x [B, T, M] -> (x, next state, aux)."""
        new, aux = {}, {}
        state = state or {}
        for number, (name, part, norm) in enumerate(
            (('mixer', self.mixer, self.mixer_norm), ('cross', self.cross, self.cross_norm), ('mlp', self.mlp, self.mlp_norm))
        ):
            if part is None:
                continue
            key = _fold(ctx.key, number)
            inner = norm(x) if self.pre else x
            if name == 'mlp':
                y, more = part(inner, rate=self.rate, key=key, segment_ids=ctx.segment_ids)
            else:
                out = part(inner, dataclasses.replace(ctx, key=_fold(key, 0)), state.get(name))
                y, new[name], more = dropout(out.y, self.rate, _fold(key, 1)), out.state, out.aux
            for term, value in more.items():
                aux[term] = aux.get(term, 0.0) + value
            x = constrain(x + y.astype(x.dtype), ('batch', 'length', 'embed'))
            x = x if self.pre else norm(x)
        return x, ({'cross': None, **new} if state else None), aux


class Unit(nnx.Module):
    """The layers of one repeat of the pattern."""

    def __init__(self, layers, model: ModelConfig, dims: Dims, *, rngs: nnx.Rngs, cross: Layer | None = None):
        self.layers = nnx.List([Block(layer, model, dims, rngs=rngs, cross=cross) for layer in layers])

    def init_state(self, batch, capacity, dtype):
        return tuple(layer.init_state(batch, capacity, dtype) for layer in self.layers)

    def __call__(self, x, ctx: Context, state=None):
        """`ctx.layer` is the index of the first layer here."""
        states, total = [], {}
        for number, layer in enumerate(self.layers):
            index = ctx.layer + number
            inner = dataclasses.replace(ctx, layer=index, key=_fold(ctx.key, index))
            x, new, aux = layer(x, inner, None if state is None else state[number])
            states.append(new)
            total = {k: total.get(k, 0.0) + aux.get(k, 0.0) for k in {**total, **aux}}
        return x, (None if state is None else tuple(states)), total
