"""Tokens of large sets (large.py) that no run has asked for lately. They can be built again from
their rows.

The last use is the time of a set's description: a run that finds it sets that anew.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from veneer.data.files.on_disk import INDEX
from veneer.errors import VeneerError
from veneer.files.lock import BusyError, locked
from veneer.files.partial import sweep, unfinished
from veneer.files.strict_json import read_json
from veneer.files.system_errors import explained

_NAME = re.compile(r"[0-9a-f]{32}")
_DAY = 24 * 3600.0
DESCRIPTION = "set.json"
"""Of a set, in its folder: what it was made of."""


@dataclass(frozen=True)
class Unused:
    """One set. bytes: what goes with it; days: since it was last asked for; files: of rows, as they
    were called."""

    folder: Path
    bytes: int
    days: float
    files: Sequence[str]


def use(folder: Path) -> None:
    """It is asked for now."""
    with suppress(OSError):  # a folder of others' that may be read alone
        os.utime(folder / DESCRIPTION)


def lock_of(folder: Path) -> Path:
    """Whoever builds or removes it holds this one."""
    return folder.with_name(f".{folder.name}.lock")


def find_unused(tokens: Path, days: float) -> list[Unused]:
    """Sets in the folder `tokens` that were last asked for at least `days` ago, the longest ago
    first."""
    with explained(tokens):
        folders = [
            each for each in tokens.glob("*") if _NAME.fullmatch(each.name) and each.is_dir()
        ]
    found = [_unused(folder, days) for folder in folders]
    return sorted((each for each in found if each is not None), key=lambda each: -each.days)


def _unused(folder: Path, days: float) -> Unused | None:
    """None: it was asked for since, or is gone."""
    with suppress(FileNotFoundError):  # another process removes it
        described = folder / DESCRIPTION
        used = (described if described.is_file() else folder).stat().st_mtime
        ago = max(time.time() - used, 0.0) / _DAY
        if ago >= days:
            size = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
            return Unused(folder, size, ago, _files(folder))
    return None


def remove_unused(tokens: Path, days: float) -> list[Unused]:
    """Removes them, and what dead writers left unfinished there; says which are gone. One that is
    being built meanwhile stays. A run that has opened its tokens reads on. InputError: the system
    refuses."""
    gone = []
    for each in find_unused(tokens, days):
        with suppress(BusyError), locked(lock_of(each.folder), wait_seconds=0):
            if _unused(each.folder, days) is None:
                continue
            with explained(each.folder), unfinished(tokens) as aside:
                each.folder.rename(aside)
            gone.append(each)
            with suppress(OSError):
                lock_of(each.folder).unlink()
    sweep(tokens)
    return gone


def _files(folder: Path) -> list[str]:
    try:
        names = read_json(folder / "train" / INDEX)["files"]
        return [str(name) for name in names]
    except (VeneerError, OSError, KeyError, TypeError):
        return []
