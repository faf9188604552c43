"""What was fetched or made once and is kept: Veneer's cache folder, where things are in it, how
they appear in it.

    wheels/   wheels, also ones that the user put there by hand
    files/    single files out of wheels, under their SHA-256
    gguf/     what became of .gguf files, under theirs: converted, or with their blocks laid out;
              with a manifest

Not known here: what is in them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from veneer.files.atomic import verify_manifest
from veneer.files.cache import CACHE_STEP as CACHE_STEP
from veneer.files.cache import cache_folder as cache_folder
from veneer.files.partial import scratch_folder, share_and_sync, sweep, unfinished
from veneer.files.system_errors import explained

_log = logging.getLogger(__name__)

CONVERTER_VERSION = 2
"""Raised when Veneer writes a converted folder otherwise, so that no earlier one is read."""
_READERS = ("gguf", "transformers")
"""Packages that read the file: another version of them may read it otherwise."""


def converted_folder(sha256: str) -> Path:
    """Where the conversion of the .gguf file with this hash is or will be."""
    return cache_folder() / "gguf" / f"{sha256}-{converter()}"


def blocks_folder(sha256: str) -> Path:
    """Where what stands beside the .gguf file with this hash is or will be, when its blocks are the
    weights."""
    return cache_folder() / "gguf" / f"{sha256}-blocks-{converter()}"


def converter() -> str:
    """The versions that a converted folder depends on, as they stand in its name."""
    return "-".join([f"v{CONVERTER_VERSION}", *(f"{name}{version(name)}" for name in _READERS)])


def is_whole(folder: Path) -> bool:
    """Whether the converted folder is there, with every byte as its manifest says."""
    if not folder.is_dir():
        return False
    faults = verify_manifest(folder)
    if faults:
        _log.warning("%s was changed after it was converted (%s): not used", folder, faults[0])
    return not faults


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A folder to work in, in a folder of the cache; what the system refuses is an error that names
    the cache."""
    with explained(folder, next_step=CACHE_STEP):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        with scratch_folder(folder) as scratch:
            yield scratch


def publish(finished: Path, target: Path) -> None:
    """Moves a finished file or folder to its place: synced to disk first, so that it is whole or
    absent.

    If another process has put the same thing there meanwhile, that one stays. A converted folder
    that was changed gives way.
    """
    share_and_sync(finished, finished.parent.stat().st_mode)
    try:
        finished.replace(target)
    except OSError:
        if not target.is_dir():  # a folder does not replace one that holds files
            raise
        if not is_whole(target):
            with unfinished(target.parent) as damaged:
                target.rename(damaged)
                finished.replace(target)
