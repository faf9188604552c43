"""Suspends the trainer of a job while requests wait for their first token.

A server opens the named pipe `.waiting` of the store for as long as a request waits, and writes a
byte. While anybody has the pipe open, the worker of the running job suspends the trainer and all
processes of its group (SIGSTOP); then it continues them (SIGCONT). A budget limits the suspension.

The pipe closes when the server's process ends, however it ends. If the worker ends, the kernel
continues the trainer, because a suspended process group without a parent in its session gets
SIGHUP and SIGCONT; the trainer saves a checkpoint and ends.

Linux only. On other systems a trainer is never suspended.
"""

import logging
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

log = logging.getLogger("veneer.jobs")
PIPE = ".waiting"
PERIOD_SECONDS = 4.0
"""Time of one suspension and of the training after it, if requests always wait. Shorter than the
time that processes of a failed run have to end (training/processes/launch.py)."""
LEAST_SECONDS = 0.1
"""Budget below which no suspension begins."""
_READ_BYTES = 4096


@contextmanager
def trainer_suspended(store_folder: Path) -> Iterator[None]:
    """Asks the worker of the running job to suspend its trainer within the block."""
    descriptor = None
    if sys.platform == "linux":
        with suppress(OSError):  # no trainer runs, or no file can be opened
            descriptor = os.open(store_folder / PIPE, os.O_WRONLY | os.O_NONBLOCK)
    if descriptor is None:
        yield
        return
    try:
        with suppress(OSError):  # the pipe is full, or the trainer has just ended
            os.write(descriptor, b".")
        yield
    finally:
        os.close(descriptor)


class SuspensionBudget:
    """Counts the seconds for which a trainer may be suspended.

    They go down while it is suspended and up while it runs, so that it runs at least this share of
    the time on average.
    """

    def __init__(self, share: float) -> None:
        self._most = (1 - share) * PERIOD_SECONDS
        self._gain = (1 - share) / share
        self.seconds = self._most

    def count(self, seconds: float, *, suspended: bool) -> None:
        """Counts some time for which the trainer was suspended, or ran."""
        change = -seconds if suspended else seconds * self._gain
        self.seconds = min(self.seconds + change, self._most)

    def allows(self, *, suspended: bool) -> bool:
        """Returns whether a suspended trainer may stay so, or a running one may be suspended."""
        return self.seconds > (0 if suspended else LEAST_SECONDS)


class Suspension:
    """Suspends and continues a trainer. Leaving its block continues the trainer.

    group: the number of the trainer's process group, whose leader the caller has not waited for
    share: part of the time that the trainer runs, whatever waits; at 1 it is never suspended
    """

    def __init__(self, group: int, store_folder: Path, share: float) -> None:
        self._group, self._path = group, store_folder / PIPE
        self._budget = SuspensionBudget(share)
        self._is_active = share < 1 and sys.platform == "linux"
        self._is_asked = self._is_suspended = False
        self._pipe: int | None = None
        self._last_count = time.monotonic()

    def __enter__(self) -> Self:
        if self._is_active:
            try:
                self._path.unlink(missing_ok=True)
                os.mkfifo(self._path, 0o600)
                self._pipe = self._open()
            except OSError as fault:  # a file system without pipes
                log.warning("The trainer is not suspended while requests wait: %s", fault)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Continues the trainer, and never suspends it again."""
        self._set_suspended(False)
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe, self._is_asked = None, False
            self._path.unlink(missing_ok=True)

    def release(self) -> None:
        """Continues the trainer until the next `wait`, because its worker does something long."""
        self._set_suspended(False)

    def wait(self, seconds: float) -> None:
        """Waits at most this time, and returns earlier if requests begin or end to wait. Suspends
        or continues the trainer then."""
        if self._is_suspended:
            seconds = max(min(seconds, self._budget.seconds), 0)
        pipes = [] if self._pipe is None else [self._pipe]
        if select.select(pipes, [], [], seconds)[0]:
            self._read()
        now = time.monotonic()
        self._budget.count(now - self._last_count, suspended=self._is_suspended)
        self._last_count = now
        is_allowed = self._budget.allows(suspended=self._is_suspended)
        self._set_suspended(self._is_asked and is_allowed)

    def _set_suspended(self, is_suspended: bool) -> None:
        if is_suspended != self._is_suspended:
            with suppress(ProcessLookupError):  # it was killed
                os.killpg(self._group, signal.SIGSTOP if is_suspended else signal.SIGCONT)
            self._is_suspended = is_suspended

    def _open(self) -> int:
        return os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)

    def _read(self) -> None:
        """Empties the pipe, and notes whether anybody has it open."""
        assert self._pipe is not None
        try:
            while os.read(self._pipe, _READ_BYTES):
                pass
        except BlockingIOError:
            self._is_asked = True
            return
        self._is_asked = False
        last_pipe, self._pipe = self._pipe, None
        with suppress(FileNotFoundError):  # somebody has deleted it
            self._pipe = self._open()
        os.close(last_pipe)  # select would return at once from now on
