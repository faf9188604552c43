"""Downloads remote row files into the cache folder.

<cache>/data/<aa>/<hash><.jsonl...>    a file's bytes, named by their SHA-256
<cache>/data/state/<hash>.json         the bytes that an address had in a state

A state is what the store reports of the file: an ETag, another checksum or version, else the time
of its last change. A file is download_if_changed again if its state differs. It is also
download_if_changed if the store reports no state, if the last change is so recent that another one
could have the same time, or if the cached bytes are damaged.
"""

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
"""Names that stores use for a tag that changes with a file's content, in lower case."""
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
"""Names that stores use for the time of a file's last change."""
SETTLED_SECONDS = 60.0
"""Times may be whole seconds, and clocks differ: a change younger than this may share its time with
the next change."""


def download_if_changed(fs: Any, file: str, name: str) -> Path:
    """Returns the path of the file's bytes in the cache folder. Raises DataError if it cannot be
    read.

    name: the address, for messages
    """
    folder, state = cache_folder() / "data", _remote_state(fs, file, name)
    key = hashlib.sha256(f"{name}\n{state}".encode()).hexdigest()
    record = folder / "state" / f"{key}.json"
    if state is not None and (cached := _cached_file(folder, record, file)) is not None:
        return cached
    with explained(folder, next_step=CACHE_STEP):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        with scratch_folder(folder) as scratch:
            partial = scratch / "rows"
            _download(fs, file, name, partial)
            digest = file_hash(partial)
            target = _cache_path(folder, digest, file)
            target.parent.mkdir(exist_ok=True)
            partial.replace(target)
        if (
            state is not None and _remote_state(fs, file, name) == state
        ):  # it did not change meanwhile
            record.parent.mkdir(exist_ok=True)
            with atomic_file(record, replace=True) as unfinished:
                unfinished.write_text(
                    json.dumps({"name": name, "state": state, "sha256": digest}), encoding="utf-8"
                )
    return target


def unreachable(name: str, fault: Exception) -> DataError:
    """Makes the error for an address that cannot be read."""
    lines = str(fault).strip().splitlines()
    return DataError(
        f"{name} cannot be read from here",
        [f"{type(fault).__name__}: {lines[0][:300] if lines else ''}"],
        "Check the address, the network and your access rights; or download the file and name the"
        " copy.",
    )


def _cache_path(folder: Path, digest: str, file: str) -> Path:
    return folder / digest[:2] / f"{digest}{''.join(Path(file).suffixes[-2:])}"


def _cached_file(folder: Path, record: Path, file: str) -> Path | None:
    """Returns the file that a record names. Returns None if there is no record or the bytes are
    damaged."""
    with suppress(VeneerError, OSError, KeyError, TypeError):
        digest = str(read_json(record)["sha256"])
        target = _cache_path(folder, digest, file)
        if file_hash(target) == digest:
            return target
    return None


def _remote_state(fs: Any, file: str, name: str) -> str | None:
    """Asks the store for the state of the file's content. Returns None if it reports none, or only
    times that are too recent."""
    try:
        fs.invalidate_cache()  # drop listings from earlier in this process
        info = {str(key).lower(): value for key, value in fs.info(file).items()}
        state = {
            key: value for key, value in info.items() if key in (*CONTENT_TAGS, *TIMES) and value
        }
        if not state:
            with suppress(NotImplementedError):
                state["modified"] = fs.modified(file)
    except Exception as fault:  # every store raises errors of its own
        raise unreachable(name, fault) from fault
    if not state or (state.keys() <= set(TIMES) and not _is_settled(state)):
        return None
    return json.dumps({**state, "size": info.get("size")}, sort_keys=True, default=str)


def _is_settled(times: Mapping[str, Any]) -> bool:
    seconds = [_unix_seconds(value) for value in times.values()]
    return all(second is None or second < time.time() - SETTLED_SECONDS for second in seconds)


def _unix_seconds(value: Any) -> float | None:
    """Converts a store's time to seconds since 1970. Returns None for an unknown form."""
    if isinstance(value, int | float):
        return value / 1000 if value > 1e11 else float(value)  # some count milliseconds
    with suppress(ValueError, TypeError):
        value = value if isinstance(value, datetime) else _parse_time(str(value))
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return None


def _parse_time(text: str) -> datetime:
    with suppress(ValueError, TypeError):
        return parsedate_to_datetime(text)
    return datetime.fromisoformat(text)


def _download(fs: Any, file: str, name: str, target: Path) -> None:
    """Downloads in one request if the store allows it: pieces could belong to two versions."""
    try:
        fs.get_file(file, str(target))
    except OSError as fault:
        if fault.errno is not None and fault.filename == str(target):
            raise
        raise unreachable(name, fault) from fault
    except Exception as fault:  # every store raises errors of its own
        raise unreachable(name, fault) from fault
