"""Task-routed attention experts: a router for each task chooses experts of queries and outputs over one shared key/value head.

Equation: p = softmax(W_r,task x) + 1e-4;  y = sum over the K experts of largest p of p_e W_o,e o_e,
    o_e = softmax(H^-1/2 (W_q,e x) k^T) v.  Loss: -w sum_te P_te log(P_te / (P_t P_e)), P_te the share of task t's tokens'
    p_e in the batch: it makes each task use few experts and all tasks together all of them.
Paper: An efficient general-purpose modular vision model via multi-task heterogeneous training, 2023, arXiv 2306.17165;
    Mod-Squad, 2022, arXiv 2212.08066.
Differs: the layer is Mod-Squad's, which the paper scales up; its MLP experts are `model.mlp` of kind 'moe' with `tasks`. P is a
    batch's, which must mix tasks: over a batch of one task the loss is 0. The task is given token by token, so that a packed
    row may hold several.
Cost: train O(T²) time with K heads, O(T) memory, through the fused op; projections of chosen experts alone where the platform
    has a ragged product (XLA on CPU computes all and drops); logits of all tasks' routers. Decode keeps 2 H numbers a token.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from attnx.nn import Linear, normal, param, routing, softmax
from attnx.spec import Context, Dims, Mixer, Output, Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(softmax.Options):
    num_tasks: int = 1  # the side input `task` is in [0, num_tasks); of one it may be absent
    num_experts: int = 12  # E
    top_k: int = 6  # K: experts of a token
    sample_top_k: int = 0  # how many of the K are drawn from p in training
    head_dim: int = 0  # H; 0: width / top_k, rounded down to even
    task_weight: float = 5e-4  # w: of the loss that ties tasks to experts, in the training loss
    visible: tuple = ()  # experts of each task: task t chooses among the first visible[t]; (): all

    def __post_init__(self):
        super().__post_init__()
        least = min(self.visible or (self.num_experts,))
        if self.num_tasks < 1 or not 1 <= self.top_k <= least or not 0 <= self.sample_top_k <= self.top_k:
            raise ValueError(
                f'top_k {self.top_k} must be 1 … {least}, the experts that a task sees; '
                f'sample_top_k {self.sample_top_k} 0 … top_k; num_tasks {self.num_tasks} at least 1'
            )
        if self.head_dim < 0:
            raise ValueError(f'head_dim {self.head_dim} must not be negative')
        if self.num_tasks == 1:
            softmax.refuse(self, 'one task tells nothing of experts, so the loss would be 0', 'task_weight')
        if self.visible and (len(self.visible) != self.num_tasks or max(self.visible) > self.num_experts):
            raise ValueError(f'visible {self.visible}: one number for each of {self.num_tasks} tasks, up to num_experts')


class TaskExperts(Mixer):
    def __init__(self, config: Config, dims: Dims, *, rngs):
        self.config, self.dtype, width, e = config, dims.dtype, dims.width, config.num_experts
        self.head_dim = h = config.head_dim or max(width // config.top_k // 2 * 2, 2)
        make = lambda shape, axes, scale: param(normal(rngs, shape, scale * shape[1] ** -0.5, dims.param_dtype), axes)
        zero = jnp.zeros((config.num_tasks, width, e), dims.param_dtype)
        self.router = param(zero, (None, 'embed', 'expert'))
        self.query = make((e, width, h), ('expert', 'embed', 'head_dim'), 1.0)
        self.key = Linear(width, h, ('embed', 'head_dim'), dims, rngs=rngs, bias=True)
        self.value = Linear(width, h, ('embed', 'head_dim'), dims, rngs=rngs, bias=True)
        self.out = make((e, h, width), ('expert', 'head_dim', 'embed'), (2 * dims.num_layers) ** -0.5)
        self.core = softmax.Core(config, dims, config.top_k, h, rngs=rngs)

    def init_state(self, batch, capacity, dtype=None):
        shape = (1, self.head_dim)
        return self.core.init_state(batch, capacity, (shape, shape), dtype or self.dtype)

    def __call__(self, x, ctx: Context, state=None) -> Output:
        x = x.astype(self.dtype)
        alone = self.config.num_tasks == 1 and 'task' not in ctx.inputs
        task = jnp.zeros(x.shape[:2], jnp.int32) if alone else ctx.side('task')
        probs = self.probabilities(x, task)
        chosen = self.choose(probs, ctx.key)
        gates = jnp.take_along_axis(probs, chosen, axis=-1)
        query = routing.expert_product(x, self.query[...], chosen)
        out, state = self.core(query, self.key(x)[:, :, None], self.value(x)[:, :, None], ctx, state)
        y = jnp.einsum('btk,btkm->btm', gates.astype(out.dtype), routing.expert_product(out, self.out[...], chosen))
        told = routing.mutual_information(task, probs, self.config.num_tasks, ctx.segment_ids)
        return Output(y, state, {'task_loss': -self.config.task_weight * told})

    def probabilities(self, x, task):
        """float32 [B, T, E]; 0 for experts that the task does not see, NaN for a task that does not exist."""
        logits = jnp.einsum('btm,nme->btne', x.astype(jnp.float32), self.router[...].astype(jnp.float32))
        if self.config.visible:
            seen = jnp.arange(self.config.num_experts) < jnp.array(self.config.visible)[:, None]
            logits = jnp.where(seen, logits, -jnp.inf)
        logits = jnp.take_along_axis(logits, task[:, :, None, None], axis=2, mode='fill')[:, :, 0]
        return jnp.where(logits == -jnp.inf, 0, jax.nn.softmax(logits) + 1e-4)

    def choose(self, probs, key):
        """int32 [B, T, K]: the experts of largest p; in training the last `sample_top_k` drawn from the others by p."""
        drawn = self.config.sample_top_k if key is not None else 0
        if not drawn:
            return routing.top_k(probs, self.config.top_k)[0]
        best, taken = routing.top_k(probs, self.config.top_k - drawn)
        rest = jnp.where(taken, -jnp.inf, jnp.log(jax.lax.stop_gradient(probs)))
        noise = jax.random.gumbel(jax.random.fold_in(key, 1), probs.shape)
        return jnp.concatenate([best, routing.top_k(rest + noise, drawn)[0]], axis=-1)


def expand(parameters: Mapping[str, jax.Array], experts: int, tasks: int, key: jax.Array) -> dict[str, jax.Array]:
    """Parameters of a mixer with `experts` and `tasks` more; with `visible` as before, old tasks compute what they did."""
    found = dict(parameters)
    found['router'] = jnp.pad(parameters['router'], ((0, tasks), (0, 0), (0, experts)))
    for number, name in enumerate(('query', 'out')):
        old = parameters[name]
        new = jax.random.normal(jax.random.fold_in(key, number), (experts, *old.shape[1:]), old.dtype)
        found[name] = jnp.concatenate([old, jnp.std(old) * new])
    return found


def prune(parameters: Mapping[str, jax.Array], task: int, keep: Sequence[int]) -> dict[str, jax.Array]:
    """Parameters of a mixer of one task with the experts `keep`: what a task hardly uses can go."""
    kept = jnp.array(keep)
    experts = {name: parameters[name][kept] for name in ('query', 'out')}
    return {**parameters, **experts, 'router': parameters['router'][task : task + 1][:, :, kept]}


def _flops(config, dims, length):
    head_dim = config.head_dim or max(dims.width // config.top_k // 2 * 2, 2)
    return softmax.flops(config.top_k, head_dim, dims, length)


SPEC = Spec(
    module=TaskExperts,
    config=Config,
    paper='2306.17165',
    ops=('softmax_attention',),
    state='kv',
    inputs={'task': 'int32 B T ?'},
    example=Config(num_tasks=4, num_experts=4, top_k=2, head_dim=8, visible=(4, 2, 4, 3)),
    variants={'visible': {'visible': (3, 2, 4, 4)}},
    flops=_flops,
)
