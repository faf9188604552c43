"""Folders and files that appear whole or not at all, and a manifest that proves they still are.

A folder is written beside its place under the name of an unfinished one (files/partial.py), every
file is synced to disk, then one rename makes it visible and the parent folder is synced. What is
not renamed was never there. Where a folder is replaced, the old one is moved aside first and
deleted last; if the process dies between, the next write to the same place puts it back. What
appears has the rights that the umask gives, whoever wrote its files.

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
    """Yields an empty folder to write into; on success it stands at `path`, on any failure nothing
    does.

    replace       a folder that stands at `path` gives way, but only once the new one is complete
    needed_bytes  what will be written, if known: refused at once where the disk has less

    Raises ConfigError if `path` exists and may not be replaced, DoesNotFitError if the disk is full
    (or takes no file that large), InputError if the system refuses the place otherwise, within the
    block too.
    """
    path = Path(path).absolute()
    aside = path.with_name(f".replaced-{path.name}")
    with explained(path, needed_bytes=needed_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        _put_back(path, aside)
        shutil.rmtree(aside, ignore_errors=True)
        refuse_existing(path, unless=replace)
        if needed_bytes is not None and needed_bytes > free_bytes(path):
            raise OSError(errno.ENOSPC, "what is to be written is more than is free")
        try:
            with scratch_folder(path.parent) as partial:
                mode = partial.stat().st_mode
                yield partial
                share_and_sync(partial, mode)
                refuse_existing(path, unless=replace)
                if replace and _stands(path):
                    path.rename(aside)
                partial.rename(path)
                with _undone(path, partial):
                    sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):  # what failed first is told, and the next write puts it back
                _put_back(path, aside)
            raise
        if os.path.lexists(aside):
            # Under the name of an unfinished one any command may remove it. If not even that is
            # possible: the new folder stands, and the next write tries again.
            with unfinished(path.parent) as gone, suppress(OSError):
                aside.rename(gone)


@contextmanager
def atomic_file(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a path beside `path` to write one file to; on success it stands at `path`. Raises
    alike."""
    path = Path(path).absolute()
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        refuse_existing(path, unless=replace)
        with unfinished(path.parent) as partial:
            partial.touch(exist_ok=False)
            mode = partial.stat().st_mode
            yield partial
            share_and_sync(partial, mode)
            refuse_existing(path, unless=replace)
            (partial.replace if replace else partial.rename)(path)
            with nullcontext() if replace else _undone(path, partial):
                sync_folder(path.parent)


def write_manifest(folder: str | Path) -> None:
    """Writes MANIFEST.json: size and SHA-256 of every file in the folder. Call it when all are
    written."""
    folder = Path(folder)
    files = {
        name: {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for name, path in sorted(_files(folder).items())
    }
    text = json.dumps({"format_version": 1, "files": files}, indent=2, sort_keys=True) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def verify_manifest(folder: str | Path) -> list[str]:
    """What is wrong with the folder, one line each; empty if every file is as MANIFEST.json
    says."""
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
    if (found := file_hash(path)) != listed["sha256"]:
        return [
            f"{name} changed: SHA-256 {found[:12]}…, {MANIFEST} says {str(listed['sha256'])[:12]}…"
        ]
    return []


def _files(folder: Path) -> dict[str, Path]:
    """Every file below the folder but the manifest, by its name relative to it, with forward
    slashes."""
    found = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()
    }
    found.pop(MANIFEST, None)
    return found


def refuse_existing(path: Path, *, unless: bool) -> None:
    """ConfigError: something stands there, and may not be replaced."""
    if _stands(path) and not unless:
        raise ConfigError(
            f"{path} exists and is not overwritten", [], "Choose another place, or remove it first."
        )


def refuse_unwritable(path: str | Path) -> None:
    """Raises what writing at `path` would raise, InputError or DoesNotFitError, before the work for
    it is done. Leaves nothing behind."""
    path = Path(path).absolute()
    with explained(path):
        _stands(path)  # a name that is too long
        place = next(parent for parent in path.parents if _stands(parent))
        with unfinished(place) as partial:
            partial.mkdir()


def _stands(path: Path) -> bool:
    """Whether anything is at `path`. OSError where nothing can be: the name is too long, say."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _undone(path: Path, partial: Path) -> Iterator[None]:
    """What cannot be said to be on the disk for good takes its unfinished name again, and is
    removed under it."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.rename(partial)
        raise


def _put_back(path: Path, aside: Path) -> None:
    """Whoever failed or died between the two renames left the old folder aside and nothing in its
    place."""
    if os.path.lexists(aside) and not os.path.lexists(path):
        aside.rename(path)
