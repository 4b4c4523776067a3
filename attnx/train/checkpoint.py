"""Checkpoints: orbax writes and reads them, this file makes sure that what is read is what was written.

A step is valid when it is committed and sealed: `integrity.json`, written last, holds a digest of every file, because
orbax restores flipped bits without a word. `meta` inside it holds the resolved config, the state of the data and the
shapes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

SEAL = 'integrity.json'
MARK = 'attnx.json'
COMMIT = 'commit_success.txt'


class CheckpointError(ValueError):
    """A checkpoint is corrupt, foreign, of another config, or could not be written; the message says which, where."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """When checkpoints are written and which are kept."""

    every: int = 500  # steps between checkpoints; one is always written at the end; 0: at the end only
    keep_last: int = 2  # newest kept; at least 2, so that one is valid while the next is written
    keep_best: int = 1  # best kept by validation loss, beside the newest
    fallback: bool = False  # True: where the newest is corrupt, continue from the last good one

    def __post_init__(self):
        if self.keep_last < 2 or self.keep_best < 0 or self.every < 0:
            raise ValueError(
                f'keep_last must be >= 2, keep_best and every >= 0; were given {self.keep_last}, '
                f'{self.keep_best}, {self.every}'
            )


def digest(folder: epath.Path) -> dict[str, str]:
    """Relative path -> BLAKE2b of its bytes, for every file below `folder` but the seal."""
    found = {}
    for path in sorted(_files(folder)):
        if path.name != SEAL:
            hasher = hashlib.blake2b(digest_size=16)
            with path.open('rb') as stream:
                while block := stream.read(1 << 24):
                    hasher.update(block)
            found[str(path.relative_to(folder))] = hasher.hexdigest()
    return found


def _files(folder):
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def damage(folder: epath.Path) -> str | None:
    """What is wrong with a step's folder, or None."""
    if not (folder / SEAL).exists():
        return f'has no {SEAL}'
    try:
        sealed = json.loads((folder / SEAL).read_text())['files']
    except (ValueError, KeyError, TypeError):
        return f'{SEAL} is unreadable'
    found = digest(folder)
    if missing := sorted(set(sealed) - set(found)):
        return f'{missing[0]} is missing'
    if changed := [name for name in sealed if sealed[name] != found[name]]:
        return f'{changed[0]} differs from its digest'
    return None


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


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
      folder: created if absent.
      config: see Config.
      settings: the resolved config, flat; saved inside every checkpoint and compared on restore.
      free: tells by name which settings may change between save and restore.

    Raises:
      CheckpointError: the folder holds what this project did not write.
    """

    def __init__(self, folder, config: Config, settings: Mapping[str, Any], *, free=lambda name: False):
        self.folder, self.config, self.settings, self.free = epath.Path(folder), config, dict(settings), free
        self.notes: list[str] = []  # what was done on opening and restoring, for the log
        self._unsealed: int | None = None
        self._sealing: concurrent.futures.Future | None = None
        self._main = jax.process_index() == 0
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        if self._main:
            self._claim()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices('checkpoints opened')
        self._manager = self._open()

    def _claim(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        inside = sorted(path.name for path in self.folder.iterdir())
        if inside and MARK not in inside:
            raise CheckpointError(
                f'{self.folder} holds foreign files ({", ".join(inside[:3])}): no {MARK}, so they are no checkpoints '
                f'of this project; give another run_dir'
            )
        (self.folder / MARK).write_text(json.dumps({'format': 1}))
        for step in self._steps():
            if not (self._path(step) / SEAL).exists():
                self._path(step).rmtree()
                self.notes.append(f'checkpoint {step} was never finished: removed')

    def _open(self):
        import orbax.checkpoint as ocp  # slow: a config that can't be served is refused before
        from orbax.checkpoint.checkpoint_managers import preservation_policy

        policies = [preservation_policy.LatestN(self.config.keep_last)]
        if self.config.keep_best:
            policies.append(
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics['loss'],
                    reverse=True,
                    n=self.config.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def _path(self, step: int) -> epath.Path:
        return self.folder / str(step)

    def _steps(self) -> list[int]:
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def steps(self) -> list[int]:
        """Sealed steps, oldest first. Their content is verified by `restore` only."""
        return [step for step in self._steps() if (self._path(step) / SEAL).exists()]

    def latest(self) -> int | None:
        return self.steps()[-1] if self.steps() else None

    # Writing

    def save(self, step: int, state: Any, data: Mapping[str, Any], loss: float | None = None) -> None:
        """Begins to write a checkpoint; arrays are copied before this returns, the rest happens in the background.

        Args:
          loss: the validation loss at this step, if known; decides which checkpoint is best.

        Raises:
          CheckpointError: this one, or the one before, could not be written, e.g. because the disk is full.
        """
        import orbax.checkpoint as ocp

        self.wait()
        meta = {'config': self.settings, 'data': dict(data), 'shapes': shapes(state), 'step': step}
        meta = json.loads(json.dumps(meta, default=str))
        with self._named(step):
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
                metrics=None if loss is None else {'loss': float(loss)},
            )
        if not saved:
            raise CheckpointError(f'checkpoint {step} was not written: {self.folder} already has {self.latest()}')
        self._unsealed = step

    def poll(self) -> None:
        """Cheap; to be called after every step: seals what has been committed meanwhile, and raises what went wrong."""
        if self._unsealed is not None and not self._manager.is_saving_in_progress():
            self._seal()
        if self._sealing is not None and self._sealing.done():
            self._sealed()

    def wait(self) -> None:
        """Returns when everything saved so far is valid on disk."""
        if self._unsealed is not None:
            self._seal()
        if self._sealing is not None:
            self._sealed()

    def _seal(self):
        """Waits for the commit; the digest is then made in the background."""
        step, self._unsealed = self._unsealed, None
        with self._named(step):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if not (self._path(step) / COMMIT).exists():
                raise OSError('it was not committed')
        if self._main:
            self._sealing = self._pool.submit(self._write_seal, step)

    def _write_seal(self, step):
        path = self._path(step)
        with self._named(step):
            draft = path / (SEAL + '.tmp')
            draft.write_text(json.dumps({'files': digest(path)}))
            draft.rename(path / SEAL)

    def _sealed(self):
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

    def restore(self, like: Any) -> tuple[int, Any, dict] | None:
        """The newest checkpoint as (step, state, state of the data); None where there is none.

        Args:
          like: the state as ShapeDtypeStructs with shardings; where the arrays are put.

        Raises:
          CheckpointError: it is corrupt (the last good one is named; it is used with `fallback` only), was made with
            other settings (they are named), or holds other arrays than this model.
        """
        import orbax.checkpoint as ocp

        steps = self.steps()
        if not steps:
            return None
        bad = {}
        while steps and (problem := damage(self._path(steps[-1]))):
            bad[steps.pop()] = problem
        if bad:
            self._refuse_or_set_aside(bad, steps)
        step = steps[-1]
        meta = json.loads((self._path(step) / 'meta' / 'metadata').read_text())
        where = f'checkpoint {step} in {self.folder}'
        if lines := differing(meta['config'], self.settings, skip=self.free):
            raise CheckpointError(
                f'{where} was made with other settings: {_listing(lines)}. '
                f'Run with the saved settings, or give another run_dir'
            )
        if lines := differing(meta['shapes'], shapes(like)):
            raise CheckpointError(f'{where} holds other arrays than this model: {_listing(lines)}')
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))
        return step, restored.state, meta['data']

    def _refuse_or_set_aside(self, bad: dict[int, str], good: list[int]):
        newest = max(bad)
        what = f'checkpoint {newest} in {self.folder} is corrupt: {bad[newest]}'
        if not good:
            raise CheckpointError(f'{what}; there is no good checkpoint. To start anew give another run_dir')
        if not self.config.fallback:
            raise CheckpointError(
                f'{what}. The last good checkpoint is step {good[-1]}; '
                f'to continue from it, set checkpoint.fallback=True'
            )
        self._manager.close()
        if self._main:
            aside = self.folder.parent / 'corrupt'
            aside.mkdir(parents=True, exist_ok=True)
            for step in bad:
                target = aside / str(step)
                if target.exists():
                    target.rmtree()
                self._path(step).rename(target)
        self.notes.append(f'{what}; moved to {self.folder.parent / "corrupt"}, continuing from step {good[-1]}')
        self._manager = self._open()
