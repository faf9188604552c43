"""Locks files across processes and threads; a lock ends with its process, even if it crashes.

The lock is on an open file, not in its existence: a leftover file locks nothing.
"""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from veneer.errors import InputError
from veneer.files.system_errors import explained

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

WAIT_SECONDS = 120.0
_POLL_SECONDS = 0.005
_LOCKED_ERRORS = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}
"""Error numbers for a lock that another process holds, Windows included."""


class BusyError(InputError):
    """Another process holds the lock."""


@contextmanager
def locked(
    path: Path, *, shared: bool = False, wait_seconds: float = WAIT_SECONDS
) -> Iterator[int]:
    """Holds the lock file `path` within the block; shared: together with other shared holders (not
    on Windows).

    Yields the descriptor. A child process that inherits it holds the lock until it ends.

    Raises BusyError if others hold it for longer than wait_seconds, InputError if the folder is not
    writable or its file system has no locks. An exclusive holder may remove the file before it
    releases the lock: no other process has locked it then.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        with explained(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            while not _try_lock(path, descriptor, shared=shared):
                if time.monotonic() >= deadline:
                    waited = f" for {wait_seconds:.0f} s" if wait_seconds else ""
                    raise BusyError(
                        f"{path.parent} is busy: another process is using it{waited}",
                        [],
                        "Wait until it is done, then try again.",
                    )
                time.sleep(_POLL_SECONDS)
            if not _is_current(path, descriptor):
                continue
            yield descriptor
            return
        finally:
            with suppress(OSError):  # nothing was written, and it is closed in any case
                os.close(descriptor)  # unlocks


def unlock(descriptor: int) -> None:
    """Releases an inherited lock, for all processes that inherited it."""
    if sys.platform != "win32":
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _is_current(path: Path, descriptor: int) -> bool:
    """Whether the locked file is still the one at `path`: its last holder may have removed it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _try_lock(path: Path, descriptor: int, *, shared: bool) -> bool:
    """Whether the lock was acquired; False if another process holds it."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as fault:
        if fault.errno in _LOCKED_ERRORS:
            return False
        raise InputError(
            f"{path.parent} cannot be locked: {fault.strerror}",
            ["its file system has no locks, so two commands could change it at once"],
            "Choose a folder on another file system, or mount it with locks (Lustre: -o flock; NFS:"
            " without nolock).",
        ) from fault
    return True
