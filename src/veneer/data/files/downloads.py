"""Remote files of rows, downloaded into the cache folder.

    <cache>/data/<aa>/<hash><.jsonl...>    a file's bytes, named by their SHA-256
    <cache>/data/state/<hash>.json         which bytes an address had in which state

A state is what the store says of the file: an ETag, another checksum or version, else the time
of its last change. A file is downloaded again whenever its state differs. It is also downloaded
where the store names no state, where the last change is so recent that another one could have the
same time, and where the kept bytes are not those that were written.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from veneer.errors import DataError, VeneerError
from veneer.files.atomic import atomic_file
from veneer.files.cache import CACHE_STEP, cache_folder
from veneer.files.hashes import file_hash
from veneer.files.partial import scratch_folder, sweep
from veneer.files.strict_json import read_json
from veneer.files.system_errors import explained

CONTENT_TAGS = (
    *(
        "etag",
        "content-md5",
        "digest",
        "md5",
        "md5hash",
        "crc",
        "crc32c",
        "checksum",
        "sha",
        "sha256",
        "hex",
    ),
    *("oid", "blob_id", "version_id", "versionid", "generation"),
)
"""What stores call a tag that changes with a file's content, in lower case."""
TIMES = (
    *(
        "last-modified",
        "last_modified",
        "lastmodified",
        "modified",
        "modify",
        "mtime",
        "updated",
        "last_write_time",
    ),
    *("modificationtime", "modification_time"),
)
"""What stores call the time of its last change."""
SETTLED_SECONDS = 60.0
"""Times may be whole seconds, and clocks differ: a later change may have the time of one that is
younger than this."""


def downloaded(fs: Any, file: str, name: str) -> Path:
    """The file's bytes in the cache folder. name: its address, for messages. DataError: it cannot
    be read."""
    folder, state = cache_folder() / "data", _state(fs, file, name)
    key = hashlib.sha256(f"{name}\n{state}".encode()).hexdigest()
    record = folder / "state" / f"{key}.json"
    if state is not None and (kept := _kept(folder, record, file)) is not None:
        return kept
    with explained(folder, next_step=CACHE_STEP):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        with scratch_folder(folder) as scratch:
            partial = scratch / "rows"
            _download(fs, file, name, partial)
            digest = file_hash(partial)
            target = _named(folder, digest, file)
            target.parent.mkdir(exist_ok=True)
            partial.replace(target)
        if state is not None and _state(fs, file, name) == state:  # else it changed meanwhile
            record.parent.mkdir(exist_ok=True)
            with atomic_file(record, replace=True) as unfinished:
                unfinished.write_text(
                    json.dumps({"name": name, "state": state, "sha256": digest}), encoding="utf-8"
                )
    return target


def unreachable(name: str, fault: Exception) -> DataError:
    said = str(fault).strip().splitlines()
    return DataError(
        f"{name} cannot be read from here",
        [f"{type(fault).__name__}: {said[0][:300] if said else ''}"],
        "Look at the address, the network and your right to read it; or bring the file here and"
        " name that.",
    )


def _named(folder: Path, digest: str, file: str) -> Path:
    return folder / digest[:2] / f"{digest}{''.join(Path(file).suffixes[-2:])}"


def _kept(folder: Path, record: Path, file: str) -> Path | None:
    """The bytes that a record names; None if there is no record, or they are damaged."""
    with suppress(VeneerError, OSError, KeyError, TypeError):
        digest = str(read_json(record)["sha256"])
        target = _named(folder, digest, file)
        if file_hash(target) == digest:
            return target
    return None


def _state(fs: Any, file: str, name: str) -> str | None:
    """What the store says of the file's content. None if it says nothing, or nothing that a change
    would alter."""
    try:
        fs.invalidate_cache()  # listings of earlier in this process
        info = {str(key).lower(): value for key, value in fs.info(file).items()}
        state = {
            key: value for key, value in info.items() if key in (*CONTENT_TAGS, *TIMES) and value
        }
        if not state:
            with suppress(NotImplementedError):
                state["modified"] = fs.modified(file)
    except Exception as fault:  # every store raises errors of its own
        raise unreachable(name, fault) from fault
    if not state or (state.keys() <= set(TIMES) and not _settled(state)):
        return None
    return json.dumps({**state, "size": info.get("size")}, sort_keys=True, default=str)


def _settled(times: Mapping[str, Any]) -> bool:
    seconds = [_seconds(value) for value in times.values()]
    return all(each is None or each < time.time() - SETTLED_SECONDS for each in seconds)


def _seconds(value: Any) -> float | None:
    """Seconds since 1970 of a time as a store writes it; None if it is none that is known."""
    if isinstance(value, int | float):
        return value / 1000 if value > 1e11 else float(value)  # some count milliseconds
    with suppress(ValueError, TypeError):
        value = value if isinstance(value, datetime) else _parsed(str(value))
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return None


def _parsed(text: str) -> datetime:
    with suppress(ValueError, TypeError):
        return parsedate_to_datetime(text)
    return datetime.fromisoformat(text)


def _download(fs: Any, file: str, name: str, target: Path) -> None:
    """In one request where the store allows it: pieces could be of two versions."""
    try:
        fs.get_file(file, str(target))
    except OSError as fault:
        if fault.errno is not None and fault.filename == str(target):
            raise
        raise unreachable(name, fault) from fault
    except Exception as fault:  # every store raises errors of its own
        raise unreachable(name, fault) from fault
