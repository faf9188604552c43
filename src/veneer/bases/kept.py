"""Manages Veneer's cache folder: where fetched and converted files are, and how they are published.

wheels/   wheels, also those that the user put there
files/    single files out of wheels, by their SHA-256
gguf/     .gguf files by their SHA-256: converted, or with their blocks laid out; with a manifest

Not known here: what the files contain.
"""

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

CONVERTER_VERSION = 3
"""Increased when Veneer changes how it writes converted folders, so that older ones are not
read."""
_READERS = ("gguf", "transformers")
"""Packages that read the file: their other versions may read it differently."""


def converted_folder(sha256: str) -> Path:
    """Returns the path of the conversion of the .gguf file with this hash."""
    return cache_folder() / "gguf" / f"{sha256}-{converter()}"


def blocks_folder(sha256: str) -> Path:
    """Returns the path of the folder for a .gguf file whose blocks stay the weights."""
    return cache_folder() / "gguf" / f"{sha256}-blocks-{converter()}"


def converter() -> str:
    """Returns the versions that a converted folder depends on, as in its name."""
    return "-".join([f"v{CONVERTER_VERSION}", *(f"{name}{version(name)}" for name in _READERS)])


def is_whole(folder: Path) -> bool:
    """Whether the converted folder exists and every byte matches its manifest."""
    if not folder.is_dir():
        return False
    faults = verify_manifest(folder)
    if faults:
        _log.warning("%s was changed after it was converted (%s): not used", folder, faults[0])
    return not faults


@contextmanager
def working_folder(folder: Path) -> Iterator[Path]:
    """Yields a scratch folder inside a folder of the cache; system errors name the cache."""
    with explained(folder, next_step=CACHE_STEP):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        with scratch_folder(folder) as scratch:
            yield scratch


def publish(finished: Path, target: Path) -> None:
    """Moves a finished file or folder into place, synced to disk first, so that it is whole or
    absent.

    If another process published the same meanwhile, that one stays. A converted folder that was
    changed is replaced.
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
