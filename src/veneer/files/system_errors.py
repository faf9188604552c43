"""What the operating system refuses, told as an error that a user can mend: the place, its words,
the next step.

    full disk, used-up quota, file too large    DoesNotFitError
    everything else it says of a file           InputError

Libraries written in Rust (safetensors, tokenizers) raise classes of their own and leave the number
in the text, "(os error 28)": it is read from there. Errors of networks and pipes are not about
files and pass.
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
_TOO_LARGE = "takes no file that large"
_NETWORK = {
    getattr(errno, name)
    for name in dir(errno)
    if name.startswith(("ECONN", "ENET", "EHOST", "EADDR", "EPIPE", "ENOTCONN", "ESHUTDOWN"))
}
_KEPT = "nothing that was complete before is lost."
_OTHER_PLACE = "Give a folder that you may write to."
_MEND = f"Mend that, or give another place; {_KEPT}"
_DEVICE = (
    f"The device or its connection failed: look at it, then run the same command again; {_KEPT}"
)
_NEXT_STEPS = {
    errno.EACCES: _OTHER_PLACE,
    errno.EPERM: _OTHER_PLACE,
    errno.EROFS: _OTHER_PLACE,
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.EIO: _DEVICE,
    errno.ENXIO: _DEVICE,
    errno.ENODEV: _DEVICE,
    errno.ESTALE: _DEVICE,
    errno.ETIMEDOUT: _DEVICE,
    errno.EMFILE: "Raise the limit of open files: ulimit -n 4096.",
    errno.ENFILE: "Close other programs: the system has no more open files to give.",
}


def system_errno(fault: BaseException) -> int | None:
    """The number of the error of the file system that `fault` is, or carries in its text; None if
    it is none."""
    if isinstance(fault, VeneerError | ChildProcessError | InterruptedError):
        return None
    if type(fault).__module__ in (
        "socket",
        "ssl",
    ):  # theirs are OSErrors, too, with numbers of their own
        return None
    number = fault.errno if isinstance(fault, OSError) else None
    if number is None and (found := _IN_TEXT.search(str(fault))):
        number = int(found[1])
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
    """What to raise instead of `fault`; None if the system said nothing about a file.

    path       what the user asked for (None: what the fault itself names)
    reading    it was to be read, else written
    next_step  where the place asks for another than the usual one
    """
    number = system_errno(fault)
    if number is None:
        return None
    named = getattr(fault, "filename", None)
    place = Path(
        os.fsdecode(named) if path is None and isinstance(named, str | bytes) else path or "."
    )
    subject = place if path is not None or named is not None else "a file"
    if number in _NO_ROOM:
        needed = "" if needed_bytes is None else f": {needed_bytes:,} bytes are needed"
        free = f", {free_bytes(place):,} are free" if path is not None else ""
        return DoesNotFitError(
            f"{_NO_ROOM[number]}, {subject} was not written{needed}{free}",
            [],
            next_step or f"Free some space or give a place on another disk; {_KEPT}",
        )
    if number == errno.EFBIG:
        return DoesNotFitError(
            f"{subject} was not written: its file system, or a limit of yours, {_TOO_LARGE}",
            [],
            next_step
            or "Give a place on another disk (FAT takes 4 GB a file; your limit: ulimit -f);"
            f" {_KEPT}",
        )
    said = os.strerror(number)
    if path is None:  # read or written: it is not known here
        return InputError(f"{subject}: {said}", [], next_step or _NEXT_STEPS.get(number, _MEND))
    other = isinstance(named, str) and place.name not in named and not _passing(named)
    return InputError(
        f"{subject} cannot be {'read' if reading else 'written'}: {said}",
        [f"{named}: {said}"] if other else [],
        next_step or _NEXT_STEPS.get(number, _MEND),
    )


def tells_of_the_disk(said: str) -> bool:
    """Whether what a command printed as it ended with code 3 is about the disk, not about
    memory."""
    return any(words in said for words in (*_NO_ROOM.values(), _TOO_LARGE))


@contextmanager
def explained(
    path: str | Path, *, needed_bytes: int | None = None, next_step: str = "", reading: bool = False
) -> Iterator[None]:
    """What the system refuses within the block is raised as an error of `path`; every other
    exception passes."""
    try:
        yield
    except Exception as fault:
        told = refusal(fault, path, needed_bytes=needed_bytes, next_step=next_step, reading=reading)
        if told is None:
            raise
        raise told from fault


def free_bytes(path: str | Path) -> int:
    """Bytes free for this user on the file system that holds `path` or will hold it; 0 where it
    does not say."""
    place = Path(path).absolute()
    for folder in (place, *place.parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return 0


def _passing(name: str) -> bool:
    """Names of unfinished things mean nothing to a user."""
    return ".partial-" in name or "/.tmp" in name
