"""A library at an fsspec address: s3://, gcs://, ssh://, memory://, and http(s):// for reading.

An object is complete (its MANIFEST.json is written last) before a name's record points to it. Such
stores have no locks: a record is read back after writing, and written again if another writer came
between.
"""

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from veneer.errors import (
    ConfigError,
    CorruptFileError,
    InputError,
    SourceError,
    VeneerError,
    first_line,
)
from veneer.files.addresses import file_system
from veneer.files.atomic import MANIFEST
from veneer.files.strict_json import MAX_JSON_BYTES, parse_json
from veneer.library.records import Record, Version, parse_record
from veneer.library.remote.remote import CHUNK_BYTES

_ATTEMPTS = 8
_READ_ONLY = ("http", "https")


class FsspecRemote:
    """Reads and writes a library at a URL.

    Raises ConfigError that names the package if the scheme needs one besides fsspec (s3fs, gcsfs,
    ...).
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        scheme = address.partition("://")[0]
        self._fs, self._root = file_system(self.address)
        self._read_only = scheme in _READ_ONLY

    def _at(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"

    def record(self, name: str) -> Record | None:
        path = f"names/{name}.json"
        try:
            self._fs.invalidate_cache()  # another writer may have replaced it since a listing
            with self._fs.open(self._at(path), "rb") as file:
                text = file.read(MAX_JSON_BYTES + 1)
        except FileNotFoundError:
            return None
        except Exception as fault:  # every store raises errors of its own
            raise self._unreadable(path, fault) from fault
        where = Path(f"{self.address}/{path}")
        return parse_record(parse_json(text, where, max_bytes=MAX_JSON_BYTES), where)

    def names(self) -> list[str] | None:
        if self._read_only:
            return None
        try:
            self._fs.invalidate_cache()
            paths = self._fs.ls(self._at("names"), detail=False)
        except FileNotFoundError:
            return []
        except Exception as fault:
            raise self._unreadable("names", fault) from fault
        return sorted(PurePosixPath(path).stem for path in paths if str(path).endswith(".json"))

    def read(self, path: str, offset: int) -> Iterator[bytes]:
        try:
            with self._fs.open(self._at(path), "rb") as file:
                if offset:
                    file.seek(offset)
                while piece := file.read(CHUNK_BYTES):
                    yield piece
        except VeneerError:
            raise
        except Exception as fault:
            raise self._unreadable(path, fault) from fault

    def publish(self, name: str, version: Version, folder: Path) -> str:
        if self._read_only:
            raise ConfigError(
                f"{self.address} is read-only", [], "Push to the store that it serves."
            )
        try:
            self._put_object(version.object, folder)
            for _ in range(_ATTEMPTS):
                record = self.record(name) or Record()
                equal = [v for v in record.versions if v.object == version.object]
                if equal:
                    return f"{name}@{equal[-1].version}"
                published = version.model_copy(update={"version": record.next_version})
                untagged = [
                    v.model_copy(update={"tags": [t for t in v.tags if t not in version.tags]})
                    for v in record.versions
                ]
                changed = Record(
                    next_version=record.next_version + 1, versions=[*untagged, published]
                )
                self._exchange(f"names/{name}.json", changed)
        except VeneerError:
            raise
        except Exception as fault:
            raise InputError(
                f"{self.address} cannot be written: {first_line(fault)}",
                [],
                "Check the address and your permissions.",
            ) from fault
        raise InputError(f"{self.address}: other writers keep changing {name!r}", [], "Try again.")

    def _put_object(self, object: str, folder: Path) -> None:
        """Uploads file by file, MANIFEST.json last; skips a file that has the right size there."""
        files = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
        self._fs.makedirs(self._at(f"objects/{object}"), exist_ok=True)
        self._fs.makedirs(self._at("names"), exist_ok=True)
        for file in (*files, MANIFEST):
            target, size = self._at(f"objects/{object}/{file}"), (folder / file).stat().st_size
            if not (self._fs.exists(target) and self._fs.size(target) == size):
                self._fs.put_file(str(folder / file), target)
            if (arrived := self._fs.size(target)) != size:
                raise CorruptFileError(
                    f"{self.address}: {file} arrived with {arrived:,} of {size:,} bytes",
                    [],
                    "Push again.",
                )
        if not self._fs.exists(self._at("library.json")):
            self._fs.pipe_file(self._at("library.json"), b'{"format_version": 1}\n')

    def _exchange(self, path: str, record: Record) -> None:
        text = (
            json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False)
            + "\n"
        )
        partial = self._at(f"{path}.{uuid4().hex}.partial")
        self._fs.pipe_file(partial, text.encode())
        self._fs.mv(partial, self._at(path))

    def _unreadable(self, path: str, fault: Any) -> SourceError:
        return SourceError(
            f"{self.address}/{path} cannot be read: {first_line(fault)}",
            [],
            "Try again; what has arrived is kept.",
        )
