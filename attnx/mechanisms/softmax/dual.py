"""Dual attention: sensory heads carry values, relational heads carry relations between two tokens and a symbol of the sender.

Equation: sensory head: o_i = sum_j a_ij W_v x_j;  relational head h: o_i = W_r,h sum_j a_ij r_ij + sum_j a_ij W_s,h s_j,
    a = softmax(H^-1/2 q k^T) with projections of its own, relations r_ij,l = D^-1/2 (W_q,l x_i) . (W_k,l x_j) shared by the
    heads, l = 1 … R, R D = Nr H.  y = [W_o sensory ; W_o' relational].
    Symbols: s_j = sum_n softmax_n(D^-1/2 (W x_j + b) . template_n) symbol_n in a few heads, or a table row of the position,
    or of the distance: s_ij, row clip(j - i, -L, L).
    Computed as sum_j a_ij r_ij,l = D^-1/2 (W_q,l x_i) . sum_j a_ij W_k,l x_j: no [T, T, R] array.
Paper: Disentangling and integrating relational and sensory information in transformer architectures, 2024,
    arXiv 2405.16727.
Differs: a retriever reads the layer's normed input, the paper's the input before its norm; the paper's one retriever of all
    layers is retriever = 'shared' in all but the first. Relations have no activation (only then can the sum be taken first).
Cost: train O(T²) time, O(T) memory through the fused op, relational values being (Nr + 1) H wide; with symbols of distances
    relational heads run in XLA, some rows at a time, masked pairs too. Decode keeps 2 H numbers a token and sensory head, 3 H a
    relational one.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attnx.nn import Linear, merge_heads, normal, param, positions, relative, softmax, split_heads
from attnx.ops.weighted_attention import by_rows, evaluate, index_of, num_rows, products, read, thinned
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(softmax.Options):
    sensory_heads: int = 2  # Ns: ordinary heads
    relational_heads: int = 2  # Nr; H = width / (Ns + Nr)
    num_relations: int = 0  # R, which divides Nr H; 0: Nr
    symmetric: bool = False  # relations of i to j and of j to i are one: W_q,l = W_k,l
    symbols: str = 'symbolic'  # symbolic: retrieved by content; positional: one a position; relative: one a distance
    num_symbols: int = 16  # symbolic: size of the library; relative: L, distances told apart on each side
    symbol_heads: int = 2  # heads that retrieve symbols; divides the width
    retriever: str = 'own'  # of symbols: own; shared: that of an earlier layer of the same `symbols`

    def __post_init__(self):
        super().__post_init__()
        softmax.check_choice('symbols', self.symbols, ('symbolic', 'positional', 'relative'))
        if min(self.sensory_heads, self.relational_heads) < 0 or self.sensory_heads + self.relational_heads < 1:
            raise ValueError('sensory_heads and relational_heads must not be negative, nor both 0')
        if min(self.num_symbols, self.symbol_heads) < 1 or self.num_relations < 0:
            raise ValueError('num_symbols and symbol_heads must be at least 1, num_relations at least 0')
        if self.symbols != 'symbolic':
            softmax.refuse(self, 'symbols of positions are looked up, not retrieved', 'symbol_heads')
        if self.symbols == 'positional':
            softmax.refuse(self, 'there is one symbol for each position', 'num_symbols')
        softmax.check_choice('retriever', self.retriever, ('own', 'shared'))
        if self.retriever == 'shared':
            softmax.refuse(self, 'an earlier layer has the retriever', 'num_symbols', 'symbol_heads')
        if not self.relational_heads:
            of_relations = 'num_relations', 'symmetric', 'symbols', 'num_symbols', 'symbol_heads', 'retriever'
            softmax.refuse(self, 'there are no relational heads', *of_relations)


class Symbols(nnx.Module):
    """x [B, T, M] at positions [B or 1, T] -> symbols [B, T, M]."""

    def __init__(self, config: Config, dims: Dims, *, rngs):
        width, self.num_heads, self.kind = dims.width, config.symbol_heads, config.symbols
        softmax.heads_of(config.symbol_heads, 0, width)
        table = lambda rows: param(normal(rngs, (rows, width), 1.0, dims.param_dtype), ('features', 'embed'))
        content = config.symbols == 'symbolic'
        self.query = Linear(width, width, ('embed', 'heads'), dims, rngs=rngs, bias=True) if content else None
        self.templates = table(config.num_symbols) if content else None
        sizes = {'symbolic': config.num_symbols, 'positional': dims.max_length, 'relative': 2 * config.num_symbols + 1}
        self.library = table(sizes[config.symbols])

    def __call__(self, x, where):
        library = self.library[...].astype(x.dtype)
        if self.query is None:
            found = library.at[where].get(mode='fill', fill_value=jnp.nan)
            return jnp.broadcast_to(found, x.shape)
        query, key = (split_heads(a, self.num_heads) for a in (self.query(x), self.templates[...].astype(x.dtype)))
        logits = jnp.einsum('btnh,snh->btns', query, key, preferred_element_type=jnp.float32) * key.shape[-1] ** -0.5
        weights = jax.nn.softmax(logits).astype(x.dtype)
        return merge_heads(jnp.einsum('btns,snh->btnh', weights, split_heads(library, self.num_heads)))


class DualAttention(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype, width = config, dims.dtype, dims.width
        n, r = config.sensory_heads, config.relational_heads
        self.head_dim = h = softmax.heads_of(n + r, 0, width)
        self.relations = config.num_relations or r
        if r and r * h % self.relations:
            raise ValueError(f'num_relations {self.relations} does not divide relational_heads {r} times their width {h}')
        into = lambda count: Linear(width, count * h, ('embed', 'heads'), dims, rngs=rngs)
        scale = (2 * dims.num_layers) ** -0.5
        out = lambda count: Linear(count * h, count * h, ('heads', None), dims, rngs=rngs, scale=scale)
        core = lambda count: softmax.Core(config, dims, count, h, rngs=rngs)
        if n:
            self.query, self.key, self.value = into(n), into(n), into(n)
            self.out, self.core = out(n), core(n)
        if r:
            self.relation_query, self.relation_key = into(r), None if config.symmetric else into(r)
            self.sender = into(r)
            self.symbols = Symbols(config, dims, rngs=rngs) if config.retriever == 'own' else None
            self.attend_query, self.attend_key = into(r), into(r)
            shape = (r, self.relations, h)
            read = normal(rngs, shape, self.relations**-0.5, dims.param_dtype)
            self.read = param(read, ('heads', None, 'head_dim'))
            self.relation_out, self.relation_core = out(r), core(r)

    def init_state(self, batch, capacity, dtype=None):
        n, r, h, dtype = self.config.sensory_heads, self.config.relational_heads, self.head_dim, dtype or self.dtype
        sensory = self.core.init_state(batch, capacity, ((n, h),) * 2, dtype) if n else ()
        shapes = (r, h), (self.relations, r * h // self.relations)
        shapes += ((r, h),) if self.config.symbols != 'relative' else ()
        return sensory, self.relation_core.init_state(batch, capacity, shapes, dtype) if r else ()

    def __call__(self, x, ctx: Context, state=None) -> Output:
        sensory, relational = (None, None) if state is None else state
        parts, shared = [], {}
        if self.config.sensory_heads:
            heads = (split_heads(f(x), self.config.sensory_heads) for f in (self.query, self.key, self.value))
            out, sensory = self.core(*heads, ctx, sensory)
            parts.append(self.out(merge_heads(out)))
        if self.config.relational_heads:
            key = None if ctx.key is None else jax.random.fold_in(ctx.key, 1)
            symbols = self.symbols
            if symbols is None:
                symbols = ctx.published('retriever')
                if symbols.kind != self.config.symbols:
                    raise ValueError(f'symbols {self.config.symbols!r}: the shared retriever has {symbols.kind!r} ones')
            else:
                shared = {'retriever': symbols}
            out, relational = self.relate(x, symbols, dataclasses.replace(ctx, key=key), relational)
            parts.append(self.relation_out(merge_heads(out)))
        return Output(jnp.concatenate(parts, axis=-1), None if state is None else (sensory, relational), shared=shared)

    def relate(self, x, symbols, ctx, state):
        """The relational heads: (out [B, T, Nr, H], next state)."""
        r, core = self.config.relational_heads, self.relation_core
        query, key = (split_heads(f(x), r) for f in (self.attend_query, self.attend_key))
        sender = split_heads(self.relation_query(x), self.relations)
        receiver = sender if self.relation_key is None else split_heads(self.relation_key(x), self.relations)
        where = positions(ctx, x.shape[1], 0 if state is None else state.index)
        far = self.config.symbols == 'relative'
        symbol = () if far else (split_heads(self.sender(symbols(x.astype(self.dtype), where)), r),)
        query, keys, state = core.extend(query, key, (receiver, *symbol), ctx, state)
        key, receiver, *symbol = keys.arrays
        shared = jnp.broadcast_to(merge_heads(receiver)[:, :, None], (*key.shape[:3], r * self.head_dim))
        if far:
            met, carried = self.read_by_distance(query, key, shared, keys, ctx, symbols.library[...])
        else:
            value = jnp.concatenate([shared, *symbol], axis=-1)
            out = core.attend(query, key, value, ctx, core.mask(keys), core.score(keys))
            met, carried = jnp.split(out, [r * self.head_dim], axis=-1)
        met = split_heads(met, self.relations)  # [B, T, Nr, R, D]
        relation = jnp.einsum('btnrd,btrd->btnr', met, sender) * met.shape[-1] ** -0.5
        return carried + jnp.einsum('btnr,nrh->btnh', relation, self.read[...].astype(relation.dtype)), state

    def read_by_distance(self, query, key, value, keys, ctx, library):
        """(weighted values, weighted symbols of distances), [B, T, Nr, …], some rows of pairs at a time."""
        (batch, length, n, _), size, core, reach = query.shape, keys.length, self.relation_core, library.shape[0] // 2
        table = split_heads(self.sender(library.astype(self.dtype)), n)  # [2 L + 1, Nr, H]
        mask, score, weights, dropout = core.mask(keys), core.score(keys), core.weights(), core.dropout(ctx)
        key, value = key.astype(query.dtype), value.astype(query.dtype)

        def step(carry, first, query):
            i = index_of(batch, query.shape[1], length, size, n, first)
            s = evaluate(score, i, products(query, key, core.options.scale or None))
            w = thinned(weights(s, evaluate(mask, i), i), i, dropout)
            bucket = jnp.clip(relative.distances(keys, i), -reach, reach)[0, 0] + reach
            hot = (bucket[..., None] == jnp.arange(2 * reach + 1)).astype(query.dtype)
            summed = jnp.einsum('bnts,tsl->bntl', w.astype(query.dtype), hot)
            return carry, (read(w, value), jnp.einsum('bntl,lnh->btnh', summed, table))

        return by_rows(step, (), query, num_rows(size * (batch * n + 2 * reach + 1), length))[1]


def _flops(config, dims, length):
    n, r = config.sensory_heads, config.relational_heads
    h = dims.width // (n + r)
    return softmax.flops(n, h, dims, length) + softmax.flops(r, h, dims, length, value_dim=(r + 1) * h)


SPEC = Spec(
    module=DualAttention,
    config=Config,
    paper='2405.16727',
    ops=('softmax_attention',),
    state='kv',
    example=Config(num_symbols=6),
    publishes=lambda config: ('retriever',) if config.relational_heads and config.retriever == 'own' else (),
    reads=lambda config: ('retriever',) if config.retriever == 'shared' else (),
    flops=_flops,
)
