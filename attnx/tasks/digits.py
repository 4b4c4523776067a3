"""Handwritten digits: classify 8 x 8 grey images, read as a sequence of patches.

A row: the image cut into patch x patch squares, row by row: `inputs` float32 [T, patch²] in [0, 1], T = (8 / patch)²,
and its `label` 0 … 9; with `discrete`, the T = 64 pixels as `tokens` 0 … 16 instead. 1,797 images, the optical
recognition set of the UCI repository, which scikit-learn ships; a fixed fifth is held out, whatever the seed. Harder
with smaller patches (longer sequences) and with pixels as tokens.
"""

import dataclasses

import numpy as np

from attnx.tasks.base import Task, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    patch: int = 2                  # side of a patch in pixels: 1, 2, 4 or 8
    discrete: bool = False          # pixels as 17 tokens; needs patch 1
    moved: int = 0                  # pixels by which images are moved to the right, 0 to 7


ELSEWHERE = {'moved': {'moved': 1}}


@dataclasses.dataclass(frozen=True)
class Images:
    """Rows of a classification: values [num, T] or [num, T, F], labels [num]."""

    name: str       # 'tokens' or 'inputs'
    values: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index):
        value = self.values[index]
        return {self.name: value, 'positions': np.arange(len(value), dtype=np.int32),
                'label': self.labels[index], 'weights': np.float32(1)}


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    patch = config.patch
    require(patch in (1, 2, 4, 8), f'digits: patch must be 1, 2, 4 or 8, got {patch}')
    require(patch == 1 or not config.discrete, f'digits: discrete needs patch 1, got {patch}')
    require(0 <= config.moved < 8, f'digits: moved must lie in [0, 7], got {config.moved}')
    side = 8 // patch
    require(length in (0, side * side), f'digits with patch {patch} has length {side * side} (or give 0), got {length}')

    from sklearn.datasets import load_digits  # slow to import, so only when asked for

    images, labels = load_digits(return_X_y=True)
    labels = labels.astype(np.int32)
    images = np.pad(images.reshape(-1, 8, 8), ((0, 0), (0, 0), (config.moved, 0)))[:, :, :8].reshape(-1, 64)
    if config.discrete:
        name, values = 'tokens', images.astype(np.int32)
    else:
        cut = images.reshape(-1, side, patch, side, patch).swapaxes(2, 3)
        name, values = 'inputs', (cut.reshape(-1, side * side, patch * patch) / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(labels))       # the file runs in groups by writer
    held, kept = np.split(order, [len(order) // 5])
    return Task(kind='digits', length=side * side, vocab_size=17 if config.discrete else 0, num_classes=10,
                features=0 if config.discrete else patch * patch, grid=(side, side),
                train=Images(name, values[kept], labels[kept]), evaluation=Images(name, values[held], labels[held]))
