"""What the files of checkpoints say by themselves: which are whole, which are ours. Imports no jax.

A step is valid when it is sealed: `integrity.json`, written last and whole or not at all, holds a digest of every file.
`attnx.json` beside the steps lists those that were sealed, so that one that is gone, or lost its seal, is told from one that
was never finished. The digests find damage, not forgery: who can write a folder can seal it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

SEAL = 'integrity.json'
MARK = 'attnx.json'
FORMAT = 2
REMOTE = ('gs://', 's3://')
QUICK = 1 << 28  # bytes that are read before jax is imported
THREADS = 4  # that read files for their digests
DRAFT = '.tmp'  # ends the name of what is not written yet


class CheckpointError(ValueError):
    """A checkpoint is corrupt, foreign, of another config, or could not be written; the message says which, where."""


def replace(path: epath.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    draft = path.parent / (path.name + DRAFT)
    with draft.open('w') as stream:
        stream.write(text)
        stream.flush()
        with contextlib.suppress(OSError, AttributeError, ValueError):  # remote streams have no descriptor
            os.fsync(stream.fileno())
    draft.replace(path)


def digest(folder: epath.Path) -> dict[str, str]:
    """Relative path -> BLAKE2b of its bytes, for every file below `folder` but the seal.

    Raises:
      ValueError: something below is a link, so it may lie elsewhere.
    """
    paths = [path for path in sorted(_files(folder)) if path.name not in (SEAL, SEAL + DRAFT)]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return dict(zip((str(path.relative_to(folder)) for path in paths), pool.map(_digest, paths)))


def _digest(path: epath.Path) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    with path.open('rb') as stream:
        while block := stream.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if os.path.islink(path):
            raise ValueError(f'{path.name} is a link')
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def signature(seal: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(seal, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_seal(folder: epath.Path) -> dict[str, Any]:
    """{'step', 'loss', 'files'} of a step's folder.

    Raises:
      ValueError: there is none, or it is not as it was written.
    """
    if os.path.islink(folder):
        raise ValueError('is a link')
    if not (folder / SEAL).exists():
        raise ValueError(f'has no {SEAL}' if folder.exists() else 'is gone')
    try:
        written = json.loads((folder / SEAL).read_text())
        seal, given = written['seal'], written['digest']
        whole = signature(seal) == given and set(seal) == {'step', 'loss', 'files'}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{SEAL} is unreadable') from None
    if not whole:
        raise ValueError(f'{SEAL} differs from its own digest')
    if str(seal['step']) != folder.name:
        raise ValueError(f'was sealed as step {seal["step"]}')
    return seal


def damage(folder: epath.Path) -> str | None:
    """What is wrong with a step's folder, or None."""
    try:
        sealed, found = read_seal(folder)['files'], digest(folder)
    except (ValueError, OSError) as error:
        return str(error)
    if missing := sorted(set(sealed) - set(found)):
        return f'{missing[0]} is missing'
    if added := sorted(set(found) - set(sealed)):
        return f'{added[0]} was not there when it was sealed'
    if changed := [name for name in sealed if sealed[name] != found[name]]:
        return f'{changed[0]} differs from its digest'
    return None


def located(folder) -> epath.Path:
    """The folder of checkpoints that a config names, or a run has."""
    return epath.Path(folder if str(folder).startswith(REMOTE) else os.path.abspath(folder))


def listed(folder: epath.Path) -> tuple[set[int], str]:
    """(steps that were sealed, as MARK says; what is wrong with MARK, or '').

    Raises:
      CheckpointError: the folder holds what this project, or this version of it, did not write.
    """
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    inside = sorted(names - {MARK + DRAFT})  # killed before MARK was first there
    if inside and MARK not in inside:
        raise CheckpointError(
            f'{folder} holds foreign files ({", ".join(inside[:3])}): no {MARK}, so they are no checkpoints '
            f'of this project; give another run_dir'
        )
    try:
        mark = json.loads((folder / MARK).read_text())
        version, sealed = mark['format'], {int(step) for step in mark['sealed']}
    except (ValueError, KeyError, TypeError, OSError):
        return set(), f'{folder / MARK} was unreadable' if inside else ''
    if version != FORMAT:
        raise CheckpointError(f'{folder} is of format {version}, this version reads {FORMAT}; give another run_dir')
    return sealed, ''


def steps_in(folder: epath.Path, *, sealed: bool) -> list[int]:
    """Steps that have a folder, or a seal as well, oldest first."""
    names = [path.name for path in folder.iterdir()]
    steps = sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))
    return [step for step in steps if not sealed or (folder / str(step) / SEAL).exists()]


def newest(folder: epath.Path, sealed: set[int]) -> tuple[int | None, list[tuple[int, str]]]:
    """The newest step that is as it was sealed, and those above it with what is wrong with them."""
    bad = []
    for step in sorted({*steps_in(folder, sealed=True), *sealed}, reverse=True):
        if (problem := damage(folder / str(step))) is None:
            return step, bad
        bad.append((step, problem))
    return None, bad


def refusal(folder: epath.Path, bad: list[tuple[int, str]], good: int | None, fallback: bool) -> str:
    """What is wrong with the newest checkpoint.

    Raises:
      CheckpointError: there is no good one, or it is not to be used.
    """
    what = f'checkpoint {bad[0][0]} in {folder} is corrupt: {bad[0][1]}'
    if good is None:
        raise CheckpointError(f'{what}; there is no good checkpoint. To start anew give another run_dir')
    if not fallback:
        raise CheckpointError(
            f'{what}. The last good checkpoint is step {good}; to continue from it, set checkpoint.fallback=True'
        )
    return what


def differing(saved: Mapping[str, Any], now: Mapping[str, Any], *, skip=lambda name: False) -> list[str]:
    """Lines 'name: saved a, now b', JSON-normalised."""
    plain = lambda x: json.loads(json.dumps(x, default=str))
    saved, now, absent = plain(dict(saved)), plain(dict(now)), '(absent)'
    return [
        f'{name}: saved {saved.get(name, absent)!r}, now {now.get(name, absent)!r}'
        for name in sorted({*saved, *now})
        if saved.get(name, absent) != now.get(name, absent) and not skip(name)
    ]


def listing(lines: list[str], limit: int = 5) -> str:
    return '; '.join(lines[:limit]) + (f'; and {len(lines) - limit} more' if len(lines) > limit else '')


def read_meta(folder: epath.Path, step: int) -> dict[str, Any]:
    """What a step says of itself: config, layout, data, shapes."""
    return json.loads((folder / str(step) / 'meta' / 'metadata').read_text())


def check_settings(folder: epath.Path, step: int, saved: Mapping, settings: Mapping, free: Callable[[str], bool]) -> None:
    """Raises CheckpointError if a step was made with other settings, but for those that are free."""
    if lines := differing(saved, settings, skip=free):
        raise CheckpointError(
            f'checkpoint {step} in {folder} was made with other settings: {listing(lines)}. '
            f'Run with the saved settings, or give another run_dir'
        )


def check(folder, fallback: bool, settings: Mapping[str, Any], free: Callable[[str], bool]) -> None:
    """Raises CheckpointError as `Checkpoints` and its `restore` would, without jax; of large files they alone read all.

    settings: the resolved config, flat. free: tells by name which of them may differ.
    """
    folder = located(folder)
    if str(folder).startswith(REMOTE) or not folder.exists():
        return
    sealed, _ = listed(folder)
    if sum(path.stat().length for path in _files(folder)) < QUICK:
        good, bad = newest(folder, sealed)
        if bad:
            refusal(folder, bad, good, fallback)
        if good is not None:
            check_settings(folder, good, read_meta(folder, good)['config'], settings, free)
