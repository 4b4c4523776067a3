"""What every task is made of: `Task`, `Source`, and helpers to make rows."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

Row = Mapping[str, np.ndarray]
# Fields of a row that training reads; what else a row holds is a side input of the model (attnx.spec.Spec.inputs).
FIELDS = (
    'tokens', 'inputs', 'targets', 'label', 'weights', 'positions', 'segment_ids', 'source', 'source_mask',
    'teacher_logits',
)  # fmt: skip


class Source(Protocol):
    """Rows by index: the same index gives the same row, in any process and any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Two sources of rows, and what a model must know about them.

    A row of a language task: `tokens`, `targets` int32 [T]; `weights` float32 [T], 0 where a target does not count;
    `segment_ids` int32 [T], 1 and up, 0 is padding; `positions` int32 [T], counted from each segment's start.
    A row of a classification: `inputs` float32 [T, F] or `tokens` int32 [T]; `positions` int32 [T]; `label` int32;
    `weights` float32, a scalar.
    A row of a regression: `inputs`, `targets` float32 [T, F]; `weights`, `segment_ids`, `positions` as of language.
    """

    kind: str                                   # name of the task
    length: int                                 # T, tokens in a row
    vocab_size: int                             # ids that tokens and targets may take; 0 where inputs are features
    train: Source                               # rows to learn from
    evaluation: Source                          # rows held out
    packed: bool = False                        # rows hold several documents, so a model needs segment_ids
    documents: int = 1                          # most documents of a row
    features: int = 0                           # F, width of `inputs`; 0 where inputs are tokens
    num_classes: int = 0                        # labels; 0 for language tasks
    grid: tuple[int, ...] = ()                  # rows and columns that positions run over, for images
    token_bytes: np.ndarray | None = None       # int32 [vocab_size], bytes of text that each token stands for
    start: int | None = None                    # token that begins a document: what sampling starts from
    encode: Callable[[Any], list[int]] | None = None     # text or bytes to tokens
    decode: Callable[[Any], str] | None = None           # tokens to text
    fingerprint: dict[str, Any] = dataclasses.field(default_factory=dict)    # all that the rows depend on, JSON-able

    @property
    def real(self) -> bool:
        """Whether targets are numbers to come near to, rather than tokens or labels."""
        return 'targets' in (row := self.train[0]) and np.issubdtype(row['targets'].dtype, np.floating)


def expected(what: str, given: str, valid: Iterable[str]) -> str:
    """'unknown <what> <given>; ...' with the nearest valid name first."""
    valid = sorted(valid)
    near = difflib.get_close_matches(str(given), valid, n=1)
    hint = f'did you mean {near[0]!r}? ' if near else ''
    return f'unknown {what} {given!r}; {hint}valid: {", ".join(valid)}'


def require(ok: bool, message: str) -> None:
    """Raises ValueError(message) unless `ok`."""
    if not ok:
        raise ValueError(message)


def row(tokens, targets, weights=None, *, length: int) -> dict[str, np.ndarray]:
    """One document as a language row, padded on the right to `length`. weights: None is 1 for every target."""
    n = len(tokens)
    out = blank(length)
    out['tokens'][:n] = tokens
    out['targets'][:n] = targets
    out['weights'][:n] = 1 if weights is None else weights
    out['segment_ids'][:n] = 1
    out['positions'][:n] = np.arange(n)
    return out


def blank(length: int) -> dict[str, np.ndarray]:
    """A row of padding only."""
    names = ('tokens', 'targets', 'segment_ids', 'positions')
    return {name: np.zeros(length, np.int32) for name in names} | {'weights': np.zeros(length, np.float32)}


@dataclasses.dataclass(frozen=True)
class Generated:
    """Rows that are a function of (seed, split, index): `make(rng) -> row`. Splits draw from disjoint seed streams."""

    make: Callable[[np.random.Generator], Row]
    size: int       # number of different rows
    seed: int
    split: int      # 0 train, 1 evaluation

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Row:
        return self.make(np.random.default_rng((self.seed, self.split, int(index))))


def generated(make: Callable[[np.random.Generator], Row], config, seed: int) -> dict[str, Any]:
    """Both sources of a synthetic task, with config.num_train and config.num_eval rows."""
    for name in ('num_train', 'num_eval'):
        require(getattr(config, name) > 0, f'{name} must be positive, got {getattr(config, name)}')
    return {
        'train': Generated(make, config.num_train, seed, 0),
        'evaluation': Generated(make, config.num_eval, seed, 1),
    }
