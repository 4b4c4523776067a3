"""Checkpoints: orbax writes and reads them, this file makes sure that what is read is what was written.

A step is valid when it is sealed: `integrity.json`, written last and whole or not at all, holds a digest of every file,
because orbax restores flipped bits without a word and takes an empty folder for the latest step. `attnx.json` beside the
steps lists those that were sealed, so that one that is gone, or lost its seal, is told from one that was never finished.
`meta` inside a step holds the resolved config, the state of the data and the shapes, all as JSON: nothing is unpickled.

The digests find damage, not forgery: who can write a folder can seal it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

SEAL = 'integrity.json'
MARK = 'attnx.json'
COMMIT = 'commit_success.txt'
FORMAT = 2
REMOTE = ('gs://', 's3://')
QUICK = 1 << 28  # bytes that are read before jax is imported
THREADS = 4  # that read files for their digests


class CheckpointError(ValueError):
    """A checkpoint is corrupt, foreign, of another config, or could not be written; the message says which, where."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """When checkpoints are written and which are kept."""

    every: int = 500  # steps between checkpoints; one is always written at the end; 0: at the end only
    keep_last: int = 2  # newest kept; at least 2, so that one is valid while the next is written
    keep_best: int = 1  # best kept by validation loss, beside the newest
    fallback: bool = False  # True: where the newest is corrupt, continue from the last good one
    elastic: bool = False  # True: continue on other devices or another mesh, equal to rounding only
    folder: str = ''  # where they are written: a folder, gs://… or s3://…; '': run_dir/checkpoints

    def __post_init__(self):
        if self.keep_last < 2 or self.keep_best < 0 or self.every < 0:
            raise ValueError(
                f'keep_last must be >= 2, keep_best and every >= 0; were given {self.keep_last}, '
                f'{self.keep_best}, {self.every}'
            )
        if '://' in self.folder and not self.folder.startswith(REMOTE):
            raise ValueError(f'folder {self.folder!r}: expected a local one, or {" or ".join(REMOTE)}')


def digest(folder: epath.Path) -> dict[str, str]:
    """Relative path -> BLAKE2b of its bytes, for every file below `folder` but the seal.

    Raises:
      ValueError: something below is a link, so it may lie elsewhere.
    """
    paths = [path for path in sorted(_files(folder)) if path.name not in (SEAL, SEAL + '.tmp')]
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


def _signature(seal: Mapping[str, Any]) -> str:
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
        seal, signature = written['seal'], written['digest']
        whole = _signature(seal) == signature and set(seal) == {'step', 'loss', 'files'}
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
    """The folder of checkpoints that `Config.folder` or a run names."""
    return epath.Path(folder if str(folder).startswith(REMOTE) else os.path.abspath(folder))


def listed(folder: epath.Path) -> tuple[set[int], str]:
    """(steps that were sealed, as MARK says; what is wrong with MARK, or '').

    Raises:
      CheckpointError: the folder holds what this project, or this version of it, did not write.
    """
    inside = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
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


def refusal(folder: epath.Path, bad: list[tuple[int, str]], good: int | None, config: Config) -> str:
    """What is wrong with the newest checkpoint.

    Raises:
      CheckpointError: there is no good one, or it is not to be used.
    """
    what = f'checkpoint {bad[0][0]} in {folder} is corrupt: {bad[0][1]}'
    if good is None:
        raise CheckpointError(f'{what}; there is no good checkpoint. To start anew give another run_dir')
    if not config.fallback:
        raise CheckpointError(
            f'{what}. The last good checkpoint is step {good}; to continue from it, set checkpoint.fallback=True'
        )
    return what


def check(folder, config: Config) -> None:
    """Raises CheckpointError as `Checkpoints` and its `restore` would, without jax; of large files they alone read all."""
    folder = located(folder)
    if str(folder).startswith(REMOTE) or not folder.exists():
        return
    sealed, _ = listed(folder)
    if sum(path.stat().length for path in _files(folder)) < QUICK:
        good, bad = newest(folder, sealed)
        if bad:
            refusal(folder, bad, good, config)


def shapes(state: Any) -> dict[str, list]:
    """Path of every leaf -> [shape, dtype]."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator='/'): [list(x.shape), str(x.dtype)] for path, x in leaves}


def differing(saved: Mapping[str, Any], now: Mapping[str, Any], *, skip=lambda name: False) -> list[str]:
    """Lines 'name: saved a, now b', JSON-normalised."""
    plain = lambda x: json.loads(json.dumps(x, default=str))
    saved, now, absent = plain(dict(saved)), plain(dict(now)), '(absent)'
    return [
        f'{name}: saved {saved.get(name, absent)!r}, now {now.get(name, absent)!r}'
        for name in sorted({*saved, *now})
        if saved.get(name, absent) != now.get(name, absent) and not skip(name)
    ]


def _listing(lines: list[str], limit: int = 5) -> str:
    return '; '.join(lines[:limit]) + (f'; and {len(lines) - limit} more' if len(lines) > limit else '')


def _replace(path: epath.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    draft = path.parent / (path.name + '.tmp')
    with draft.open('w') as stream:
        stream.write(text)
        stream.flush()
        with contextlib.suppress(OSError, AttributeError, ValueError):  # remote streams have no descriptor
            os.fsync(stream.fileno())
    draft.replace(path)


def agreed(value: Any) -> Any:
    """A JSON-able value of process 0, on every process."""
    if jax.process_count() == 1:
        return value
    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(raw.size)))
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(np.resize(raw, size))))


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
      folder: created if absent.
      config: see Config.
      settings: the resolved config, flat; saved inside every checkpoint and compared on restore.
      free: tells by name which settings may change between save and restore.
      layout: what else decides the bits of a run (mesh, preset, devices); may change with `config.elastic` only.

    Raises:
      CheckpointError: the folder holds what this project did not write.
    """

    def __init__(
        self,
        folder,
        config: Config,
        settings: Mapping[str, Any],
        *,
        free: Callable[[str], bool] = lambda name: False,
        layout: Mapping[str, Any] | None = None,
    ):
        self.folder = located(folder)
        self.config, self.settings, self.free = config, dict(settings), free
        self.layout = dict(layout or {})
        self.notes: list[str] = []  # what was done on opening and restoring, for the log
        self.stalled = 0.0  # seconds that saving has held up its caller so far
        self._unsealed: tuple[int, float | None] | None = None
        self._sealing: concurrent.futures.Future | None = None
        self._main = jax.process_index() == 0
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._sealed: set[int] = set()  # process 0: steps with a seal, as MARK lists them
        if problem := agreed(self._claim() if self._main else None):
            raise CheckpointError(problem)
        self._manager: Any = self._open()

    def _claim(self) -> str | None:
        """Takes the folder and removes what was never finished; says why it can't."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sealed, problem = listed(self.folder)
            self.notes += [f'{problem}: written anew'] if problem else []
            for step in steps_in(self.folder, sealed=False):
                if (self._path(step) / SEAL).exists():
                    self._sealed.add(step)
                elif step not in self._sealed and not os.path.islink(self._path(step)):
                    self._path(step).rmtree()
                    self.notes.append(f'checkpoint {step} was never finished: removed')
            self._mark()
        except CheckpointError as error:
            return str(error)
        except (OSError, ImportError) as error:  # fsspec names the package that a remote path needs
            return f'checkpoints in {self.folder} can not be opened: {error}'
        return None

    def _mark(self):
        _replace(self.folder / MARK, json.dumps({'format': FORMAT, 'sealed': sorted(self._sealed)}))

    def _open(self):
        import orbax.checkpoint as ocp  # slow: a config that can't be served is refused before

        # Nothing is deleted by orbax: a step must lose its seal before its files.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,
            atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def _path(self, step: int) -> epath.Path:
        return self.folder / str(step)

    def steps(self) -> list[int]:
        """Sealed steps, oldest first. Their content is verified by `restore` only."""
        return steps_in(self.folder, sealed=True)

    def latest(self) -> int | None:
        return self.steps()[-1] if self.steps() else None

    # Writing

    def save(self, step: int, state: Any, data: Mapping[str, Any], loss: float | None = None) -> None:
        """Begins to write a checkpoint; arrays are copied before this returns, the rest happens in the background.

        Args:
          data: JSON-able; `restore` gives it back.
          loss: the validation loss at this step, if known; decides which checkpoint is best.

        Raises:
          CheckpointError: this one, or the one before, could not be written, e.g. because the disk is full.
        """
        import orbax.checkpoint as ocp

        began = time.monotonic()
        self.wait()
        meta = {'config': self.settings, 'layout': self.layout, 'data': dict(data), 'shapes': shapes(state), 'step': step}
        meta = json.loads(json.dumps(meta, default=str))
        with self._named(step):
            saved = self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
            )
        if not saved:
            raise CheckpointError(f'checkpoint {step} was not written: {self.folder} already has {self.latest()}')
        self._unsealed = step, None if loss is None else float(loss)
        self.stalled += time.monotonic() - began

    def poll(self) -> None:
        """Cheap; to be called after every step: seals what has been committed meanwhile, and raises what went wrong."""
        if self._unsealed is not None and not self._manager.is_saving_in_progress():
            self._seal()
        if self._sealing is not None and self._sealing.done():
            self._finish()

    def wait(self) -> None:
        """Returns when everything saved so far is valid on disk."""
        if self._unsealed is not None:
            self._seal()
        if self._sealing is not None:
            self._finish()

    def _seal(self):
        """Waits for the commit; the digest is then made in the background."""
        assert self._unsealed is not None
        (step, loss), self._unsealed = self._unsealed, None
        with self._named(step):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if not (self._path(step) / COMMIT).exists():
                raise OSError('it was not committed')
        if self._main:
            self._sealing = self._pool.submit(self._write_seal, step, loss)

    def _write_seal(self, step, loss):
        with self._named(step):
            seal = {'step': step, 'loss': loss, 'files': digest(self._path(step))}
            _replace(self._path(step) / SEAL, json.dumps({'seal': seal, 'digest': _signature(seal)}))
            self._sealed.add(step)
            self._retire()

    def _retire(self):
        """Removes all but the newest and the best: first from the list, then the seal, then the files."""
        losses = {}
        for step in self._sealed:
            with contextlib.suppress(ValueError):
                losses[step] = read_seal(self._path(step))['loss']
        known = [step for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
        keep = {*sorted(losses)[-self.config.keep_last :], *sorted(known, key=losses.get)[: self.config.keep_best]}
        gone = set(losses) - keep
        self._sealed -= gone
        self._mark()
        for step in gone:
            (self._path(step) / SEAL).unlink()
            self._path(step).rmtree()

    def _finish(self):
        future, self._sealing = self._sealing, None
        future.result()

    @contextlib.contextmanager
    def _named(self, step):
        try:
            yield
        except Exception as error:
            text = f'{error} {error.__cause__ or ""} {error.__context__ or ""}'
            full = any(hint in text for hint in ('No space left', 'ENOSPC', 'RESOURCE_EXHAUSTED', 'Disk quota'))
            reason = 'the disk is full' if full else (str(error).strip().splitlines() or [repr(error)])[0][:300]
            valid = [s for s in self.steps() if s != step]
            raise CheckpointError(
                f'checkpoint {step} could not be written to {self.folder}: {reason}; '
                + (f'the last valid checkpoint is step {valid[-1]}' if valid else 'there is no earlier checkpoint')
            ) from error

    def preempted(self, step: int) -> bool:
        """Whether all processes were told to stop; ask after every step, on every process."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Waits for what is being written, then lets go of the folder. Raises as `wait`, after closing."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            with contextlib.suppress(Exception):
                self._manager.close()

    # Reading

    def restore(self, like: Any, accept: Callable[[dict], None] = lambda data: None) -> tuple[int, Any, dict] | None:
        """The newest checkpoint as (step, state, data as saved); None where there is none.

        Args:
          like: the state as ShapeDtypeStructs with shardings; where the arrays are put.
          accept: is given the data; raises where it does not fit. Called before any array is read.

        Raises:
          CheckpointError: it is corrupt (the last good one is named; it is used with `fallback` only), was made with
            other settings or on another mesh (they are named), or holds other arrays than this model.
        """
        import orbax.checkpoint as ocp

        step, bad = agreed(newest(self.folder, self._sealed) if self._main else None)
        if bad:
            self._set_aside(bad, step)
        if step is None:
            return None
        meta = agreed(json.loads((self._path(step) / 'meta' / 'metadata').read_text()) if self._main else None)
        where = f'checkpoint {step} in {self.folder}'
        if lines := differing(meta['config'], self.settings, skip=self.free):
            raise CheckpointError(
                f'{where} was made with other settings: {_listing(lines)}. '
                f'Run with the saved settings, or give another run_dir'
            )
        if lines := differing(meta['layout'], self.layout):
            if not self.config.elastic:
                raise CheckpointError(
                    f'{where} was made on another layout: {_listing(lines)}. Sums would be taken in another order, so the '
                    f'run would go on equal to rounding only; to accept that, set checkpoint.elastic=True'
                )
            self.notes.append(f'{where} was made on another layout, so the run goes on to rounding only: {_listing(lines)}')
        if lines := differing(meta['shapes'], shapes(like)):
            raise CheckpointError(f'{where} holds other arrays than this model: {_listing(lines)}')
        accept(meta['data'])
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))
        return step, restored.state, meta['data']

    def _set_aside(self, bad: list[tuple[int, str]], good: int | None):
        what = refusal(self.folder, bad, good, self.config)
        self._manager.close()
        aside = self.folder / 'corrupt'
        if self._main:
            aside.mkdir(parents=True, exist_ok=True)
            self._sealed -= dict(bad).keys()
            self._mark()
            for step, _ in bad:
                target = aside / str(step)
                if target.exists():
                    target.rmtree()
                if self._path(step).exists():
                    self._path(step).rename(target)
        agreed(None)  # the others wait until they are gone
        self.notes.append(f'{what}; moved to {aside}, continuing from step {good}')
        self._manager = self._open()
