"""Folders and files that appear whole or not at all, and a manifest that proves they still are.

A folder is written beside its place as `.partial-<pid>-<n>`, every file is synced to disk, then one rename
makes it visible and the parent folder is synced. What is not renamed was never there. Where a folder is
replaced, the old one is moved aside first and deleted last; if the process dies between, the next write to
the same place puts it back.

Not known here: what the folders hold (adapters, checkpoints, models).
"""

import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from veneer.errors import ConfigError, DoesNotFitError, InputError, VeneerError
from veneer.store.strict_json import read_json

MANIFEST = "MANIFEST.json"
_COUNTER = itertools.count()


@contextmanager
def atomic_folder(
    path: str | Path, *, replace: bool = False, needed_bytes: int | None = None
) -> Iterator[Path]:
    """Yields an empty folder to write into; on success it stands at `path`, on any failure nothing does.

    replace       a folder that stands at `path` gives way, but only once the new one is complete
    needed_bytes  what will be written, if known: refused at once where the disk has less

    Raises ConfigError if `path` exists and may not be replaced, DoesNotFitError if the disk is full,
    InputError if the place cannot be written.
    """
    path = Path(path).absolute()
    aside = path.with_name(f".replaced-{path.name}")
    with _explained(path, needed_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        _put_back(path, aside)
        shutil.rmtree(aside, ignore_errors=True)
        if not replace:
            _refuse_existing(path)
        if needed_bytes is not None and needed_bytes > (free := free_bytes(path)):
            raise _does_not_fit(path, needed_bytes, free)
        partial = _new_partial(path.parent)
    try:
        with _full_disk_explained(path, needed_bytes):
            yield partial
        with _explained(path, needed_bytes):
            for folder, _, names in os.walk(partial):
                for name in names:
                    _sync(Path(folder) / name)
                _sync(Path(folder))
            if not replace:
                _refuse_existing(path)
            elif os.path.lexists(path):
                path.rename(aside)
            partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _put_back(path, aside)
        raise
    with _explained(path, needed_bytes):
        _sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def atomic_file(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a path beside `path` to write one file to; on success it stands at `path`. Raises alike."""
    path = Path(path).absolute()
    with _explained(path, None):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not replace:
            _refuse_existing(path)
    partial = path.with_name(f".partial-{os.getpid()}-{next(_COUNTER)}")
    try:
        with _full_disk_explained(path, None):
            yield partial
        with _explained(path, None):
            _sync(partial)
            if not replace:
                _refuse_existing(path)
            partial.replace(path)
            _sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def free_bytes(path: str | Path) -> int:
    """Bytes free for this user on the file system that holds `path` or will hold it."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def write_manifest(folder: str | Path) -> None:
    """Writes MANIFEST.json: size and SHA-256 of every file in the folder. Call it when all are written."""
    folder = Path(folder)
    files = {
        name: {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for name, path in sorted(_files(folder).items())
    }
    text = json.dumps({"format_version": 1, "files": files}, indent=2, sort_keys=True) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def verify_manifest(folder: str | Path) -> list[str]:
    """What is wrong with the folder, one line each; empty if every file is as MANIFEST.json says."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return [f"{MANIFEST} is missing: the folder was not written to its end"]
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
        faults += _file_faults(name, present[name], listed[name])
    return faults


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_faults(name: str, path: Path, listed: Any) -> list[str]:
    if not isinstance(listed, dict) or set(listed) != {"bytes", "sha256"}:
        return [f"{name}: {MANIFEST} gives no size and hash"]
    if path.is_symlink():
        return [f"{name} is a link, not a file"]
    if (size := path.stat().st_size) != listed["bytes"]:
        return [f"{name} has {size:,} bytes, {MANIFEST} says {listed['bytes']}"]
    if (found := file_hash(path)) != listed["sha256"]:
        return [f"{name} changed: SHA-256 {found[:12]}…, {MANIFEST} says {str(listed['sha256'])[:12]}…"]
    return []


def _files(folder: Path) -> dict[str, Path]:
    """Every file below the folder but the manifest, by its name relative to it, with forward slashes."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    found.pop(MANIFEST, None)
    return found


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise ConfigError(
            f"{path} exists and is not overwritten", [], "Give another place, or remove it first."
        )


def _new_partial(parent: Path) -> Path:
    while True:
        partial = parent / f".partial-{os.getpid()}-{next(_COUNTER)}"
        try:
            partial.mkdir(mode=0o700)
        except FileExistsError:  # left by a dead process that had our number
            continue
        return partial


def _put_back(path: Path, aside: Path) -> None:
    """Whoever failed or died between the two renames left the old folder aside and nothing in its place."""
    if os.path.lexists(aside) and not os.path.lexists(path):
        aside.rename(path)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _full_disk_explained(path: Path, needed_bytes: int | None) -> Iterator[None]:
    """A full disk is told as such, whoever met it; every other exception passes."""
    try:
        yield
    except (OSError, SafetensorError) as fault:
        full = isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and f"(os error {errno.ENOSPC})" not in str(fault):  # how safetensors says it
            raise
        raise _does_not_fit(path, needed_bytes, free_bytes(path)) from fault


@contextmanager
def _explained(path: Path, needed_bytes: int | None) -> Iterator[None]:
    """What the file system refuses to us, told as an error of the place the user gave."""
    try:
        with _full_disk_explained(path, needed_bytes):
            yield
    except OSError as fault:
        raise InputError(
            f"{path} cannot be written: {fault.strerror}", [], "Give a folder that you may write to."
        ) from fault


def _does_not_fit(path: Path, needed_bytes: int | None, free: int) -> DoesNotFitError:
    needed = "" if needed_bytes is None else f": {needed_bytes:,} bytes are needed"
    return DoesNotFitError(
        f"the disk is full, {path} was not written{needed}, {free:,} are free",
        [],
        "Free some space or give a place on another disk; nothing that was complete before is lost.",
    )
