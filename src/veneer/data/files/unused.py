"""Finds and removes the tokens of large sets (large.py) that no run used lately.

They can be built again from their rows. The last use is the modification time of a set's
description, which each run updates.
"""

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
"""The file in a set's folder that describes the set."""


@dataclass(frozen=True)
class UnusedSet:
    """A set that may be removed.

    bytes: size of its folder; days: time since its last use; files: names of its row files
    """

    folder: Path
    bytes: int
    days: float
    files: Sequence[str]


def use(folder: Path) -> None:
    """Records that the set is used now."""
    with suppress(OSError):  # another user's folder may be read-only
        os.utime(folder / DESCRIPTION)


def lock_of(folder: Path) -> Path:
    """Returns the lock that a process holds while it builds or removes the set."""
    return folder.with_name(f".{folder.name}.lock")


def find_unused(tokens: Path, days: float) -> list[UnusedSet]:
    """Finds sets in the folder `tokens` that were not used for `days` days, oldest use first."""
    with explained(tokens):
        folders = [
            path for path in tokens.glob("*") if _NAME.fullmatch(path.name) and path.is_dir()
        ]
    unused = [_check_unused(folder, days) for folder in folders]
    return sorted((item for item in unused if item is not None), key=lambda item: -item.days)


def _check_unused(folder: Path, days: float) -> UnusedSet | None:
    """Describes the set. Returns None if it was used since, or is gone."""
    with suppress(FileNotFoundError):  # another process removes it
        description = folder / DESCRIPTION
        last_use = (description if description.is_file() else folder).stat().st_mtime
        days_ago = max(time.time() - last_use, 0.0) / _DAY
        if days_ago >= days:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            return UnusedSet(folder, size, days_ago, _files(folder))
    return None


def remove_unused(tokens: Path, days: float) -> list[UnusedSet]:
    """Removes unused sets and unfinished files. Returns the removed sets.

    A set that is being built stays. A run that has opened its tokens can continue. Raises
    InputError if the system refuses.
    """
    removed = []
    for unused in find_unused(tokens, days):
        with suppress(BusyError), locked(lock_of(unused.folder), wait_seconds=0):
            if _check_unused(unused.folder, days) is None:
                continue
            with explained(unused.folder), unfinished(tokens) as aside:
                unused.folder.rename(aside)
            removed.append(unused)
            with suppress(OSError):
                lock_of(unused.folder).unlink()
    sweep(tokens)
    return removed


def _files(folder: Path) -> list[str]:
    try:
        names = read_json(folder / "train" / INDEX)["files"]
        return [str(name) for name in names]
    except (VeneerError, OSError, KeyError, TypeError):
        return []
