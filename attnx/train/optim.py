"""Optimizers and learning-rate schedules over a flat dict of parameters.

One schedule and one weight decay serve every optimizer: `clip -> direction -> + decay * param -> * -rate(step)`.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib

from attnx.dispatch import nearest

OPTIMIZERS = ('adamw', 'muon', 'lion')
SCHEDULES = ('wsd', 'wsdc', 'cosine', 'constant')
SHAPES = ('linear', 'cosine', 'sqrt', 'exponential')

# A matrix maps one of these spaces to another; 'layers' and 'expert' only count matrices.
_SPACES = {'embed', 'heads', 'kv_heads', 'mlp', 'rank'}
_COUNTS = {'layers', 'expert'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Optimizer and schedule. Raises ValueError on a setting that is unknown, out of range, or without effect."""

    kind: str = 'adamw'  # 'adamw', 'muon' (matrices inside blocks; the rest AdamW), 'lion'
    learning_rate: float = 3e-3  # peak rate
    adam_learning_rate: float | None = None  # muon only: peak rate of what AdamW serves; None: `learning_rate`
    b1: float = 0.9  # decay of the first moment (AdamW), mix of gradient and momentum (Lion)
    b2: float = 0.95  # decay of the second moment (AdamW), of the momentum (Lion)
    eps: float = 1e-8  # added to the root of the second moment (AdamW)
    momentum: float = 0.95  # muon only: decay of Muon's momentum (Nesterov)
    consistent_rms: float = 0.2  # muon only: root mean square of a matrix's update; 0.2 matches AdamW's (2502.16982)
    weight_decay: float = 0.1  # decoupled, times the rate; vectors and `no_decay` are exempt
    no_decay: tuple[str, ...] = ('*/scale', '*/bias', '*/embedding', '*/table', '*log*', '*/dt_*')  # exempt names
    clip_norm: float | None = 1.0  # largest global norm of the gradient; None: no clipping
    schedule: str = 'wsd'  # 'wsd', 'wsdc' (a constant tail after the decay: 2503.12167), 'cosine', 'constant'
    warmup: int = 100  # steps of linear warmup, to `learning_rate`
    decay: int | None = None  # wsd, wsdc: steps of the decay; None: a tenth of the run
    hold: int = 0  # wsdc only: steps at the floor, after the decay
    floor: float = 0.0  # the schedule's end, as a fraction of the peak
    shape: str = 'linear'  # of the decay of wsd and wsdc: 'linear', 'cosine', 'sqrt' (1 - sqrt), 'exponential'

    def __post_init__(self):
        for field, valid in (('kind', OPTIMIZERS), ('schedule', SCHEDULES), ('shape', SHAPES)):
            if (given := getattr(self, field)) not in valid:
                raise ValueError(f'unknown {field} {given!r}; {nearest(given, valid)}')
        for field, low, high in (
            ('learning_rate', 0, None), ('adam_learning_rate', 0, None), ('b1', 0, 1), ('b2', 0, 1), ('momentum', 0, 1),
            ('weight_decay', 0, None), ('clip_norm', 0, None), ('warmup', 0, None), ('decay', 0, None),
            ('hold', 0, None), ('floor', 0, 1),
        ):  # fmt: skip
            given = getattr(self, field)
            if given is not None and (given < low or (high is not None and given > high)):
                span = f'in [{low}, {high}]' if high is not None else f'>= {low}'
                raise ValueError(f'{field} must be {span}, was given {given}')
        if self.clip_norm == 0:
            raise ValueError('clip_norm 0 would stop all learning; None switches clipping off')
        for field, of, users in (
            ('adam_learning_rate', 'kind', ('muon',)), ('momentum', 'kind', ('muon',)), ('consistent_rms', 'kind', ('muon',)),
            ('eps', 'kind', ('adamw', 'muon')), ('hold', 'schedule', ('wsdc',)), ('decay', 'schedule', ('wsd', 'wsdc')),
            ('shape', 'schedule', ('wsd', 'wsdc')), ('floor', 'schedule', ('wsd', 'wsdc', 'cosine')),
        ):  # fmt: skip
            given, chosen = getattr(self, field), getattr(self, of)
            if chosen not in users and given != type(self).__dataclass_fields__[field].default:
                raise ValueError(f'{field} {given!r} belongs to {" and ".join(users)}; {of} is {chosen!r}')
        if self.shape == 'exponential' and self.schedule in ('wsd', 'wsdc') and self.floor == 0:
            raise ValueError('shape exponential never reaches the floor 0; give floor > 0, e.g. 0.1')


def trapezoid(
    peak: float, *, warmup: int = 0, stable: int = 0, decay: int = 0, floor: float = 0.0, shape: str = 'linear'
) -> Callable[[jax.Array], jax.Array]:
    """Warmup, stable, decay, then constant at the floor: the one curve behind every schedule.

    With s = step + 1 and u = (s - warmup - stable) / decay clipped to [0, 1]:
        rate = peak * s / warmup                              while s <= warmup
               peak * (1 - (1 - floor) u)                     linear
               peak * (floor + (1 - floor)(1 + cos(pi u))/2)  cosine
               peak * (1 - (1 - floor) sqrt(u))               sqrt
               peak * floor^u                                 exponential
    It is a function of the step and of where the decay branches off (warmup + stable), not of the length of the run.
    decay = 0 is constant after the warmup. Papers: WSD 2404.06395; WSDC is named by 2503.12167, whose last phase is
    read here as "constant at the floor".

    Returns:
      step (int, 0-based) -> rate (float32).
    """
    if shape not in SHAPES:
        raise ValueError(f'unknown shape {shape!r}; {nearest(shape, SHAPES)}')

    def rate(step):
        s = jnp.asarray(step, jnp.float32) + 1
        u = jnp.clip((s - warmup - stable) / decay, 0, 1) if decay else jnp.zeros_like(s)
        down = {
            'linear': lambda: 1 - (1 - floor) * u,
            'cosine': lambda: floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * u)),
            'sqrt': lambda: 1 - (1 - floor) * jnp.sqrt(u),
            'exponential': lambda: jnp.asarray(floor, jnp.float32) ** u,
        }[shape]()
        return peak * jnp.minimum(down, s / warmup if warmup else 1.0)

    return rate


def schedule(config: Config, num_steps: int) -> Callable[[jax.Array], jax.Array]:
    """The rate of every step of a run of `num_steps`.

    Raises:
      ValueError: the phases are longer than the run.
    """
    warmup, hold = config.warmup, config.hold
    if config.schedule == 'cosine':
        decay, shape = num_steps - warmup, 'cosine'
    elif config.schedule == 'constant':
        decay, shape = 0, 'linear'
    else:
        decay, shape = (max(num_steps // 10, 1) if config.decay is None else config.decay), config.shape
    stable = num_steps - warmup - decay - hold
    if stable < 0:
        raise ValueError(
            f'schedule {config.schedule}: optim.warmup {warmup} + decay {decay} + hold {hold} steps exceed the run of '
            f'steps {num_steps}: at least {warmup + decay + hold}, or shorter phases, such as optim.warmup {num_steps // 10}'
            + f', optim.decay {num_steps // 4}' * (config.schedule != 'cosine')
        )
    return trapezoid(config.learning_rate, warmup=warmup, stable=stable, decay=decay, floor=config.floor, shape=shape)


def is_matrix(name: str, axes: tuple[str | None, ...]) -> bool:
    """Whether Muon serves this parameter: a matrix inside a block, by its axis names.

    Counting axes ('layers', 'expert') lead and are kept apart; embeddings, heads, convolutions, vectors, tables and
    per-head arrays belong to AdamW.
    """
    core = [a for a in axes if a not in _COUNTS]
    inside = '/layers/' in f'/{name}/'
    kernel = name.rsplit('/', 1)[-1] == 'kernel' or 'expert' in axes
    return inside and kernel and len(core) == 2 and set(core) <= _SPACES and tuple(axes[-2:]) == tuple(core)


def decays(name: str, axes: tuple[str | None, ...], no_decay: tuple[str, ...]) -> bool:
    """Whether weight decay acts: not on vectors (stacked ones included), nor on names that match a pattern."""
    core = [a for a in axes if a != 'layers']
    return len(core) > 1 and not any(fnmatch.fnmatchcase(f'/{name}', pattern) for pattern in no_decay)


def build(
    config: Config, num_steps: int, axes: Mapping[str, tuple[str | None, ...]]
) -> tuple[optax.GradientTransformation, Callable]:
    """The optimizer and its schedule.

    Args:
      config: what to build.
      num_steps: length of the run.
      axes: parameter name -> logical axis names; fixes the routing once, by name.

    Returns:
      (transformation over a flat dict of parameters, rate of a step).

    Raises:
      ValueError: the schedule does not fit, or Muon finds no matrix.
    """
    rate = schedule(config, num_steps)
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    steps = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm is not None else []
    if config.kind == 'adamw':
        steps.append(adam)
    elif config.kind == 'lion':
        steps.append(optax.scale_by_lion(config.b1, config.b2))
    else:
        steps.append(_muon(config, adam, axes))
    if config.weight_decay:
        mask = {name: decays(name, names, config.no_decay) for name, names in axes.items()}
        steps.append(optax.add_decayed_weights(config.weight_decay, mask))
    if config.adam_learning_rate is not None and config.adam_learning_rate != config.learning_rate:
        ratio = config.adam_learning_rate / config.learning_rate
        ratios = {name: 1.0 if is_matrix(name, names) else ratio for name, names in axes.items()}
        scaled: Callable[..., Any] = lambda updates, _: {name: u * ratios[name] for name, u in updates.items()}
        steps.append(optax.stateless(scaled))
    return optax.chain(*steps, optax.scale_by_learning_rate(rate)), rate


def _muon(config: Config, adam, axes):
    matrices = [name for name, names in axes.items() if is_matrix(name, names)]
    if not matrices:
        raise ValueError("optim.kind 'muon': no parameter is a matrix inside a block; use 'adamw'")
    # Shapes alone would send stacked matrices to Adam and stacked scales to Muon, so the routing is a static tree.
    numbers = {
        name: contrib.MuonDimensionNumbers(reduction_axis=len(names) - 2, output_axis=len(names) - 1)
        if name in set(matrices)
        else None
        for name, names in axes.items()
    }
    # Rate -1 turns optax's descent into a direction, so that rate and decay are applied once, below, for all.
    muon = contrib.muon(
        -1.0,
        beta=config.momentum,
        consistent_rms=config.consistent_rms,
        muon_weight_dimension_numbers=numbers,
    )
    labels = {name: 'muon' if number is not None else 'adam' for name, number in numbers.items()}
    return optax.partition({'muon': muon, 'adam': adam}, labels)


def state_shardings(transform, params: Mapping, shardings: Mapping, mesh: jax.sharding.Mesh):
    """Shardings of the optimizer state: a leaf named and shaped as a parameter lies as it does, others are replicated.

    `jax.jit(transform.init)` without them would put the whole state on one device.
    """

    def one(path, leaf):
        name = str(getattr(path[-1], 'key', '')) if path else ''
        same = name in params and params[name].shape == leaf.shape
        return shardings[name] if same else NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(transform.init, params))
