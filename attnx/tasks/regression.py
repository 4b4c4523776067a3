"""In-context linear regression: examples of an unknown linear function, then its value at a new point.

A row of pairs: `x1, y1, x2, y2, …`, each a vector of `dims` numbers. x ~ N(0, scale² diag(k^-skew)), k = 1 … dims; y = w·x +
noise, in the first coordinate, zeros after; w ~ N(0, I) anew in every row. The target at x_i is the vector of y_i, by squared
error summed over coordinates; only these count, from example `warm` + 1 on. With scale 1 and skew 0 predicting zero costs
dims; without noise least squares costs nothing from example dims + 1 on. Harder with more dims and noise; to evaluate
elsewhere than trained: a longer row, another scale, skew or noise.

Paper: What can transformers learn in-context? (2208.01066), sizes as its toy setting: 5 dims, 11 examples.
Differs: no curriculum; the skewed inputs are drawn along the coordinates, not along random directions.
"""

import dataclasses

import numpy as np

from attnx.tasks.base import Task, generated, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    dims: int = 5                   # d, of x
    scale: float = 1.0              # of x
    skew: float = 0.0               # p: coordinate k has variance scale² k^-p
    noise: float = 0.0              # standard deviation of what is added to y
    warm: int = 0                   # examples that are shown before predictions count
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


ELSEWHERE = {'long': {'length': '×2'}, 'skewed': {'skew': 2.0}, 'scaled': {'scale': 2.0}, 'noisy': {'noise': 1.0}}


def least_squares(inputs: np.ndarray) -> np.ndarray:
    """float [n]: y_i as the least-squares solution of least norm over the examples before it predicts it; inputs [2n, d]."""
    x, y = inputs[::2].astype(np.float64), inputs[1::2, 0].astype(np.float64)
    return np.array([x[i] @ np.linalg.lstsq(x[:i], y[:i], rcond=None)[0] if i else 0.0 for i in range(len(x))])


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    d = config.dims
    length = length or 22
    require(d >= 1, f'regression: dims must be positive, got {d}')
    require(length >= 2 and length % 2 == 0, f'regression needs an even length >= 2, got {length}')
    require(0 <= config.warm < length // 2, f'regression: warm must lie in [0, {length // 2}), got {config.warm}')
    require(config.scale > 0 and config.noise >= 0 and config.skew >= 0,
            f'regression: scale {config.scale} must be positive, noise {config.noise} and skew {config.skew} not negative')
    spread = config.scale * np.arange(1, d + 1) ** (-config.skew / 2)
    counts = (np.arange(length) % 2 == 0) & (np.arange(length) >= 2 * config.warm)

    def make(rng):
        n = length // 2
        w, x = rng.normal(size=d), rng.normal(size=(n, d)) * spread
        y = x @ w + config.noise * rng.normal(size=n)
        inputs = np.zeros((length, d), np.float32)
        inputs[::2], inputs[1::2, 0] = x, y
        targets = np.zeros_like(inputs)
        targets[::2] = inputs[1::2]
        return {'inputs': inputs, 'targets': targets, 'weights': counts.astype(np.float32),
                'segment_ids': np.ones(length, np.int32), 'positions': np.arange(length, dtype=np.int32)}

    return Task(kind='regression', length=length, vocab_size=0, features=d, **generated(make, config, seed))
