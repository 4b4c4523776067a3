"""Scanpath: objects lie on a grid; which are looked at, one after another, by someone who searches for a kind of object?

A row: `source` int32 [S], the kinds of the objects and, last, the kind searched for; the side input `places` int32 [S, 3], row,
column and 0 of each object, (0, 0, 1) of the last slot. From the middle of the grid the eye goes to the nearest object that it
has not seen (of equally near ones the first in the row), until that is of the kind; then to the last slot, the end. `tokens`
are what was looked at so far, 0 at the start and 1 + j for slot j, `targets` the next slot. For attnx.models.pointer. Harder
with more objects and places.

Paper: after OAT (2407.13335), whose scanpaths are those of people among products on a shelf. Differs: these follow a rule.
"""

import dataclasses

import numpy as np

from attnx.tasks.base import Task, generated, require, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    kinds: int = 6                  # different objects
    side: int = 6                   # rows and columns of the grid
    objects: int = 8                # on it, each at a place of its own
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    kinds, side, count = config.kinds, config.side, config.objects
    require(min(kinds, side) > 0 and 0 < count <= side * side,
            f'scanpath: {count} objects of {kinds} kinds must be at least one and fit {side} x {side} places')
    require(length in (0, count + 1), f'scanpath of {count} objects has length {count + 1} (or give 0), got {length}')

    def make(rng):
        kind, place = rng.integers(kinds, size=count), rng.permutation(side * side)[:count]
        sought = kind[rng.integers(count)]
        where = np.stack([place // side, place % side], axis=1)
        path, eye = [], np.array([side // 2, side // 2])
        while not path or kind[path[-1]] != sought:
            far = np.square(where - eye).sum(axis=1)
            far[path] = 10 * side * side
            path.append(int(far.argmin()))
            eye = where[path[-1]]
        out = row([0, *(1 + j for j in path)], [*path, count], length=count + 1)
        source = np.append(kind, sought).astype(np.int32)
        places = np.concatenate([np.pad(where, ((0, 0), (0, 1))), [[0, 0, 1]]]).astype(np.int32)
        return out | {'source': source, 'source_mask': np.ones(count + 1, bool), 'places': places}

    return Task(kind='scanpath', length=count + 1, vocab_size=kinds, **generated(make, config, seed))
