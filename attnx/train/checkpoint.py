"""Checkpoints: orbax writes and reads them, `attnx.train.seal` makes sure that what is read is what was written.

orbax restores flipped bits without a word and takes an empty folder for the latest step: only what is sealed is valid.
`meta` inside a step holds the resolved config, the state of the data and the shapes, all as JSON: nothing is unpickled.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from attnx.train import seal as seal_lib
from attnx.train.seal import MARK, REMOTE, SEAL, CheckpointError, check_settings, differing, listing

COMMIT = 'commit_success.txt'


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


def shapes(state: Any) -> dict[str, list]:
    """Path of every leaf -> [shape, dtype]."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator='/'): [list(x.shape), str(x.dtype)] for path, x in leaves}


def agreed(value: Any) -> Any:
    """A JSON-able value of process 0, on every process."""
    if jax.process_count() == 1:
        return value
    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(raw.size)))
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(np.resize(raw, size))))


def _remove(folder: epath.Path, seconds: float = 10.0) -> None:
    """Removes what was never finished; a writer of this process that failed may still be letting go of files in it."""
    end = time.monotonic() + seconds
    while folder.exists():
        try:
            folder.rmtree()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY) or time.monotonic() > end:
                raise
            time.sleep(0.05)


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
        self.folder = seal_lib.located(folder)
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
            self._sealed, problem = seal_lib.listed(self.folder)
            self.notes += [f'{problem}: written anew'] if problem else []
            for step in seal_lib.steps_in(self.folder, sealed=False):
                if (self._path(step) / SEAL).exists():
                    self._sealed.add(step)
                elif step not in self._sealed and not os.path.islink(self._path(step)):
                    _remove(self._path(step))
                    self.notes.append(f'checkpoint {step} was never finished: removed')
            self._mark()
        except CheckpointError as error:
            return str(error)
        except (OSError, ImportError) as error:  # fsspec names the package that a remote path needs
            return f'checkpoints in {self.folder} can not be opened: {error}'
        return None

    def _mark(self):
        seal_lib.replace(self.folder / MARK, json.dumps({'format': seal_lib.FORMAT, 'sealed': sorted(self._sealed)}))

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
        return seal_lib.steps_in(self.folder, sealed=True)

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
            seal = {'step': step, 'loss': loss, 'files': seal_lib.digest(self._path(step))}
            seal_lib.replace(self._path(step) / SEAL, json.dumps({'seal': seal, 'digest': seal_lib.signature(seal)}))
            self._sealed.add(step)
            self._retire()

    def _retire(self):
        """Removes all but the newest and the best: first from the list, then the seal, then the files."""
        losses = {}
        for step in self._sealed:
            with contextlib.suppress(ValueError):
                losses[step] = seal_lib.read_seal(self._path(step))['loss']
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

        step, bad = agreed(seal_lib.newest(self.folder, self._sealed) if self._main else None)
        if bad:
            self._set_aside(bad, step)
        if step is None:
            return None
        meta = agreed(seal_lib.read_meta(self.folder, step) if self._main else None)
        where = f'checkpoint {step} in {self.folder}'
        check_settings(self.folder, step, meta['config'], self.settings, self.free)
        if lines := differing(meta['layout'], self.layout):
            if not self.config.elastic:
                raise CheckpointError(
                    f'{where} was made on another layout: {listing(lines)}. Sums would be taken in another order, so the '
                    f'run would go on equal to rounding only; to accept that, set checkpoint.elastic=True'
                )
            self.notes.append(f'{where} was made on another layout, so the run goes on to rounding only: {listing(lines)}')
        if lines := differing(meta['shapes'], shapes(like)):
            raise CheckpointError(f'{where} holds other arrays than this model: {listing(lines)}')
        accept(meta['data'])
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))
        return step, restored.state, meta['data']

    def _set_aside(self, bad: list[tuple[int, str]], good: int | None):
        what = seal_lib.refusal(self.folder, bad, good, self.config.fallback)
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
