"""The training step and the evaluation step: pure functions over a flat dict of parameters.

`forward(params, batch, key, step=None) -> (logits, aux)` is all they know of a model. A batch is a dict of arrays with
`weights` and either `targets` [B, T] (logits [B, T, V]) or `label` [B] (logits [B, C]); or real `targets` [B, T, F], whose loss
is the squared error of outputs [B, T, F], summed over F.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from attnx.dispatch import nearest
from attnx.train import heads as heads_lib

POLICIES = ('stop', 'skip', 'rewind')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What one update minimises and how it is computed."""

    z_loss: float = 0.0  # weight of logsumexp(logits)²; keeps logits small (1e-4 in PaLM)
    label_smoothing: float = 0.0  # share of the target spread evenly over the vocabulary
    aux_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of auxiliary losses by name; else 1
    accumulate: int = 1  # micro-batches per update, by a scan; must divide the batch
    non_finite: str = 'stop'  # an update with a NaN or Inf: stop; skip it; rewind to the last checkpoint, past its batch
    max_non_finite: int = 10  # skips or rewinds over the whole run; one more stops it
    distill: float = 0.0  # weight of temperature² KL(teacher || student); batches then hold `teacher_logits`
    distill_temperature: float = 1.0  # divides both logits in it
    hard: float = 1.0  # weight of the loss on targets beside it
    mask_heads: int = 0  # heads of the whole model left out of each update, none of evaluations (HeadMask: 2009.09672)
    mask_heads_by: str = 'random'  # random; importance: those of largest |dL / d head|, by one more backward pass
    mask_heads_rescale: bool = False  # multiply the heads that are kept by all / kept
    qk_clip: float = 0.0  # largest attention logit after an update: heads beyond it get smaller queries and keys; 0: off
    qk_clip_every: int = 1  # updates between looks at the logits, each a forward pass

    def __post_init__(self):
        if self.accumulate < 1:
            raise ValueError(f'accumulate must be >= 1, was given {self.accumulate}')
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f'label_smoothing must be in [0, 1), was given {self.label_smoothing}')
        if self.non_finite not in POLICIES:
            raise ValueError(f'unknown non_finite {self.non_finite!r}; {nearest(self.non_finite, POLICIES)}')
        if self.non_finite == 'stop' and self.max_non_finite != 10:
            raise ValueError(f'max_non_finite {self.max_non_finite} belongs to skip and rewind, not to stop')
        if self.z_loss < 0 or self.max_non_finite < 0:
            raise ValueError(f'z_loss {self.z_loss} and max_non_finite {self.max_non_finite} must be >= 0')
        if min(self.distill, self.hard, self.mask_heads) < 0 or self.distill_temperature <= 0:
            raise ValueError('distill, hard and mask_heads must be >= 0, distill_temperature > 0')
        if (self.hard != 1 or self.distill_temperature != 1) and not self.distill:
            raise ValueError('hard and distill_temperature belong to distillation: set distill, its weight')
        if self.mask_heads_by not in ('random', 'importance'):
            raise ValueError(f'mask_heads_by: {nearest(self.mask_heads_by, ("random", "importance"))}')
        if self.qk_clip < 0 or self.qk_clip_every < 1:
            raise ValueError(f'qk_clip {self.qk_clip} must be >= 0 and qk_clip_every {self.qk_clip_every} >= 1')
        if self.qk_clip_every != 1 and not self.qk_clip:
            raise ValueError('qk_clip_every says how often logits are looked at: set qk_clip, their limit')
        if not self.mask_heads and (self.mask_heads_by != 'random' or self.mask_heads_rescale):
            raise ValueError('mask_heads_by and mask_heads_rescale say how heads are masked: set mask_heads, how many')


def cross_entropy(logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0) -> tuple[jax.Array, ...]:
    """Negative log-likelihood, its smoothed form, and logsumexp; all float32 [...].

    nll = lse - logits[target]; smoothed = (1 - e) nll + e (lse - mean logits).

    Args:
      logits: [..., V], any float dtype; computed in float32.
      targets: int [...], inside [0, V): out of range is clamped by XLA, so check ids on the host.
    """
    lse, picked = _lse_and_picked(logits, targets)
    nll = lse - picked
    smoothed = nll
    if label_smoothing:
        smoothed = (1 - label_smoothing) * nll + label_smoothing * (lse - jnp.mean(logits.astype(jnp.float32), axis=-1))
    return nll, smoothed, lse


@jax.custom_vjp
def _lse_and_picked(logits, targets):
    """(logsumexp(logits), logits[target]), float32. Of arrays as large as the logits the backward pass makes one, their
    gradient; autodiff would scatter into a second and keep the exponentials."""
    logits = logits.astype(jnp.float32)
    return jax.nn.logsumexp(logits, axis=-1), jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _lse_and_picked_fwd(logits, targets):
    lse, picked = _lse_and_picked(logits, targets)
    return (lse, picked), (logits, targets, lse)


def _lse_and_picked_bwd(saved, cotangents):
    logits, targets, lse = saved
    dlse, dpicked = (x[..., None] for x in cotangents)
    softmax = jnp.exp(logits.astype(jnp.float32) - lse[..., None])
    hit = targets[..., None] == jax.lax.broadcasted_iota(targets.dtype, (1,) * targets.ndim + logits.shape[-1:], targets.ndim)
    return (softmax * dlse + jnp.where(hit, dpicked, 0)).astype(logits.dtype), None


_lse_and_picked.defvjp(_lse_and_picked_fwd, _lse_and_picked_bwd)


def divergence(teacher: jax.Array, student: jax.Array, temperature: float = 1.0) -> jax.Array:
    """temperature² KL(softmax(teacher / temperature) || softmax(student / temperature)), float32 [...] of logits [..., V]."""
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (teacher, student))
    return temperature**2 * jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def _targets(batch):
    return batch['targets'] if 'targets' in batch else batch['label']


def _real(batch) -> bool:
    return jnp.issubdtype(_targets(batch).dtype, jnp.floating)


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Summed over the last axis, float32 [...] of [..., F]."""
    return jnp.sum(jnp.square(outputs.astype(jnp.float32) - targets.astype(jnp.float32)), axis=-1)


def aux_losses(aux: Any, weights: Mapping[str, float]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum of every entry whose name ends in '_loss' (summed over layers), and all entries for the log.

    Raises:
      ValueError: `weights` names a loss that the model does not have.
    """
    total, found = jnp.float32(0), {}
    for path, value in jax.tree_util.tree_flatten_with_path(aux)[0]:
        name = str(getattr(path[-1], 'key', getattr(path[-1], 'name', path[-1])))
        value = jnp.asarray(value, jnp.float32)
        if name.endswith('_loss'):
            found[name] = found.get(name, 0.0) + jnp.sum(value)
        else:
            found.setdefault(name, jnp.mean(value))
    losses = {name: value for name, value in found.items() if name.endswith('_loss')}
    if unknown := [name for name in weights if name not in losses]:
        raise ValueError(f'step.aux_weights: this model has no {unknown[0]!r}; {nearest(unknown[0], losses)}')
    for name, value in losses.items():
        total += weights.get(name, 1.0) * value
    return total, found


def objective(forward: Callable, params, batch, key, config: Config):
    """(sum over tokens of weight * loss, auxiliary loss, sums for the log): sums, so that micro-batches add up."""
    logits, aux = forward(params, batch, key)
    if _real(batch):
        if given := [n for n in ('z_loss', 'label_smoothing', 'distill') if getattr(config, n)]:
            raise ValueError(f'step.{given[0]} is for targets that are tokens or labels; this task has real ones')
        nll = smoothed = squared_error(logits, _targets(batch))
    else:
        nll, smoothed, lse = cross_entropy(logits, _targets(batch), config.label_smoothing)
    weights = batch['weights'].astype(jnp.float32)
    extra, logged = aux_losses(aux, config.aux_weights)
    if config.z_loss:
        smoothed = smoothed + config.z_loss * jnp.square(lse)
    sums = {'loss': jnp.sum(weights * nll)}
    if config.distill:
        if 'teacher_logits' not in batch:
            raise ValueError('step.distill: the batch has no teacher_logits; give the run a teacher')
        far = divergence(jax.lax.stop_gradient(batch['teacher_logits']), logits, config.distill_temperature)
        smoothed = config.hard * smoothed + config.distill * far
        sums['divergence'] = jnp.sum(weights * far)
    return jnp.sum(weights * smoothed), extra, sums, logged


def init_state(params: Mapping[str, jax.Array], transform: optax.GradientTransformation) -> dict:
    """{'params', 'opt', 'step', 'bad'}: all that an update reads and writes. `bad` counts updates with NaN or Inf."""
    return {'params': dict(params), 'opt': transform.init(dict(params)), 'step': jnp.int32(0), 'bad': jnp.int32(0)}


def gradients(forward: Callable, params, batch, key, config: Config):
    """Loss, gradient and sums of one update, micro-batch by micro-batch.

        loss = sum over micro-batches of (sum of weighted token losses) / (total weight) + mean of auxiliary losses

    Losses are summed and divided once, so unequal numbers of tokens per micro-batch do not matter.

    Returns:
      (objective float32, gradient float32 flat dict, metrics dict).
    """
    count = jnp.maximum(jnp.sum(batch['weights'].astype(jnp.float32)), 1e-8)

    def loss_fn(params, micro, key):
        total, extra, sums, logged = objective(forward, params, micro, key, config)
        # Scaled so that one division by `count`, after all micro-batches, makes the mean of the auxiliary losses.
        return total + extra * count / config.accumulate, (sums, logged)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if config.accumulate == 1:
        (total, (sums, logged)), grads = grad_fn(params, batch, key)
    else:
        n = config.accumulate
        if (rows := batch['weights'].shape[0]) % n:
            raise ValueError(f'step.accumulate {n} does not divide the batch of {rows} rows')
        # Strided rows: each device keeps its own rows in every micro-batch.
        micro = jax.tree.map(lambda x: x.reshape(rows // n, n, *x.shape[1:]).swapaxes(0, 1), batch)

        def body(carry, inputs):
            i, micro = inputs
            (total, aux), grads = grad_fn(params, micro, jax.random.fold_in(key, i))
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), carry, (total, aux, grads)), None

        (total, aux), grads = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], micro), key)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (total, aux, grads))
        (total, (sums, logged), grads), _ = jax.lax.scan(body, zero, (jnp.arange(n), micro))
        logged = {name: value / n for name, value in logged.items()}
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / count, grads)
    return total / count, grads, {**{name: value / count for name, value in sums.items()}, 'weight': count, **logged}


def without_heads(forward: Callable, params, batch, key, config: Config, heads: Mapping[str, int]):
    """As `gradients`, of the model without `config.mask_heads` of its heads; `heads` as `heads.projections` gives."""
    if config.mask_heads_by == 'importance':
        scores = heads_lib.importance(params, gradients(forward, params, batch, key, config)[1], heads)
    else:
        scores = heads_lib.noise(params, heads, jax.random.fold_in(key, 2**21))
    total = sum(v.size for v in scores.values())
    if not config.mask_heads < total:
        raise ValueError(f'step.mask_heads {config.mask_heads} must be below {total}, the heads that can be masked')
    keep = heads_lib.drop_largest(scores, config.mask_heads)
    if config.mask_heads_rescale:
        keep = {name: v * total / (total - config.mask_heads) for name, v in keep.items()}
    loss, grads, metrics = gradients(forward, heads_lib.masked(params, keep), batch, key, config)
    return loss, heads_lib.masked(grads, keep), metrics


def train_step(
    forward: Callable,
    transform: optax.GradientTransformation,
    rate: Callable,
    config: Config,
    heads: Mapping[str, int] | None = None,
    clip: Callable | None = None,
):
    """Builds `step(state, batch, key) -> (state, metrics)`; jit it with the state donated. `key` is the run's, the same for
    every step: as an argument, one compiled program serves all seeds.

    An update whose loss or gradient norm is NaN or Inf changes nothing. Unless it is to be skipped the state stays frozen
    at the failing step, so that the failure can be replayed exactly; metrics['frozen'] says so.

    Metrics (scalars): loss (nats per unit of weight, without smoothing, z-loss and auxiliary losses), objective,
    grad_norm, learning_rate, weight (sum of weights), bad (non-finite updates so far), frozen, and the model's own.
    heads: output projections and their numbers of heads (`heads.projections`), for `config.mask_heads`.
    clip: `clip.hook`, for `config.qk_clip`; metrics then count the heads that were clipped.
    """

    if config.qk_clip and clip is None:
        raise ValueError('step.qk_clip looks inside the model: give train_step its hook')
    tolerated = config.max_non_finite if config.non_finite == 'skip' else 0

    def step(state, batch, key):
        params, opt, number = state['params'], state['opt'], state['step']
        key = jax.random.fold_in(key, number)
        call = functools.partial(forward, step=number)
        if config.mask_heads:
            total, grads, metrics = without_heads(call, params, batch, key, config, heads or {})
        else:
            total, grads, metrics = gradients(call, params, batch, key, config)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        bad = state['bad'] + ~finite
        frozen = bad > tolerated
        ok = finite & ~frozen
        updates, new_opt = transform.update(grads, opt, params)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
        metrics |= {
            'objective': total,
            'grad_norm': norm,
            'learning_rate': rate(number - state['bad']),  # skipped updates do not advance the schedule
            'bad': bad,
            'frozen': frozen,
        }
        params = keep(optax.apply_updates(params, updates), params)
        if config.qk_clip:
            due = ok & ((number + 1) % config.qk_clip_every == 0)
            look, pass_by = functools.partial(clip, batch=batch, step=number), lambda params: (params, jnp.int32(0))
            params, metrics['qk_clipped'] = jax.lax.cond(due, look, pass_by, params)
        state = {
            'params': params,
            'opt': keep(new_opt, opt),
            'step': number + ~frozen,
            'bad': bad,
        }
        return state, metrics

    return step


def eval_step(forward: Callable, token_bytes: jax.Array | None = None):
    """Builds `step(params, batch) -> sums`: nll (or squared errors), weight; correct, but of real targets; and bytes where
    tokens stand for bytes."""

    def step(params, batch):
        logits, _ = forward(params, batch, None)
        targets, weights = _targets(batch), batch['weights'].astype(jnp.float32)
        if _real(batch):
            return {'nll': jnp.sum(weights * squared_error(logits, targets)), 'weight': jnp.sum(weights)}
        nll, _, _ = cross_entropy(logits, targets)
        sums = {
            'nll': jnp.sum(weights * nll),
            'correct': jnp.sum(weights * (jnp.argmax(logits, axis=-1) == targets)),
            'weight': jnp.sum(weights),
        }
        if token_bytes is not None:
            sums['bytes'] = jnp.sum(weights * token_bytes[targets])
        return sums

    return step


def summarise(sums: list[Mapping[str, Any]]) -> dict[str, float]:
    """Means over a whole evaluation: loss (nats, or squared error, per unit of weight), accuracy where there is one,
    nats_per_byte where bytes are known."""
    total = {name: sum(float(s[name]) for s in sums) for name in sums[0]} if sums else {}
    weight = total.get('weight', 0.0)
    if not weight:
        raise ValueError('the evaluation set is empty: no row has a positive weight')
    found = {'loss': total['nll'] / weight}
    if 'correct' in total:
        found['accuracy'] = total['correct'] / weight
    if total.get('bytes'):
        found['nats_per_byte'] = total['nll'] / total['bytes']
    return found
