"""Writes files and folders atomically, and checks them with a manifest.

A folder is written beside its target under the name of an unfinished one (files/partial.py), every
file is synced to disk, one rename makes it visible, and the parent folder is synced. To replace a
folder, the old one is moved aside first and deleted last; if the process dies between, the next
write to the same path restores it. New files have the rights of the umask, whoever wrote them.

Not known here: what the folders hold (adapters, checkpoints, models).
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, VeneerError
from veneer.files.hashes import file_hash
from veneer.files.partial import scratch_folder, share_and_sync, sweep, sync_folder, unfinished
from veneer.files.strict_json import read_json
from veneer.files.system_errors import explained, free_bytes

MANIFEST = "MANIFEST.json"


@contextmanager
def atomic_folder(
    path: str | Path, *, replace: bool = False, needed_bytes: int | None = None
) -> Iterator[Path]:
    """Yields an empty folder to write into. It appears at `path` on success, and not at all on
    failure.

    replace       an existing folder at `path` is replaced once the new one is complete
    needed_bytes  size of the content, if known: refused at once if the disk has less

    Raises ConfigError if `path` exists and may not be replaced, DoesNotFitError if the disk is full
    (or does not support files that large), InputError for other errors of the system, within the
    block too.
    """
    path = Path(path).absolute()
    aside = path.parent / f".replaced-{path.name}"
    with explained(path, needed_bytes=needed_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        _restore_replaced(path, aside)
        shutil.rmtree(aside, ignore_errors=True)
        refuse_existing(path, unless=replace)
        if needed_bytes is not None and needed_bytes > free_bytes(path):
            raise OSError(errno.ENOSPC, "not enough free space")
        try:
            with scratch_folder(path.parent) as partial:
                mode = partial.stat().st_mode
                yield partial
                share_and_sync(partial, mode)
                refuse_existing(path, unless=replace)
                if replace and _exists(path):
                    path.rename(aside)
                partial.rename(path)
                with _rename_back_on_failure(path, partial):
                    sync_folder(path.parent)
        except BaseException:
            with suppress(
                OSError
            ):  # the first error is reported, and the next write restores the folder
                _restore_replaced(path, aside)
            raise
        if os.path.lexists(aside):
            # Renamed to an unfinished folder, so that any command may remove it. If that fails, the
            # new folder is complete, and the next write tries again.
            with unfinished(path.parent) as gone, suppress(OSError):
                aside.rename(gone)


@contextmanager
def atomic_file(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a path beside `path` to write one file. It appears at `path` on success.

    Raises what atomic_folder raises.
    """
    path = Path(path).absolute()
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        refuse_existing(path, unless=replace)
        _refuse_no_file(path)
        with unfinished(path.parent) as partial:
            partial.touch(exist_ok=False)
            mode = partial.stat().st_mode
            yield partial
            share_and_sync(partial, mode)
            refuse_existing(path, unless=replace)
            (partial.replace if replace else partial.rename)(path)
            with nullcontext() if replace else _rename_back_on_failure(path, partial):
                sync_folder(path.parent)


def write_text(path: str | Path, text: str, *, replace: bool = False) -> None:
    """Writes a text file atomically, in UTF-8."""
    with atomic_file(path, replace=replace) as partial:
        partial.write_text(text, encoding="utf-8")


def write_manifest(folder: str | Path) -> None:
    """Writes MANIFEST.json with size and SHA-256 of every file in the folder. Call it last."""
    folder = Path(folder)
    files = {
        name: {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for name, path in sorted(_files(folder).items())
    }
    text = json.dumps({"format_version": 1, "files": files}, indent=2, sort_keys=True) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def verify_manifest(folder: str | Path) -> list[str]:
    """Reports differences between the folder and its MANIFEST.json, one line each; empty if
    none."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return [f"{MANIFEST} is missing: the folder is incomplete"]
    try:
        listed = read_json(folder / MANIFEST).get("files")
    except VeneerError as fault:
        return [str(fault)]
    if not isinstance(listed, dict):
        return [f"{MANIFEST} lists no files"]
    present = _files(folder)
    faults = [f"{name} is missing" for name in sorted(set(listed) - set(present))]
    faults += [f"{name} is not listed in {MANIFEST}" for name in sorted(set(present) - set(listed))]
    for name in sorted(set(listed) & set(present)):
        try:
            faults += _file_faults(name, present[name], listed[name])
        except OSError as fault:
            faults.append(f"{name} cannot be read: {fault.strerror}")
    return faults


def _file_faults(name: str, path: Path, listed: Any) -> list[str]:
    if not isinstance(listed, dict) or set(listed) != {"bytes", "sha256"}:
        return [f"{name}: {MANIFEST} gives no size and hash"]
    if path.is_symlink():
        return [f"{name} is a link, not a file"]
    if (size := path.stat().st_size) != listed["bytes"]:
        return [f"{name} has {size:,} bytes, {MANIFEST} says {listed['bytes']}"]
    if (digest := file_hash(path)) != listed["sha256"]:
        return [
            f"{name} changed: SHA-256 {digest[:12]}…, {MANIFEST} says {str(listed['sha256'])[:12]}…"
        ]
    return []


def _files(folder: Path) -> dict[str, Path]:
    """Returns every file below the folder except the manifest, by its relative name with forward
    slashes."""
    files = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()
    }
    files.pop(MANIFEST, None)
    return files


def refuse_existing(path: Path, *, unless: bool) -> None:
    """Raises ConfigError if `path` exists, unless it may be replaced."""
    if _exists(path) and not unless:
        raise ConfigError(
            f"{path} exists and is not overwritten", [], "Choose another path, or remove it first."
        )


def refuse_other_content(path: str | Path, mark: str) -> None:
    """Raises ConfigError unless a folder that holds a file named `mark` may replace what is at
    `path`: nothing, an empty folder, or one that holds such a file too."""
    path = Path(path).absolute()
    with explained(path):
        if not _exists(path):
            return
        if path.is_symlink() or not path.is_dir():
            fault = "it is no folder"
        elif any(path.iterdir()) and not (path / mark).is_file():
            fault = f"it holds other files, and no {mark}"
        else:
            return
    raise ConfigError(f"{path} is not replaced: {fault}", next_step="Choose another path.")


def refuse_unwritable(path: str | Path) -> None:
    """Raises the error of writing at `path` before the work is done: InputError or DoesNotFitError.

    Leaves nothing behind.
    """
    path = Path(path).absolute()
    with explained(path):
        _exists(path)  # fails if the name is too long
        existing_parent = next(parent for parent in path.parents if _exists(parent))
        with unfinished(existing_parent) as partial:
            partial.mkdir()


def refuse_unwritable_file(path: str | Path) -> None:
    """Raises what refuse_unwritable raises, and ConfigError if a folder or device is there."""
    refuse_unwritable(path)
    _refuse_no_file(Path(path).absolute())


def _refuse_no_file(path: Path) -> None:
    """Raises ConfigError if what is there is no file: root would replace a device for everyone."""
    if _exists(path) and path.exists() and not path.is_file():
        fault = "it is a folder" if path.is_dir() else "it is no regular file"
        raise ConfigError(f"{path} is not replaced: {fault}", next_step="Choose another path.")


def _exists(path: Path) -> bool:
    """Whether `path` exists. Raises OSError if it is impossible, for example too long."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _rename_back_on_failure(path: Path, partial: Path) -> Iterator[None]:
    """Renames a published path back to its unfinished name if syncing fails, so that it is
    removed."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.rename(partial)
        raise


def _restore_replaced(path: Path, aside: Path) -> None:
    """Restores the old folder after a failure or crash between the two renames."""
    if os.path.lexists(aside) and not os.path.lexists(path):
        aside.rename(path)
