"""What was fetched or made once and is kept: Veneer's cache folder, and how a thing appears in it.

Not known here: what is kept.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from veneer.files.partial import scratch_folder, share_and_sync, sweep
from veneer.files.system_errors import explained

CACHE_STEP = "Free some space, or set VENEER_CACHE to a folder that can be written and has room."


def cache_folder() -> Path:
    """Where downloads and converted models are kept: $VENEER_CACHE, or the platform's cache folder."""
    if chosen := os.environ.get("VENEER_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "veneer"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "veneer" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veneer"


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A folder to work in, in a folder of the cache; what the system refuses is an error that names the cache."""
    with explained(folder, next_step=CACHE_STEP):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        with scratch_folder(folder) as scratch:
            yield scratch


def publish(finished: Path, target: Path) -> None:
    """Moves a finished file or folder to its place: synced to disk first, so that it is whole or absent.

    If another process has put the same thing there meanwhile, that one stays.
    """
    share_and_sync(finished, finished.parent.stat().st_mode)
    try:
        finished.replace(target)
    except OSError:
        if not target.is_dir():  # a folder does not replace one that holds files
            raise
