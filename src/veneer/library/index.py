"""The index of a library: every record in one file, so that listing thousands opens one.

An entry counts only while its record's file has the same time, size and inode; a changed file is
read and checked again, and a missing or broken index is rebuilt. Writers do not touch it. Its first
line is the SHA-256 of the rest.
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
"""A younger record may change again within the clock's resolution, so it is not indexed yet."""

Stored = dict[str, Any]


def indexed_records(names: Path, index: Path) -> dict[str, Stored]:
    """Returns the records as JSON by name, sorted; each was checked by parse_record now or earlier.

    Raises what read_json and parse_record raise for a record that cannot be read.
    """
    cached = _cached(index)
    records: dict[str, Stored] = {}
    entries: dict[str, list[Any]] = {}
    now = time.time_ns()
    stale = 0
    for name, stat in _files(names):
        key = [stat.st_mtime_ns, stat.st_size, stat.st_ino]
        entry = cached.get(name)
        if entry is not None and entry[:3] == key:
            records[name] = entry[3]
        else:
            path = names / f"{name}.json"
            try:
                records[name] = read_json(path)
                parse_record(records[name], path)
            except VeneerError:
                if not path.exists():  # removed meanwhile
                    continue
                raise
            stale += 1
        if now - stat.st_mtime_ns > _SETTLED_NS:
            entries[name] = [*key, records[name]]
    if (stale or len(cached) != len(entries)) and entries != cached:
        _write(index, entries)
    return dict(sorted(records.items()))


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
    """Reads the index; returns {} if it is missing, broken or of another version."""
    try:
        digest, _, text = index.read_bytes().partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != digest:
            return {}
        stored = json.loads(text)
    except (OSError, ValueError):
        return {}
    return stored["records"] if stored["format_version"] == _VERSION else {}


def _write(index: Path, entries: dict[str, list[Any]]) -> None:
    text = json.dumps({"format_version": _VERSION, "records": entries}, separators=(",", ":"))
    try:
        with atomic_file(index, replace=True) as partial:
            partial.write_text(
                f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}", encoding="ascii"
            )
    except VeneerError:
        # A read-only library or a full disk: the next listing reads the records again.
        return
