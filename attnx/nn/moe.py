"""A mixture of experts in the place of an MLP: a router sends each token to the `top_k` best of many small MLPs.

    p = softmax(x W_r)      chosen = top_k(p)      y = Σ_{e in chosen} w_e expert_e(x)

w is p over the chosen, made to sum to 1; with one expert a token w is p itself (Switch), else the router would learn nothing.
`gates` 'plain' is p itself too (Mod-Squad, arXiv:2212.08066); 'select' counts the chosen once each, p having the gradient of a
factor 1 (union of experts, arXiv:2503.02495, whose experts are parts of one MLP).

Two more routings of union of experts look ahead, for encoders of one document a row: with a capacity and `order` 'probability'
experts take, of the tokens that chose them, those of highest p (its data selection: capacity 1, top_k E / 2); with `router`
'row' p = softmax(sum_t x_t W_t), and all tokens go to the row's top_k experts (its expert selection).

With `tasks` > 1 each task has a router of its own, read by the side input `task` int32 [B, T], and a third loss

    task_loss       minus the mutual information of task and expert in the batch, nats, times task_weight (arXiv:2306.17165)

Two losses keep the router in shape; both come back as auxiliary losses, already weighted (and are summed over layers, as is
`expert_load`, the largest share of choices times E):

    router_z_loss   mean over tokens of logsumexp(x W_r)²                          (ST-MoE, arXiv:2202.08906)
    balance_loss    E Σ_e f_e mean_t p_te, f_e the share of choices that e got; 1 when even   (Switch, arXiv:2101.03961)

Dropless (`capacity` 0): tokens are sorted by expert and each matrix is one ragged product (MegaBlocks, arXiv:2211.15841).
Over an expert axis of the mesh, tokens and choices are gathered along it, each device serves its own experts, and the sums
are scattered back. With a capacity c > 0 an expert takes at most ⌈c top_k T / E⌉ choices of each row, first choices first,
then by position; what is over is dropped, so that those tokens pass by the layer on the residual. Shapes are then fixed,
and tokens go to the experts' devices and back by two all-to-alls (GShard, arXiv:2006.16668).
"""

import math
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from attnx import sharding
from attnx.nn import routing
from attnx.nn.layers import dropout
from attnx.nn.params import normal, param
from attnx.ops.parallel import layout, shard_map
from attnx.sharding import constrain
from attnx.spec import Context, Dims


class Routes(NamedTuple):
    """Where each token goes: experts int32 [B, T, k], weights float32 [B, T, k], and the probabilities [B, T, E]."""

    experts: jax.Array
    weights: jax.Array
    probabilities: jax.Array


def route(logits: jax.Array, top_k: int, gates: str = 'normed') -> Routes:
    """The `top_k` best experts of router logits, float32 [B, T, E]; gates: normed, plain, select."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, experts = lax.top_k(probabilities, top_k)
    if gates == 'select':
        weights = 1 + weights - lax.stop_gradient(weights)
    elif gates == 'normed' and top_k > 1:
        weights = weights / weights.sum(-1, keepdims=True)
    return Routes(experts, weights, probabilities)


def losses(logits: jax.Array, routes: Routes, real: jax.Array) -> dict[str, jax.Array]:
    """Unweighted router_z_loss, balance_loss, and expert_load, the largest share of choices times E (1 is even).

    real: bool [B, T]; padding counts for nothing.
    """
    count = jnp.maximum(real.sum(), 1)
    chosen = jax.nn.one_hot(routes.experts, logits.shape[-1]).mean(axis=2)  # [B, T, E]
    mean = lambda x: jnp.where(real[..., None], x, 0).sum((0, 1)) / count
    share = lax.stop_gradient(mean(chosen))
    z = jnp.where(real, jnp.square(jax.nn.logsumexp(logits, axis=-1)), 0).sum() / count
    return {
        'router_z_loss': z,
        'balance_loss': logits.shape[-1] * (share * mean(routes.probabilities)).sum(),
        'expert_load': logits.shape[-1] * share.max(),
    }


def slots_by_probability(routes: Routes, real: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """As `slots`, an expert's slots going to the tokens of highest probability among those that chose it."""
    chosen = jnp.any(routes.experts[..., None] == jnp.arange(routes.probabilities.shape[-1]), axis=2) & real[..., None]
    order = jnp.argsort(jnp.where(chosen, -routes.probabilities, 1), axis=1, stable=True)  # [B, T, E]
    place = jnp.take_along_axis(jnp.argsort(order, axis=1), routes.experts, axis=2)
    return place, (place < capacity) & real[..., None]


def slots(experts: jax.Array, real: jax.Array, num_experts: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """(which slot of its expert each choice takes: int32 [B, T, k], whether it has one: bool [B, T, k])."""
    chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.int32) * real[..., None, None]  # [B, T, k, E]
    B, T, k, E = chosen.shape
    ordered = chosen.swapaxes(1, 2).reshape(B, k * T, E)
    place = jnp.cumsum(ordered, axis=1) - ordered
    place = (place * ordered).sum(-1).reshape(B, k, T).swapaxes(1, 2)
    return place, (place < capacity) & real[..., None]


class MoE(nnx.Module):
    """Experts of one kind: gated or plain MLPs without biases; x [B, T, M]."""

    def __init__(self, config, dims: Dims, activation, gated: bool, *, rngs: nnx.Rngs):
        self.config, self.activation, self.dtype = config, activation, dims.dtype
        E, M, hidden = config.experts, dims.width, config.width(dims.width)
        into = lambda: param(normal(rngs, (E, M, hidden), M**-0.5, dims.param_dtype), ('expert', 'embed', 'mlp'))
        rows = config.router == 'row'
        several = dims.max_length if rows else config.tasks if config.tasks > 1 else 0  # matrices of places, or tasks
        shape, names = ((several,), (None,)) if several else ((), ())
        scale = (dims.max_length * M if rows else M) ** -0.5
        self.router = param(normal(rngs, (*shape, M, E), scale, dims.param_dtype), (*names, 'embed', 'features'))
        self.up = into()
        self.gate = into() if gated else None
        scale = (2 * dims.num_layers * hidden) ** -0.5
        self.down = param(normal(rngs, (E, hidden, M), scale, dims.param_dtype), ('expert', 'mlp', 'embed'))

    def __call__(self, x, *, rate: float = 0.0, key: jax.Array | None = None, segment_ids=None, inputs=MappingProxyType({})):
        """x [B, T, M] -> (y [B, T, M], aux); inputs: side inputs, of which routers of tasks read 'task'."""
        config = self.config
        real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids > 0
        logits = self.logits(x.astype(jnp.float32), inputs, real)
        routes = route(logits, config.top_k, config.gates)
        aux = losses(logits, routes, real)
        aux |= {'router_z_loss': config.router_z * aux['router_z_loss'], 'balance_loss': config.balance * aux['balance_loss']}
        if config.tasks > 1:
            told = routing.mutual_information(inputs['task'], routes.probabilities, config.tasks, segment_ids)
            aux['task_loss'] = -config.task_weight * told
        x = x.astype(self.dtype)
        matrices = {'up': self.up, 'gate': self.gate, 'down': self.down}
        matrices = {name: m[...].astype(self.dtype) for name, m in matrices.items() if m is not None}
        if config.capacity:
            limit = max(1, math.ceil(config.capacity * config.top_k * x.shape[1] / config.experts))
            if config.order == 'probability':
                place, kept = slots_by_probability(routes, real, limit)
            else:
                place, kept = slots(routes.experts, real, config.experts, limit)
            y = self.fixed(x, routes, place, kept, limit, matrices)
            aux['expert_dropped'] = jnp.where(real[..., None], ~kept, False).sum() / jnp.maximum(real.sum() * config.top_k, 1)
        else:
            y = self.dropless(x, routes, matrices)
        return dropout(y.astype(self.dtype), rate, key), aux

    def logits(self, x, inputs, real):
        """float32 [B, T, E] of the router, or of each token's task's; NaN for a task that does not exist."""
        router = self.router[...].astype(jnp.float32)
        if self.config.router == 'row':
            head = jnp.where(real[..., None], x, 0)[:, : router.shape[0]]  # cut, or filled with zeros, to the router's length
            row = jnp.einsum('btm,tme->be', head, router[: head.shape[1]], precision='highest')
            return jnp.broadcast_to(row[:, None], (*x.shape[:2], row.shape[-1]))
        if router.ndim == 2:
            return jnp.matmul(x, router, precision='highest')
        task = Context(inputs=inputs).side('task')
        every = jnp.einsum('btm,nme->btne', x, router, precision='highest')
        return jnp.take_along_axis(every, task[:, :, None, None], axis=2, mode='fill')[:, :, 0]

    def expert(self, product, x, matrices):
        hidden = self.activation(product(x, matrices['gate' if 'gate' in matrices else 'up']))
        return product(hidden * product(x, matrices['up']) if 'gate' in matrices else hidden, matrices['down'])

    def dropless(self, x, routes: Routes, matrices):
        """Every choice served: rows sorted by expert, one ragged product a matrix."""
        if (active := sharding.active()) is None:
            return self.serve(x, routes.experts, routes.weights, matrices, 0)
        where = layout(x.shape[0], x.shape[1])
        rows, tokens, axis = where.rows or None, where.context, 'expert'
        sizes, mapping, _ = active
        across = tuple(a for a in sharding.axes_of(mapping, 'mlp') if sizes[a] > 1)
        spread = self.config.experts % sizes[axis] == 0 and sizes[axis] > 1
        gathers = spread and axis in where.rows

        def body(x, experts, weights, matrices):
            if gathers:
                x, experts, weights = (lax.all_gather(a, axis, axis=0, tiled=True) for a in (x, experts, weights))
            first = lax.axis_index(axis) * matrices['up'].shape[0] if spread else 0
            y = self.serve(x, experts, weights, matrices, first)
            y = lax.psum(y, across) if across else y
            if gathers:
                return lax.psum_scatter(y, axis, scatter_dimension=0, tiled=True)
            return lax.psum(y, axis) if spread else y

        cut = P(rows, tokens)
        into, out = P(axis if spread else None, None, across or None), P(axis if spread else None, across or None)
        specs = {name: out if name == 'down' else into for name in matrices}
        return shard_map(body, (cut, cut, cut, specs), cut)(x, routes.experts, routes.weights, matrices)

    def serve(self, x, experts, weights, matrices, first):
        """What the experts `first`, first + 1, … of `matrices` add: float32 [B, T, M]; other choices add 0."""
        (B, T, M), k, count = x.shape, experts.shape[2], matrices['up'].shape[0]
        flat = experts.reshape(-1) - first
        flat = jnp.where((flat >= 0) & (flat < count), flat, count)  # others go last
        order = jnp.argsort(flat, stable=True)
        sizes = (flat[:, None] == jnp.arange(count)).sum(0, dtype=jnp.int32)
        sorted_rows = jnp.repeat(x.reshape(B * T, M), k, axis=0)[order]
        ours = (flat[order] < count)[:, None]  # rows beyond the groups hold anything
        sorted_rows = jnp.where(ours, sorted_rows, 0)
        y = self.expert(lambda a, b: lax.ragged_dot(a, b, sizes), sorted_rows, matrices)
        y = jnp.where(ours, y, 0)[jnp.argsort(order)].reshape(B, T, k, M)
        return jnp.einsum('btkm,btk->btm', y.astype(jnp.float32), weights)

    def fixed(self, x, routes: Routes, place, kept, limit: int, matrices):
        """Choices with a slot served, in arrays [E, B, slots, M]."""
        B, T, _ = x.shape
        E, k = self.config.experts, routes.experts.shape[2]
        at = jnp.where(kept, routes.experts * limit + place, E * limit)  # dropped: past the end
        token = jnp.broadcast_to(jnp.arange(T)[:, None], (T, k))
        index = jax.vmap(lambda at: jnp.full((E * limit + 1,), T).at[at].set(token))(at)[:, :-1]  # [B, E slots], T: empty
        padded = jnp.pad(x, ((0, 0), (0, 1), (0, 0)))
        taken = jnp.take_along_axis(padded, index[..., None], axis=1).reshape(B, E, limit, -1)
        taken = constrain(taken.swapaxes(0, 1), ('expert', 'batch', None, 'embed'))
        y = self.expert(lambda a, b: jnp.einsum('ebsm,emh->ebsh', a, b), taken, matrices)
        y = constrain(y, ('expert', 'batch', None, 'embed')).swapaxes(0, 1).reshape(B, E * limit, -1)
        y = constrain(jnp.pad(y, ((0, 0), (0, 1), (0, 0))), ('batch', None, 'embed'))
        back = jnp.take_along_axis(y, at.reshape(B, T * k)[..., None], axis=1).reshape(B, T, k, -1)
        return jnp.einsum('btkm,btk->btm', back.astype(jnp.float32), jnp.where(kept, routes.weights, 0))
