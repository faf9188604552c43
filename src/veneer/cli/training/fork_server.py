"""Commands of Veneer in processes that need not import anew: this one has imported what they
compute with, and forks.

A line on stdin asks for one: {"arguments": as after `veneer`, "out", "talk": the files of its
stdout and stderr}. Two lines on stdout answer: {"pid"} once it runs, {"code"} once it is over (-N:
by signal N). The end of stdin ends it.

Nothing has been computed here and no thread of torch runs, so a child is what a process of its own
would be: its bits, its random numbers, its peak of memory. Linux only; comparison/local.py asks.
"""

import ctypes
import json
import mmap
import os
import sys
import warnings
from array import array
from contextlib import suppress
from pathlib import Path
from typing import Any

from veneer.child import end_with_parent
from veneer.cli.common import pause_collection
from veneer.cli.main import leave
from veneer.cli.main import main as command


def serve() -> int:
    """0 at the end of stdin; in a child the exit code of its command."""
    with pause_collection():
        import veneer.cli.training.evaluate
        import veneer.cli.training.train  # noqa: F401
        from veneer import api  # noqa: F401
    pages = find_file_pages()
    asks, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    _redirect(Path(os.devnull), os.O_RDONLY, 0)
    _redirect(Path(os.devnull), os.O_WRONLY, 1)
    for line in iter(asks.readline, b""):
        request = json.loads(line)
        with (
            warnings.catch_warnings()
        ):  # the one other thread is numpy's, which OpenBLAS starts again by itself
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            asks.close()
            os.close(answers)
            return _child(request, pages)
        _send(answers, {"pid": child})
        _, status = os.waitpid(child, 0)
        _send(answers, {"code": os.waitstatus_to_exitcode(status)})
    return 0


def _child(request: dict[str, Any], pages: list[int]) -> int:
    """Runs the command in a session of its own, as subprocess does: Ctrl-C reaches the parent,
    which passes it on."""
    os.setsid()
    end_with_parent()
    for number, name in ((1, "out"), (2, "talk")):
        _redirect(Path(request[name]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, number)
    for page in pages:
        _ = ctypes.c_ubyte.from_address(page).value
    sys.argv[1:] = request["arguments"]
    return command()


def find_file_pages() -> list[int]:
    """Returns the addresses of file pages in this process's memory; empty if unknown.

    A forked child has its parent's other memory, but file pages only after it touches them. So it
    would seem to need less memory than a process that imported the files itself."""
    addresses: list[int] = []
    with suppress(OSError), Path("/proc/self/pagemap").open("rb") as entries:
        for line in Path("/proc/self/maps").read_text().splitlines():
            bounds, rights, _, _, inode, *_ = line.split()
            if inode == "0" or not rights.startswith("r"):
                continue
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            entries.seek(start // mmap.PAGESIZE * 8)
            states = array("Q", entries.read((end - start) // mmap.PAGESIZE * 8))
            addresses += [
                start + place * mmap.PAGESIZE for place, state in enumerate(states) if state >> 63
            ]
    return addresses


def _redirect(file: Path, how: int, number: int) -> None:
    """Makes the file the stream with this number."""
    opened = os.open(file, how, 0o600)
    os.dup2(opened, number)
    os.close(opened)


def _send(place: int, answer: dict[str, int]) -> None:
    os.write(place, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    leave(serve())
