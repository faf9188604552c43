"""Objects of a library: folders of an adapter's files, each named by the SHA-256 of its content.

    objects/<64 hex digits>/    adapter_config.json  adapter_model.safetensors  [veneer.json]
                                MANIFEST.json

MANIFEST.json lists size and SHA-256 of every other file; the folder's name is the SHA-256 of
MANIFEST.json. So the name alone verifies every byte, wherever the folder was copied from. Knows
nothing of what the files mean.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, CorruptFileError, InputError
from veneer.files.atomic import MANIFEST, atomic_folder, verify_manifest
from veneer.files.hashes import file_hash
from veneer.files.strict_json import parse_json

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "veneer.json")
MAX_MANIFEST_BYTES = 100_000
_ID = re.compile(r"[0-9a-f]{64}")
"""Ids come from files and networks and become folder names, so nothing else may pass."""

Content = Path | bytes


def is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def manifest_text(files: Mapping[str, Content]) -> str:
    """Returns the MANIFEST.json of these files, as write_manifest would write it."""
    listed = {name: _size_and_hash(content) for name, content in sorted(files.items())}
    return json.dumps({"format_version": 1, "files": listed}, indent=2, sort_keys=True) + "\n"


def _size_and_hash(content: Content) -> dict[str, int | str]:
    if isinstance(content, bytes):
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {"bytes": content.stat().st_size, "sha256": file_hash(content)}


def total_bytes(files: Mapping[str, Content]) -> int:
    return sum(
        len(content) if isinstance(content, bytes) else content.stat().st_size
        for content in files.values()
    )


def object_id(manifest: str | bytes) -> str:
    return hashlib.sha256(manifest.encode() if isinstance(manifest, str) else manifest).hexdigest()


def listed_files(manifest: bytes, where: str) -> dict[str, dict[str, Any]]:
    """Parses a manifest: name -> {bytes, sha256} of an adapter's files. CorruptFileError lists
    faults.
    """
    stored = parse_json(manifest, Path(where), max_bytes=MAX_MANIFEST_BYTES)
    files = stored.get("files")
    faults = []
    if stored.get("format_version") != 1 or not isinstance(files, dict) or not files:
        faults.append("it lists no files")
        files = {}
    faults += [
        f"{name[:80]!r} is not a file of an adapter" for name in files if name not in ADAPTER_FILES
    ]
    faults += [f"{name} is not listed" for name in ADAPTER_FILES[:2] if name not in files]
    for name, entry in files.items():
        if (
            not isinstance(entry, dict)
            or set(entry) != {"bytes", "sha256"}
            or type(entry["bytes"]) is not int
            or entry["bytes"] < 0
            or not is_id(str(entry["sha256"]))
        ):
            faults.append(f"{name[:80]}: no size and hash")
    if faults:
        raise CorruptFileError(
            f"{where} is not the manifest of an object", faults, "Copy it again."
        )
    return files


@contextmanager
def receiving(objects: Path, object_hash: str, needed_bytes: int) -> Iterator[Path | None]:
    """Yields a folder to fill with the object's files and its MANIFEST.json, None if it exists
    intact.

    On leaving, every byte must match the id, or nothing is stored. CorruptFileError lists the
    differences.
    """
    folder = objects / object_hash
    if os.path.lexists(folder):
        if not object_faults(folder):
            yield None
            return
        set_aside(folder)
    started = False
    try:
        with atomic_folder(folder, needed_bytes=needed_bytes) as partial:
            started = True
            yield partial
            if faults := object_faults(partial, object_hash=object_hash):
                raise CorruptFileError(
                    f"object {object_hash[:12]}… arrived damaged",
                    faults,
                    "Try again; nothing of it was stored.",
                )
    except (ConfigError, InputError):
        if object_faults(folder):  # otherwise another process put the same bytes there first
            raise
        if not started:
            yield None


def set_aside(folder: Path) -> None:
    """Renames a broken object; the next collection removes it."""
    with suppress(FileNotFoundError):  # another process did it first
        folder.rename(folder.with_name(f".broken-{os.getpid()}-{time.monotonic_ns()}"))


def put(objects: Path, files: Mapping[str, Content]) -> str:
    """Copies files into the store unless it has them; returns their object's id."""
    manifest = manifest_text(files)
    object_hash = object_id(manifest)
    with receiving(objects, object_hash, total_bytes(files)) as partial:
        if partial is not None:
            for name, content in files.items():
                if isinstance(content, bytes):
                    (partial / name).write_bytes(content)
                else:
                    shutil.copyfile(content, partial / name)
            (partial / MANIFEST).write_text(manifest, encoding="utf-8")
    return object_hash


def object_faults(folder: Path, *, object_hash: str | None = None) -> list[str]:
    """Lists what is wrong with an object's folder; empty if every byte matches its id."""
    expected = folder.name if object_hash is None else object_hash
    if not folder.is_dir():
        return [f"object {expected[:12]}… is missing"]
    if not (folder / MANIFEST).is_file() or (folder / MANIFEST).is_symlink():
        return [f"{MANIFEST} is missing: the object is incomplete"]
    if (digest := file_hash(folder / MANIFEST)) != expected:
        return [
            f"{MANIFEST} changed: SHA-256 {digest[:12]}…, the object is called {expected[:12]}…"
        ]
    return verify_manifest(folder)


def stored_ids(objects: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(objects) if is_id(entry.name))
    except FileNotFoundError:
        return []


def folder_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
