"""A run as a process among others: signals, the lock of its folder, a disk that may be full."""

import contextlib
import errno
import fcntl
import pathlib
import signal
import threading

import jax


class Stop:
    """Notes SIGTERM and SIGINT, so that the loop can save and leave. A second signal acts as usual."""

    def __init__(self, active: bool):
        self.received: str | None = None
        self._old = {}
        if active and threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number, frame):
        self.received = signal.Signals(number).name
        self.restore()

    def restore(self):
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}


@contextlib.contextmanager
def locked(run_dir: pathlib.Path):
    """Holds the run directory for this process.

    Raises:
      ValueError: another process trains in it.
    """
    with (run_dir / 'lock').open('w') as stream:
        if jax.process_index() == 0:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f'another process trains in {run_dir}; wait for it, or give another run_dir') from None
        yield


@contextlib.contextmanager
def writable(run_dir: pathlib.Path):
    """A full disk is told as what it is."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f'{error.filename or run_dir} could not be written: the disk is full') from error
        raise
