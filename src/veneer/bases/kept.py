"""What was fetched or made once and is kept: Veneer's cache folder, where things are in it, how they appear in it.

    wheels/   wheels, also ones that the user put there by hand
    files/    single files out of wheels, under their SHA-256
    gguf/     what became of .gguf files, under theirs: converted, or with their blocks laid out

Not known here: what is in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from veneer.files.cache import CACHE_STEP as CACHE_STEP
from veneer.files.cache import cache_folder as cache_folder
from veneer.files.partial import scratch_folder, share_and_sync, sweep
from veneer.files.system_errors import explained

CONVERTER_VERSION = 1
"""Part of a converted folder's name: raised when what is written changes, so that nothing stale is read."""


def converted_folder(sha256: str) -> Path:
    """Where the conversion of the .gguf file with this hash is or will be."""
    return cache_folder() / "gguf" / f"{sha256}-v{CONVERTER_VERSION}"


def blocks_folder(sha256: str) -> Path:
    """Where what stands beside the .gguf file with this hash is or will be, when its blocks are the weights."""
    return cache_folder() / "gguf" / f"{sha256}-blocks-v{CONVERTER_VERSION}"


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
