"""Where numbers go: `metrics.jsonl` is the truth; TensorBoard, W&B and the progress line mirror it."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from attnx.names import printable

FILE = 'metrics.jsonl'
TIMES = ('tokens_per_second', 'mfu', 'stalled_seconds')  # what differs between equal runs

# Dense bfloat16 peak, FLOP/s per device, by the device kind that jax reports (vendors' data sheets).
PEAKS = {
    'NVIDIA A100': 312e12,
    'NVIDIA H100 PCIe': 756e12,
    'NVIDIA H100': 989e12,
    'NVIDIA H200': 989e12,
    'NVIDIA GH200': 989e12,
    'NVIDIA B200': 2250e12,
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5': 459e12,
    'TPU v6': 918e12,
    'TPU7x': 2307e12,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is logged, and where to."""

    every: int = 10  # steps between lines of the log
    tensorboard: bool = False  # also write run_dir/tensorboard
    wandb: bool = False  # also log to Weights & Biases (pip install wandb)
    project: str = 'attnx'  # W&B project
    peak_flops: float | None = None  # peak FLOP/s of a device, for MFU; None: known devices' bfloat16 peak

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f'every must be >= 1, was given {self.every}')
        if self.project != 'attnx' and not self.wandb:
            raise ValueError(f'project {self.project!r} belongs to wandb, which is off')
        if self.peak_flops is not None and self.peak_flops <= 0:
            raise ValueError(f'peak_flops must be positive, was given {self.peak_flops}')


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of a device, by the longest known prefix of its kind; None where unknown (CPU)."""
    known = [name for name in PEAKS if device_kind.startswith(name)]
    return PEAKS[max(known, key=len)] if known else None


def line(values: Mapping[str, Any]) -> str:
    """One JSON line: scalars as floats, NaN and Inf as strings (JSON lacks them), lists of such, the rest as it is."""

    def plain(value):
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if value is None or isinstance(value, str | bool | int):
            return value
        value = float(value)
        return value if math.isfinite(value) else str(value)

    return json.dumps({name: plain(value) for name, value in values.items()})


def read(run_dir) -> list[dict]:
    """The lines of a run's log; what can't be read, such as a last line cut short by a kill, is left out."""
    found = []
    path = pathlib.Path(run_dir) / FILE
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def check(config: Config) -> None:
    """Raises ValueError for a mirror that was asked for and is not installed."""
    for asked, module, hint in (
        (config.tensorboard, 'tensorboardX', 'tensorboardX'),
        (config.wandb, 'wandb', "wandb, or 'attnx[wandb]'"),
    ):
        if asked and importlib.util.find_spec(module) is None:
            name = 'tensorboard' if module == 'tensorboardX' else module
            raise ValueError(f'log.{name} is True, but {module} is not installed: pip install {hint}')


class Log:
    """Writes lines to JSONL and the mirrors. On resume, lines after the restored step are cut off: steps never repeat.

    Raises:
      ValueError: a mirror was asked for that is not installed.
    """

    def __init__(self, run_dir, config: Config, settings: Mapping[str, Any]):
        check(config)
        self.run_dir, self.config, self.settings = pathlib.Path(run_dir), config, settings
        self._stream = self._board = self._wandb = None

    def open(self, step: int | None) -> None:
        """Begins to write after `step`; None: from the beginning."""
        if jax.process_index():
            return
        self.close()
        kept = [] if step is None else [entry for entry in read(self.run_dir) if entry['step'] <= step]
        path = self.run_dir / FILE
        draft = path.with_suffix('.tmp')
        draft.write_text(''.join(json.dumps(entry) + '\n' for entry in kept))
        os.replace(draft, path)
        self._stream = path.open('a', buffering=1)
        if self.config.tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self.run_dir / 'tensorboard'), flush_secs=10, purge_step=(step or 0) + 1)
        if self.config.wandb:
            import wandb

            # One id a run directory: a resumed run goes on where it was, another 'base' elsewhere is another run.
            place = hashlib.sha256(str(self.run_dir.absolute()).encode()).hexdigest()[:8]
            try:
                self._wandb = wandb.init(
                    project=self.config.project, name=self.run_dir.name, id=place, resume='allow',
                    dir=str(self.run_dir), config=dict(self.settings),
                    settings=wandb.Settings(disable_git=True, save_code=False),
                )  # fmt: skip
            except wandb.Error as error:
                raise ValueError(
                    f'log.wandb: {error}; `wandb login` first, or WANDB_MODE=offline writes to {self.run_dir}/wandb'
                ) from None

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """One line {'step', 'split', …}; `split` is 'train', 'eval' or 'health'. Lists go to JSONL only.

        Raises:
          ValueError: it can't be written, e.g. because the disk is full.
        """
        if self._stream is None:
            return
        try:
            self._stream.write(line({'step': step, 'split': split} | dict(values)) + '\n')
        except OSError as error:
            raise ValueError(f'{self.run_dir / FILE} could not be written: {error.strerror or error}') from error
        numbers = {f'{split}/{k}': float(v) for k, v in values.items() if not isinstance(v, list | str | bool | None)}
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def sync(self) -> None:
        """Returns when all lines are on the disk, so that a checkpoint never outlives the lines before it."""
        if self._stream:
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        for mirror in (self._stream, self._board):
            if mirror:
                with contextlib.suppress(OSError):  # a full disk was told when it was met
                    mirror.close()
        if self._wandb:
            self._wandb.finish()
        self._stream = self._board = self._wandb = None


class Progress:
    """A live line on stderr where it is a terminal, plain lines elsewhere; nothing on processes other than 0."""

    def __init__(self, total: int, step: int, stream=None):
        self.stream = sys.stderr if stream is None else stream
        self.total, self.start, self.began = total, step, time.monotonic()
        self._live = self._task = None
        self._main = jax.process_index() == 0
        if self._main and self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Live

            columns = (TextColumn('train'), BarColumn(), MofNCompleteColumn(), TextColumn('{task.fields[text]}'))
            self._live = Live(*columns, console=Console(file=self.stream), refresh_per_second=2)
            self._live.start()
            self._task = self._live.add_task('train', total=total, completed=step, text='')

    def update(self, step: int, values: Mapping[str, float], final: bool = False) -> None:
        """Shows a step's numbers: loss, tokens/s, MFU where known, time left."""
        left = (time.monotonic() - self.began) / max(step - self.start, 1) * (self.total - step)
        parts = [f'loss {values["loss"]:.4f}']
        if 'eval_loss' in values:
            parts.append(f'eval {values["eval_loss"]:.4f}')
        if 'tokens_per_second' in values:
            parts.append(f'{values["tokens_per_second"]:,.0f} tokens/s')
        if 'mfu' in values:
            parts.append(f'MFU {100 * values["mfu"]:.1f} %')
        parts.append(f'ETA {int(left) // 60}:{int(left) % 60:02d}')
        text = '  '.join(parts)
        if self._live:
            self._live.update(self._task, completed=step, text=text)
        elif self._main:
            self.say(f'step {step}/{self.total}  {text}')

    def advance(self, step: int) -> None:
        if self._live:
            self._live.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """A message that stays."""
        text = printable(text)
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        elif self._main:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None
