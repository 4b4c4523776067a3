"""What a model costs, and the size of an arm at which it costs what another does."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx

from attnx import models, plan
from attnx.dispatch import nearest
from attnx.nn import flat_axes, to_flat

WHAT = ('none', 'parameters', 'flops', 'state')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """Which cost every arm shares, and the setting that is solved for it."""

    what: str = 'none'  # none, parameters, flops (of training, a token), state (bytes of decoding, one sequence)
    by: str = 'model.mlp.hidden'  # an integer setting that the cost grows with, solved for; '': arms must match as they are
    step: int = 8  # the setting is a multiple of this
    to: str = ''  # the arm whose cost the others take; '': the baseline
    tolerance: float = 0.01  # largest relative difference that counts as equal

    def __post_init__(self):
        if self.what not in WHAT:
            raise ValueError(f'match.what: unknown cost {self.what!r}; {nearest(self.what, WHAT)}')
        if self.step < 1 or not 0 < self.tolerance < 1:
            raise ValueError(f'match: step {self.step} must be at least 1, tolerance {self.tolerance} in (0, 1)')


class Costs(NamedTuple):
    parameters: int
    flops: float  # of training, a token
    state: int  # bytes of the decode state of one sequence at full length


def costs(model: models.ModelConfig, length: int) -> Costs:
    """What a complete model config costs at `length` tokens; builds it abstractly only.

    Raises:
      ValueError: what the model or a mechanism refuses.
    """
    built = jax.eval_shape(lambda: models.build(model, rngs=nnx.Rngs(0)))
    flat = to_flat(built)
    state = jax.eval_shape(lambda m: m.init_state(1, length), built) if model.kind != 'encoder' else None
    flops = plan.flops_per_token(model, flat_axes(built), flat, length)
    return Costs(sum(v.size for v in flat.values()), flops, plan.size(state))


def solve(cost: Callable[[int], float], target: float, match: Match) -> tuple[int, float]:
    """The multiple of `match.step` at which `cost`, growing, is nearest to `target`: (setting, relative difference).

    Raises:
      ValueError: the nearest is farther than the tolerance; it is named.
    """
    seen: dict[int, float] = {}

    def at(n: int) -> float:
        if n not in seen:
            seen[n] = cost(n * match.step)
        return seen[n]

    low, high = 0, 1
    while at(high) < target:
        low, high = high, 2 * high
        if high * match.step > 2**20 or (low and at(high) == at(low)):
            raise ValueError(
                f'no {match.by} up to {high * match.step} brings {match.what} to {target:,.0f}; there it is {at(high):,.0f}'
            )
    turn = 0
    while high - low > 1:  # where a straight line through both ends meets the target; every third time halfway
        turn += 1
        share = (target - at(low)) / (at(high) - at(low)) if low and turn % 3 else 0.5
        middle = min(max(round(low + share * (high - low)), low + 1), high - 1)
        low, high = (middle, high) if at(middle) < target else (low, middle)
    best = min((n for n in (low, high) if n), key=lambda n: abs(at(n) - target))
    off = at(best) / target - 1
    if abs(off) > match.tolerance:
        raise ValueError(
            f'{match.what} can not be matched to {target:,.0f} within {match.tolerance:.1%}: the nearest is '
            f'{match.by} = {best * match.step} with {at(best):,.0f} ({off:+.1%}); allow it by match.tolerance, take a smaller '
            'match.step, or match by another setting'
        )
    return best * match.step, off
