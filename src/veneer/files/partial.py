"""Unfinished files and folders: what they are called, whose they are, and that they go once their
writer is dead.

    .partial-<machine>-<pid>-<start>-<n>

A process is its number and the time it started; `machine` is a hash of the host and its space of
process numbers (containers have their own). Neither a host's name nor a container's number is one
of its kind: the machine's own id stands beside them, for a container, which ends with it, that of
the machine's start. What another machine writes cannot be judged from here and is left alone, as is
everything on Windows.
"""

import calendar
import errno
import hashlib
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".partial-"
_NAME = re.compile(r"\.partial-([0-9a-f]{8})-(\d+)-(\d+)-\d+")
_MACHINE, _START = Path("/etc/machine-id"), Path("/proc/sys/kernel/random/boot_id")
_WHOLE_MACHINE = "pid:[4026531836]"
"""Linux gives its first space of process numbers this number, on every machine."""
_THERE_IS_NONE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
_COUNTER = itertools.count()
_OPEN: set[str] = set()
"""What this process is writing now."""


@contextmanager
def unfinished(parent: Path) -> Iterator[Path]:
    """A path in `parent` that nothing bears yet and that says who writes there; what still stands
    there at the end is removed, now or, if the system does not let us, by a later command."""
    pid = os.getpid()
    path = parent / f"{PREFIX}{_machine()}-{pid}-{_started(pid) or 0}-{next(_COUNTER)}"
    _OPEN.add(path.name)
    try:
        yield path
    finally:
        _OPEN.discard(path.name)
        remove(path)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """An empty folder to work in, beside what is made there. Its mode is what the umask gives a new
    folder."""
    with unfinished(parent) as folder:
        folder.mkdir()
        yield folder


def sweep(parent: Path) -> None:
    """Removes what dead writers left unfinished in `parent`; where nothing may be removed, nothing
    happens."""
    try:
        with os.scandir(parent) as entries:
            found = [entry.name for entry in entries if entry.name.startswith(PREFIX)]
    except OSError:
        return
    for name in found:
        if lives(name) is False:
            remove(parent / name)


def lives(name: str) -> bool | None:
    """Whether the writer of the unfinished thing of this name lives; None where that cannot be
    known here."""
    parts = _NAME.fullmatch(name)
    if parts is None or parts[1] != _machine() or parts[3] == "0" or os.name == "nt":
        return None
    pid = int(parts[2])
    started = _started(pid)
    if started is None and _exists(pid):  # another user's, which is not shown to us
        return None
    return started == int(parts[3]) and (pid != os.getpid() or name in _OPEN)


def remove(path: Path) -> None:
    """Whatever it is, as far as the system allows."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def share_and_sync(path: Path, mode: int) -> None:
    """To disk, file by file, with the rights that `mode`, a new folder's here, gives: the umask's.

    Libraries write through temporary files, which are the owner's alone.
    """
    if path.is_dir():
        for folder, _, names in os.walk(path):
            for name in names:
                share_and_sync(Path(folder) / name, mode)
            sync_folder(Path(folder))
        return
    missing = mode & 0o666 & ~path.stat().st_mode
    if missing and not path.is_symlink():
        with _where_there_is_one():  # a file system without modes
            path.chmod(path.stat().st_mode & 0o777 | missing)
    _sync(path)


def sync_folder(path: Path) -> None:
    """After it, a rename in this folder outlives a power cut, where the file system can promise
    that."""
    with _where_there_is_one():
        _sync(path)


@contextmanager
def _where_there_is_one() -> Iterator[None]:
    """For what a file system may be without: rights, and syncing a folder."""
    try:
        yield
    except OSError as fault:
        if fault.errno not in _THERE_IS_NONE:
            raise


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _machine() -> str:
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        space = ""
    identity = ""
    with suppress(OSError):  # not every system says
        identity = (_MACHINE if space == _WHOLE_MACHINE else _START).read_text()
    return hashlib.sha256(f"{platform.node()} {identity} {space}".encode()).hexdigest()[:8]


def _started(pid: int) -> int | None:
    """When the process began, in a unit of the system's own; 0 if it has ended, None if none is
    shown to us."""
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (
            0 if fields[0] in "ZX" else int(fields[19])
        )  # proc(5): state is field 3, starttime 22
    if sys.platform == "darwin":
        said = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)],
            capture_output=True,
            text=True,
            env={"LC_ALL": "C"},
        ).stdout.strip()
        return calendar.timegm(time.strptime(said)) if said else None
    return None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
