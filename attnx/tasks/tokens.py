"""Token files: language modelling on memory-mapped `.bin` files of token ids, without header.

A row: T consecutive tokens and their successors; the last row of a file is shorter and padded, so nothing is dropped.
With `separator` set, each such token begins a segment of its own, positions restart there, and rows are packed
documents; without it, a row is one segment. Files may be far larger than memory: only the rows asked for are read.
"""

import dataclasses
import glob
import os

import numpy as np

from attnx.tasks.base import Task, blank, expected, require, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    path: str = ''                  # file or glob of files to train on
    validation_path: str = ''       # files held out; '' holds out the end of each training file
    validation: float = 0.01        # share of each file held out, where validation_path is ''
    vocab_size: int = 50304         # ids lie below it
    dtype: str = 'uint16'           # or uint32, as the files were written (little-endian)
    separator: int = -1             # token that begins each document; -1: documents are not told apart


ELSEWHERE = {'long': {'length': '×2'}}


@dataclasses.dataclass(frozen=True)
class Windows:
    """Consecutive windows of the spans [begin, end) of token files, which are opened when first read."""

    spans: tuple[tuple[str, int, int], ...]     # (file, begin, end) in tokens
    dtype: str
    vocab_size: int
    separator: int
    length: int
    bounds: np.ndarray = dataclasses.field(init=False, compare=False)   # rows before each span, and all
    maps: dict[str, np.memmap] = dataclasses.field(init=False, compare=False)

    def __post_init__(self):
        counts = [max(0, -(-(end - begin - 1) // self.length)) for _, begin, end in self.spans]
        object.__setattr__(self, 'bounds', np.cumsum([0] + counts))
        object.__setattr__(self, 'maps', {})

    def __getstate__(self):
        return self.__dict__ | {'maps': {}}

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, index):
        span = int(np.searchsorted(self.bounds, index, 'right')) - 1
        file, begin, end = self.spans[span]
        if file not in self.maps:
            self.maps[file] = np.memmap(file, self.dtype, mode='r')
        begin += int(index - self.bounds[span]) * self.length
        window = self.maps[file][begin:min(begin + self.length + 1, end)].astype(np.int64)
        if (top := window.max()) >= self.vocab_size:
            raise ValueError(f'{file}: token {top} at {begin + int(window.argmax())} is not below vocab_size '
                             f'{self.vocab_size}; is dtype {self.dtype} right?')
        out = row(window[:-1], window[1:], length=self.length)
        if self.separator >= 0:
            n = len(window) - 1
            first = window[:-1] == self.separator
            first[0] = True         # what a window cuts begins a segment as well
            at = np.arange(n)
            out['segment_ids'][:n] = np.cumsum(first)
            out['positions'][:n] = at - np.maximum.accumulate(np.where(first, at, 0))
        return out


def _files(pattern: str, itemsize: int) -> dict[str, int]:
    """Files that `pattern` names, sorted, with their number of tokens."""
    found = sorted(f for f in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(f))
    require(bool(found), f'tokens: no file matches {pattern!r}; expected a .bin file of token ids, or a glob of such')
    sizes = {file: os.path.getsize(file) for file in found}
    for file, size in sizes.items():
        require(size % itemsize == 0 and size >= 2 * itemsize,
                f'{file}: {size} bytes is not a whole number (2 or more) of {itemsize}-byte tokens')
    return {file: size // itemsize for file, size in sizes.items()}


def check(config: Config) -> None:
    require(config.dtype in ('uint16', 'uint32'), expected('tokens dtype', config.dtype, ('uint16', 'uint32')))
    for path in filter(None, (config.path, config.validation_path)):
        _files(path, np.dtype(config.dtype).itemsize)


def outline(config: Config, *, length: int) -> Task:
    """The task without its files: one blank row on either side."""
    require(config.vocab_size > 0, f'tokens: vocab_size must be positive, got {config.vocab_size}')
    require(-1 <= config.separator < config.vocab_size,
            f'tokens: separator must be -1 or an id below vocab_size {config.vocab_size}, got {config.separator}')
    length = length or 1024
    packed = config.separator >= 0
    return Task(kind='tokens', length=length, vocab_size=config.vocab_size, packed=packed,
                documents=length if packed else 1, start=config.separator if packed else None,      # nobody counts them
                train=[blank(length)], evaluation=[blank(length)])


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    require(bool(config.path), "tokens: 'path' must name a .bin file or a glob of such files, got ''")
    check(config)
    task = outline(config, length=length)
    require(0 < config.validation < 1, f'tokens: validation must lie in (0, 1), got {config.validation}')
    dtype = np.dtype(config.dtype).newbyteorder('<').str
    files = _files(config.path, np.dtype(dtype).itemsize)
    if config.validation_path:
        held = _files(config.validation_path, np.dtype(dtype).itemsize)
        both = set(map(os.path.realpath, held)) & set(map(os.path.realpath, files))
        require(not both, f'tokens: {len(both)} files are in both path and validation_path: {min(both, default="")} …')
        cut = files
    else:
        held = files
        cut = {file: n - max(2, round(n * config.validation)) for file, n in files.items()}

    def windows(spans):
        return Windows(tuple(spans), dtype, config.vocab_size, config.separator, task.length)

    train = windows((file, 0, n) for file, n in cut.items())
    evaluation = windows((file, 0 if config.validation_path else cut[file], n) for file, n in held.items())
    for name, source in (('training', train), ('validation', evaluation)):
        require(len(source) > 0, f'tokens: {config.path!r} leaves no {name} tokens ({sum(files.values())} in all)')
        for index in np.linspace(0, len(source) - 1, 16, dtype=int):        # a wrong dtype or vocabulary shows at once
            source[index]
    files = {os.path.basename(file): n for file, n in (files | held).items()}
    return dataclasses.replace(task, train=train, evaluation=evaluation, fingerprint={'files': files})
