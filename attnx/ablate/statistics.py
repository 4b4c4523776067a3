"""Paired statistics of arms: the same seed means the same data order and the same initial values of shared parts."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 10_000


class Difference(NamedTuple):
    """One arm minus the baseline, over the seeds that both finished."""

    seeds: int
    mean: float
    low: float  # 95 % bootstrap interval of the mean
    high: float
    p: float | None  # paired t-test, two-sided; None below two seeds
    adjusted: float | None = None  # Holm's correction over all arms of the same metric


def difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Paired over seeds; None where no seed is common.

    The interval is the percentile bootstrap of the mean: of all resamples where there are at most 10,000 of them, so
    that it depends on no random draw. With few seeds it is too narrow; the t-test accounts for their number.
    """
    common = sorted(set(arm) & set(baseline))
    if not common:
        return None
    values = np.array([arm[s] - baseline[s] for s in common], np.float64)
    n = len(values)
    if n**n <= RESAMPLES:
        index = np.array(list(itertools.product(range(n), repeat=n)))
    else:
        index = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    low, high = np.percentile(values[index].mean(1), [2.5, 97.5])
    p = None
    if n > 1:
        spread = values.std(ddof=1)
        p = float(stats.ttest_1samp(values, 0.0)[1]) if spread else float(not values.any())
    return Difference(n, float(values.mean()), float(low), float(high), p)


def holm(found: Sequence[Difference | None]) -> list[Difference | None]:
    """The differences with p-values adjusted for their number (Holm 1979): the chance of any false alarm is bounded."""
    order = sorted((i for i, d in enumerate(found) if d is not None and d.p is not None), key=lambda i: found[i].p)
    result, running = list(found), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * found[i].p))
        result[i] = found[i]._replace(adjusted=running)
    return result


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of (cost, badness) that no other point beats in both; both are better when smaller."""
    return [
        i
        for i, (cost, bad) in enumerate(points)
        if not any(c <= cost and b <= bad and (c, b) != (cost, bad) for c, b in points)
    ]
