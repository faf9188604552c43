"""A library at an address of fsspec's: s3://, gcs://, ssh://, memory://, and http(s):// for
reading.

Objects are complete (their MANIFEST.json goes last) before a name's record is exchanged. Such
stores have no locks: a record is read back after writing, and written again where another writer
came between.
"""

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from veneer.errors import ConfigError, CorruptFileError, InputError, SourceError, VeneerError
from veneer.files.addresses import file_system
from veneer.files.atomic import MANIFEST
from veneer.files.strict_json import MAX_JSON_BYTES, parse_json
from veneer.library.records import Record, Version, parse_record
from veneer.library.remote.place import CHUNK_BYTES

_ATTEMPTS = 8
_READ_ONLY = ("http", "https")


class FsspecRemote:
    """address: a URL; what its scheme needs besides fsspec (s3fs, gcsfs, aiohttp, ...) is told when
    it is missing."""

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
            found = self._fs.ls(self._at("names"), detail=False)
        except FileNotFoundError:
            return []
        except Exception as fault:
            raise self._unreadable("names", fault) from fault
        return sorted(PurePosixPath(path).stem for path in found if str(path).endswith(".json"))

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
                f"{self.address} can only be read", [], "Push to the store behind it."
            )
        try:
            self._put_object(version.object, folder)
            for _ in range(_ATTEMPTS):
                record = self.record(name) or Record()
                same = [v for v in record.versions if v.object == version.object]
                if same:
                    return f"{name}@{same[-1].version}"
                theirs = version.model_copy(update={"version": record.next_version})
                others = [
                    v.model_copy(update={"tags": [t for t in v.tags if t not in version.tags]})
                    for v in record.versions
                ]
                changed = Record(next_version=record.next_version + 1, versions=[*others, theirs])
                self._exchange(f"names/{name}.json", changed)
        except VeneerError:
            raise
        except Exception as fault:
            raise InputError(
                f"{self.address} cannot be written: {_said(fault)}",
                [],
                "Look at the address and your rights.",
            ) from fault
        raise InputError(f"{self.address}: others keep writing {name!r}", [], "Try again.")

    def _put_object(self, object: str, folder: Path) -> None:
        """File by file, MANIFEST.json last; a file that is there in its size is not sent again."""
        files = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
        self._fs.makedirs(self._at(f"objects/{object}"), exist_ok=True)
        self._fs.makedirs(self._at("names"), exist_ok=True)
        for file in (*files, MANIFEST):
            there, size = self._at(f"objects/{object}/{file}"), (folder / file).stat().st_size
            if not (self._fs.exists(there) and self._fs.size(there) == size):
                self._fs.put_file(str(folder / file), there)
            if (found := self._fs.size(there)) != size:
                raise CorruptFileError(
                    f"{self.address}: {file} arrived with {found:,} of {size:,} bytes",
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
        beside = self._at(f"{path}.{uuid4().hex}.partial")
        self._fs.pipe_file(beside, text.encode())
        self._fs.mv(beside, self._at(path))

    def _unreadable(self, path: str, fault: Any) -> SourceError:
        return SourceError(
            f"{self.address}/{path} cannot be read: {_said(fault)}",
            [],
            "Try again; what has arrived is kept.",
        )


def _said(fault: Any) -> str:
    return f"{type(fault).__name__}: {fault}".strip().splitlines()[0][:200]
