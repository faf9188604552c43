"""Libraries elsewhere: what one must answer, and how an object is fetched from there.

Every byte is compared with the hashes that the object's id verifies before the object appears. An
interrupted transfer continues where it stopped; files that are intact are not fetched again.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from veneer.errors import CorruptFileError, SourceError
from veneer.files.atomic import MANIFEST
from veneer.files.hashes import file_hash
from veneer.files.lock import locked
from veneer.library.library import Library
from veneer.library.objects import (
    MAX_MANIFEST_BYTES,
    listed_files,
    object_faults,
    object_id,
    receiving,
)
from veneer.library.records import Record, Version

CHUNK_BYTES = 1 << 20


class Remote(Protocol):
    """Answers for a library elsewhere."""

    address: str

    def record(self, name: str) -> Record | None:
        """Returns the versions of a name there, None if there is no such name."""

    def names(self) -> list[str] | None:
        """Lists the names there, None if the address cannot be listed."""

    def read(self, path: str, offset: int) -> Iterator[bytes]:
        """Yields a file's bytes from an offset on. Raises SourceError."""

    def publish(self, name: str, version: Version, folder: Path) -> str:
        """Writes an object and a name's version there; returns its reference there."""


@dataclass(frozen=True)
class Transfer:
    """Reports a push. reference: its name at the destination; skipped: its bytes existed there."""

    reference: str
    address: str
    bytes: int
    skipped: bool


def fetch_object(library: Library, remote: Remote, wanted: str) -> None:
    """Fetches an object into the library, by way of `incoming/`. CorruptFileError: its bytes do not
    match its id.
    """
    if not object_faults(library.objects / wanted):
        return
    incoming = library.folder / "incoming" / wanted
    with locked(incoming.with_name(f".{wanted}.lock"), wait_seconds=3600):
        incoming.mkdir(parents=True, exist_ok=True)
        manifest = b"".join(
            _limited(remote.read(f"objects/{wanted}/{MANIFEST}", 0), MAX_MANIFEST_BYTES)
        )
        if (received_id := object_id(manifest)) != wanted:
            raise CorruptFileError(
                f"{remote.address} returned another object than the one requested",
                [f"asked for {wanted[:12]}…, its {MANIFEST} is that of {received_id[:12]}…"],
                "Nothing was stored. Push it there again.",
            )
        files = listed_files(manifest, f"{remote.address}/objects/{wanted}/{MANIFEST}")
        needed = sum(int(entry["bytes"]) for entry in files.values())
        with receiving(library.objects, wanted, needed) as partial:
            if partial is not None:
                for file, entry in files.items():
                    _fetch_file(
                        remote,
                        f"objects/{wanted}/{file}",
                        incoming / file,
                        entry["bytes"],
                        entry["sha256"],
                    )
                    (incoming / file).replace(partial / file)
                (partial / MANIFEST).write_bytes(manifest)
        shutil.rmtree(incoming)


def _fetch_file(remote: Remote, path: str, into: Path, size: int, sha256: str) -> None:
    """Continues an interrupted transfer; starts once more if the result has wrong bytes."""
    for attempt in ("continue", "restart"):
        received = into.stat().st_size if into.exists() and attempt == "continue" else 0
        if received > size:
            received = 0
        if received < size or received == 0:
            with into.open("r+b" if received else "wb") as file:
                file.seek(received)
                for piece in _limited(remote.read(path, received), size - received):
                    file.write(piece)
        if into.stat().st_size == size and file_hash(into) == sha256:
            return
        if not received:
            break
    faults = [
        f"{into.stat().st_size:,} of {size:,} bytes, SHA-256 {file_hash(into)[:12]}…, not"
        f" {sha256[:12]}…"
    ]
    into.unlink()
    raise CorruptFileError(
        f"{remote.address}/{path} arrived damaged", faults, "Try again, or push it there again."
    )


def _limited(pieces: Iterator[bytes], limit: int) -> Iterator[bytes]:
    """Yields pieces; raises if they have more bytes than were announced."""
    for piece in pieces:
        limit -= len(piece)
        if limit < 0:
            raise CorruptFileError(
                "more bytes arrived than were announced", [], "Nothing of it was stored."
            )
        yield piece


class FolderRemote:
    """Answers for another library on a file system."""

    def __init__(self, library: Library) -> None:
        self.library, self.address = library, str(library.folder)

    def record(self, name: str) -> Record | None:
        return self.library.record(name) if self.library.has(name) else None

    def names(self) -> list[str] | None:
        return self.library.all_names()

    def read(self, path: str, offset: int) -> Iterator[bytes]:
        try:
            with (self.library.folder / path).open("rb") as file:
                file.seek(offset)
                while piece := file.read(CHUNK_BYTES):
                    yield piece
        except OSError as fault:
            raise SourceError(f"{self.address}/{path} cannot be read: {fault.strerror}") from fault

    def publish(self, name: str, version: Version, folder: Path) -> str:
        with self.library.receiving():
            fetch_object(self.library, FolderRemote(Library(folder.parent.parent)), version.object)
            entry = self.library.point(
                name, version.object, version.facts, tags=version.tags, note=version.note
            )
        return entry.reference
