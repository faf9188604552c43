"""The index of a library: every record in one file, so that listing thousands opens one.

It is never trusted further than the file system: an entry counts while its record's file has the
same time, size and inode; what changed is read again and checked, and a missing or broken index is
built anew. Writers do not touch it. Its first line is the SHA-256 of the rest.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from veneer.errors import VeneerError
from veneer.files.atomic import atomic_file
from veneer.files.strict_json import read_json
from veneer.library.names import is_name
from veneer.library.records import parse_record

INDEX = "index.json"
_VERSION = 1
_SETTLED_NS = 2_000_000_000
"""A record as young as this may change again within the clock's grain: it is read anew, not taken
from the index."""

Stored = dict[str, Any]


def indexed_records(names: Path, index: Path) -> dict[str, Stored]:
    """Name -> its record as JSON, checked by parse_record now or when it entered the index; sorted
    by name.

    A record that cannot be read raises what read_json and parse_record raise.
    """
    cached = _cached(index)
    found: dict[str, Stored] = {}
    entries: dict[str, list[Any]] = {}
    now = time.time_ns()
    stale = 0
    for name, stat in _files(names):
        key = [stat.st_mtime_ns, stat.st_size, stat.st_ino]
        entry = cached.get(name)
        if entry is not None and entry[:3] == key:
            found[name] = entry[3]
        else:
            path = names / f"{name}.json"
            try:
                found[name] = read_json(path)
                parse_record(found[name], path)
            except VeneerError:
                if not path.exists():  # removed while we looked
                    continue
                raise
            stale += 1
        if now - stat.st_mtime_ns > _SETTLED_NS:
            entries[name] = [*key, found[name]]
    if (stale or len(cached) != len(entries)) and entries != cached:
        _write(index, entries)
    return dict(sorted(found.items()))


def _files(names: Path) -> list[tuple[str, os.stat_result]]:
    files = []
    try:
        with os.scandir(names) as scanned:
            for entry in scanned:
                if entry.name.endswith(".json") and is_name(entry.name.removesuffix(".json")):
                    try:
                        files.append(
                            (entry.name.removesuffix(".json"), entry.stat(follow_symlinks=False))
                        )
                    except FileNotFoundError:
                        continue
    except FileNotFoundError:
        return []
    return files


def _cached(index: Path) -> dict[str, list[Any]]:
    """What the index says; nothing where it is missing, broken or of another version: it will be
    built anew."""
    try:
        digest, _, text = index.read_bytes().partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != digest:
            return {}
        stored = json.loads(text)
    except (OSError, ValueError):
        return {}
    records: dict[str, list[Any]] = (
        stored["records"] if stored["format_version"] == _VERSION else {}
    )
    return records


def _write(index: Path, entries: dict[str, list[Any]]) -> None:
    text = json.dumps({"format_version": _VERSION, "records": entries}, separators=(",", ":"))
    try:
        with atomic_file(index, replace=True) as partial:
            partial.write_text(
                f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}", encoding="ascii"
            )
    except VeneerError:
        # a library that may only be read, or a full disk: the next listing reads the records
        # again
        return
