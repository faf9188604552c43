"""Names unfinished files and folders after their writer, and removes those of dead writers.

.partial-<machine>-<pid>-<start>-<n>

A process is identified by its number and start time. `machine` is a hash of the host and its
namespace of process numbers (each container has its own). Host names and container numbers are not
unique, so the machine's own id is included; in a container, which ends with the machine, the id of
its boot. Files of other machines cannot be judged here and are left alone, as is everything on
Windows.
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
"""Linux's first namespace of process numbers has this number on every machine."""
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
_COUNTER = itertools.count()
_OPEN: set[str] = set()
"""Names of unfinished paths that this process is writing."""


@contextmanager
def unfinished(parent: Path) -> Iterator[Path]:
    """Yields a new path in `parent` that names its writer.

    Whatever remains there at the end is removed, now or by a later command if the system refuses.
    """
    pid = os.getpid()
    path = parent / f"{PREFIX}{_machine()}-{pid}-{_start_time(pid) or 0}-{next(_COUNTER)}"
    _OPEN.add(path.name)
    try:
        yield path
    finally:
        _OPEN.discard(path.name)
        remove(path)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yields an empty folder to work in, beside the result. Its mode follows the umask."""
    with unfinished(parent) as folder:
        folder.mkdir()
        yield folder


def sweep(parent: Path) -> None:
    """Removes unfinished files of dead writers in `parent`; does nothing if that is not allowed."""
    try:
        with os.scandir(parent) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(PREFIX)]
    except OSError:
        return
    for name in names:
        if is_alive(name) is False:
            remove(parent / name)


def is_alive(name: str) -> bool | None:
    """Whether the writer of an unfinished path is alive; None if unknown."""
    parts = _NAME.fullmatch(name)
    if parts is None or parts[1] != _machine() or parts[3] == "0" or os.name == "nt":
        return None
    pid = int(parts[2])
    started = _start_time(pid)
    if started is None and _exists(pid):  # another user's process, whose details are hidden
        return None
    return started == int(parts[3]) and (pid != os.getpid() or name in _OPEN)


def remove(path: Path) -> None:
    """Removes a file or folder, as far as the system allows."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def share_and_sync(path: Path, mode: int) -> None:
    """Gives files the rights of `mode`, a new folder's, and syncs them to disk.

    Libraries write through temporary files, which only their owner can read.
    """
    if path.is_dir():
        for folder, _, names in os.walk(path):
            for name in names:
                share_and_sync(Path(folder) / name, mode)
            sync_folder(Path(folder))
        return
    missing = mode & 0o666 & ~path.stat().st_mode
    if missing and not path.is_symlink():
        with _ignore_unsupported():  # a file system without modes
            path.chmod(path.stat().st_mode & 0o777 | missing)
    _sync(path)


def sync_folder(path: Path) -> None:
    """Syncs a folder, so that a rename in it survives a power cut if the file system
    supports that."""
    with _ignore_unsupported():
        _sync(path)


@contextmanager
def _ignore_unsupported() -> Iterator[None]:
    """Ignores errors of file systems without rights, or without syncing of folders."""
    try:
        yield
    except OSError as fault:
        if fault.errno not in _UNSUPPORTED:
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
    with suppress(OSError):  # not every system has it
        identity = (_MACHINE if space == _WHOLE_MACHINE else _START).read_text()
    return hashlib.sha256(f"{platform.node()} {identity} {space}".encode()).hexdigest()[:8]


def _start_time(pid: int) -> int | None:
    """Returns the start time of a process in the system's unit; 0 if it has ended, None if
    hidden."""
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (
            0 if fields[0] in "ZX" else int(fields[19])
        )  # proc(5): state is field 3, starttime 22
    if sys.platform == "darwin":
        output = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)],
            capture_output=True,
            text=True,
            env={"LC_ALL": "C"},
        ).stdout.strip()
        return calendar.timegm(time.strptime(output)) if output else None
    return None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
