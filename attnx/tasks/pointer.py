"""Pointer tasks on points of a grid: the convex hull, or the shortest round trip, as a sequence of points.

A row: n different points in random order, GO, then the answer as points and END; the targets from GO on are the answer and
END, and only these count. A point (x, y) is the token x + grid·y; GO and END follow all points.
hull: the corners of the convex hull counter-clockwise (no point on an edge is one), from the corner that stands first in
the row; n varies from `fewest`. tour: all points from the first one, by a shortest closed tour; of its two directions the one
whose second point stands before its last in the row; of equal tours the first in lexicographic order of places.
Harder with more points and a finer grid; to evaluate elsewhere than trained: more points (the length is the model's).

Paper: Pointer networks (1506.03134), with 5 to 50 points (hull) and 5 to 20 (tour).
Differs: points lie on a grid and answers are their tokens, so any language model can be asked; tours are optimal, found by
trying all, which limits n to 9.
"""

import dataclasses
import functools
import itertools

import numpy as np

from attnx.tasks.base import Task, expected, generated, require, row

PROBLEMS = ('hull', 'tour')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    problem: str = 'hull'           # hull, tour
    num_points: int = 8             # n, the most
    fewest: int = 5                 # hull: n is drawn from [fewest, num_points]
    grid: int = 16                  # points on a side; the vocabulary is grid² + 2
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


ELSEWHERE = {'more': {'num_points': '×2', 'length': '×2'}}


def turn(a, b, c) -> int:
    """Twice the area of the triangle, positive if counter-clockwise."""
    return int((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))


def hull(points: np.ndarray) -> list[int]:
    """Places of the corners of the convex hull, counter-clockwise from the lowest place; points int [n, 2], all different.

    Points all on one line have its two ends.
    """
    order = np.lexsort((points[:, 1], points[:, 0])).tolist()

    def chain(places):
        found: list[int] = []
        for i in places:
            while len(found) > 1 and turn(points[found[-2]], points[found[-1]], points[i]) <= 0:
                found.pop()
            found.append(i)
        return found[:-1]

    corners = chain(order) + chain(order[::-1])
    start = corners.index(min(corners))
    return corners[start:] + corners[:start]


@functools.cache
def _tours(n: int) -> np.ndarray:
    """Every tour of n places from place 0, one direction of each, in lexicographic order: int [tours, n]."""
    inner = itertools.permutations(range(1, n))
    return np.array([(0, *p) for p in inner if len(p) < 2 or p[0] < p[-1]])


def tour_length(points: np.ndarray, places) -> float:
    """Of the closed tour."""
    path = points[np.asarray(places)].astype(np.float64)
    return float(np.linalg.norm(path - np.roll(path, -1, 0), axis=1).sum())


def tour(points: np.ndarray) -> list[int]:
    """Places of a shortest closed tour from place 0; points int [n, 2]."""
    tours = _tours(len(points))
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    lengths = distance[tours, np.roll(tours, -1, 1)].sum(1)
    return tours[np.argmax(lengths <= lengths.min() + 1e-9)].tolist()


def area(points: np.ndarray) -> float:
    """Signed area of the polygon through points [k, 2]; positive if counter-clockwise."""
    x, y = np.asarray(points, np.float64).reshape(-1, 2).T
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


def score(config: Config, points: np.ndarray, answer: list[int]) -> dict[str, float]:
    """How good an answer (tokens, without END) is: exact 0 or 1; valid 0 or 1; quality, 1 at the best, of valid ones.

    quality is the area covered over the hull's, or the shortest tour's length over this one's. A hull is valid if three or more
    different points of the row go around a convex polygon counter-clockwise; a tour if it visits every point once.
    """
    given = {x + config.grid * y: place for place, (x, y) in enumerate(points.tolist())}
    places = [given.get(token) for token in answer]
    known = None not in places and len(set(places)) == len(places)
    if config.problem == 'tour':
        valid, best = known and len(places) == len(points), tour(points)
        quality = tour_length(points, best) / tour_length(points, places) if valid else 0.0
    else:
        best, path = hull(points), points[[p for p in places if p is not None]]
        valid = known and len(path) > 2 and hull(path) == [*range(len(path))]
        quality = area(path) / area(points[best]) if valid else 0.0
    return {'exact': float(places == best), 'valid': float(valid), 'quality': quality}


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    n, grid = config.num_points, config.grid
    require(config.problem in PROBLEMS, expected('pointer problem', config.problem, PROBLEMS))
    least = config.fewest if config.problem == 'hull' else n
    require(3 <= least <= n, f'pointer needs 3 <= fewest <= num_points, got {least} and {n}')
    require(config.problem == 'hull' or n <= 9, f'pointer: tours are found by trying all: num_points at most 9, got {n}')
    require(grid >= 2 and grid * grid >= 2 * n, f'pointer: {n} points need a grid of more than {grid} a side')
    length = length or 2 * n + 1
    require(length >= 2 * n + 1, f'pointer with {n} points needs length >= {2 * n + 1}, got {length}')
    go, end = grid * grid, grid * grid + 1

    def make(rng):
        tokens = rng.choice(grid * grid, rng.integers(least, n + 1), replace=False)
        points = np.stack([tokens % grid, tokens // grid], 1)
        answer = tokens[hull(points) if config.problem == 'hull' else tour(points)]
        whole = np.concatenate([tokens, [go], answer, [end]])
        return row(whole[:-1], whole[1:], np.arange(len(whole) - 1) >= len(tokens), length=length)

    return Task(kind='pointer', length=length, vocab_size=grid * grid + 2, **generated(make, config, seed))
