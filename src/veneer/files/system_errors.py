"""Explains errors of the operating system: the path, the system's message, and the next step.

full disk, used-up quota, file too large    DoesNotFitError
everything else it says of a file           InputError

Libraries written in Rust (safetensors, tokenizers) raise their own classes with the number in the
text, "(os error 28)". Errors of networks and pipes do not concern files and pass.
"""

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from veneer.errors import DoesNotFitError, InputError, VeneerError

_IN_TEXT = re.compile(r"\(os error (\d+)\)")
_NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "your quota on this disk is used up"}
_TOO_LARGE = "does not allow files that large"
_NETWORK = {
    getattr(errno, name)
    for name in dir(errno)
    if name.startswith(("ECONN", "ENET", "EHOST", "EADDR", "EPIPE", "ENOTCONN", "ESHUTDOWN"))
}
_NOTHING_LOST = "complete files are not affected."
_OTHER_PLACE = "Choose a folder that you may write to."
_FIX = f"Fix it or choose another folder; {_NOTHING_LOST}"
_DEVICE = (
    "The device or its connection failed: check it, then run the same command again;"
    f" {_NOTHING_LOST}"
)
_NEXT_STEPS = {
    errno.EACCES: _OTHER_PLACE,
    errno.EPERM: _OTHER_PLACE,
    errno.EROFS: _OTHER_PLACE,
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EIO: _DEVICE,
    errno.ENXIO: _DEVICE,
    errno.ENODEV: _DEVICE,
    errno.ESTALE: _DEVICE,
    errno.ETIMEDOUT: _DEVICE,
    errno.EMFILE: "Raise the limit of open files: ulimit -n 4096.",
    errno.ENFILE: "Close other programs: the system's limit of open files is reached.",
}


def system_errno(fault: BaseException) -> int | None:
    """Returns the number of a file system error, from the exception or its text; None if it is
    none."""
    if isinstance(fault, VeneerError | ChildProcessError | InterruptedError):
        return None
    if type(fault).__module__ in ("socket", "ssl"):  # OSErrors with numbers of their own
        return None
    number = fault.errno if isinstance(fault, OSError) else None
    if number is None and (match := _IN_TEXT.search(str(fault))):
        number = int(match[1])
        if sys.platform == "win32":
            number = OSError(0, "", None, number).errno
    return None if number in _NETWORK else number


def refusal(
    fault: BaseException,
    path: str | Path | None = None,
    *,
    needed_bytes: int | None = None,
    next_step: str = "",
    reading: bool = False,
) -> VeneerError | None:
    """Returns the error to raise instead of `fault`; None if it does not concern a file.

    path       what the user named (None: the fault's own path)
    reading    the path was read, else written
    next_step  replaces the usual next step
    """
    number = system_errno(fault)
    if number is None:
        return None
    fault_path = getattr(fault, "filename", None)
    location = Path(
        os.fsdecode(fault_path)
        if path is None and isinstance(fault_path, str | bytes)
        else path or "."
    )
    subject = location if path is not None or fault_path is not None else "a file"
    if number in _NO_ROOM:
        needed = "" if needed_bytes is None else f": {needed_bytes:,} bytes are needed"
        free = f", {free_bytes(location):,} are free" if path is not None else ""
        return DoesNotFitError(
            f"{_NO_ROOM[number]}, {subject} was not written{needed}{free}",
            [],
            next_step or f"Free some space or choose another disk; {_NOTHING_LOST}",
        )
    if number == errno.EFBIG:
        return DoesNotFitError(
            f"{subject} was not written: its file system, or a limit of yours, {_TOO_LARGE}",
            [],
            next_step
            or "Choose another disk (FAT allows 4 GB a file; your limit: ulimit -f);"
            f" {_NOTHING_LOST}",
        )
    message = os.strerror(number)
    if path is None:  # unknown whether it was read or written
        return InputError(f"{subject}: {message}", [], next_step or _NEXT_STEPS.get(number, _FIX))
    is_inner = (
        isinstance(fault_path, str)
        and location.name not in fault_path
        # Temporary names mean nothing to a user.
        and not (".partial-" in fault_path or "/.tmp" in fault_path)
    )
    return InputError(
        f"{subject} cannot be {'read' if reading else 'written'}: {message}",
        [f"{fault_path}: {message}"] if is_inner else [],
        next_step or _NEXT_STEPS.get(number, _FIX),
    )


def is_about_disk(output: str) -> bool:
    """Whether the output of a command that ended with code 3 is about the disk, not about
    memory."""
    return any(words in output for words in (*_NO_ROOM.values(), _TOO_LARGE))


@contextmanager
def explained(
    path: str | Path, *, needed_bytes: int | None = None, next_step: str = "", reading: bool = False
) -> Iterator[None]:
    """Raises errors of the system within the block as errors about `path`; other exceptions
    pass."""
    try:
        yield
    except Exception as fault:
        error = refusal(
            fault, path, needed_bytes=needed_bytes, next_step=next_step, reading=reading
        )
        if error is None:
            raise
        raise error from fault


def free_bytes(path: str | Path) -> int:
    """Returns the bytes free for this user on the file system of `path`; 0 if unknown."""
    place = Path(path).absolute()
    for folder in (place, *place.parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return 0
