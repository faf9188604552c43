"""A library elsewhere: what it must answer, and how an object comes from there.

What arrives is compared with the hashes that its id vouches for, byte by byte, before it appears; a
transfer that was cut off goes on where it stopped, and files that are there and whole are not
fetched again.
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
    """A library elsewhere."""

    address: str

    def record(self, name: str) -> Record | None:
        """The versions of a name there; None where there is no such name."""

    def names(self) -> list[str] | None:
        """What there is; None where an address cannot be listed."""

    def read(self, path: str, offset: int) -> Iterator[bytes]:
        """The bytes of a file from an offset on, in pieces. SourceError: not there, or cut off."""

    def publish(self, name: str, version: Version, folder: Path) -> str:
        """Puts an object and a name's version there; returns the reference it has there."""


@dataclass(frozen=True)
class Transfer:
    """reference: what it is called where it went; skipped: its bytes were there already."""

    reference: str
    address: str
    bytes: int
    skipped: bool


def fetch_object(library: Library, remote: Remote, wanted: str) -> None:
    """Brings an object into the library, in `incoming/` first. CorruptFileError: its bytes are not
    what its id says."""
    if not object_faults(library.objects / wanted):
        return
    incoming = library.folder / "incoming" / wanted
    with locked(incoming.with_name(f".{wanted}.lock"), wait_seconds=3600):
        incoming.mkdir(parents=True, exist_ok=True)
        manifest = b"".join(
            _limited(remote.read(f"objects/{wanted}/{MANIFEST}", 0), MAX_MANIFEST_BYTES)
        )
        if (found := object_id(manifest)) != wanted:
            raise CorruptFileError(
                f"{remote.address} gives another object than it names",
                [f"asked for {wanted[:12]}…, its {MANIFEST} is that of {found[:12]}…"],
                "Nothing was kept. Push it there again.",
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
    """Goes on where an earlier transfer stopped; once more from the start if that does not give the
    right bytes."""
    for attempt in ("go on", "anew"):
        have = into.stat().st_size if into.exists() and attempt == "go on" else 0
        if have > size:
            have = 0
        if have < size or have == 0:
            with into.open("r+b" if have else "wb") as file:
                file.seek(have)
                for piece in _limited(remote.read(path, have), size - have):
                    file.write(piece)
        if into.stat().st_size == size and file_hash(into) == sha256:
            return
        if not have:
            break
    faults = [
        f"{into.stat().st_size:,} of {size:,} bytes, SHA-256 {file_hash(into)[:12]}…, not"
        f" {sha256[:12]}…"
    ]
    into.unlink()
    raise CorruptFileError(
        f"{remote.address}/{path} did not arrive whole",
        faults,
        "Try again, or push it there again.",
    )


def _limited(pieces: Iterator[bytes], limit: int) -> Iterator[bytes]:
    """Never more than was announced."""
    for piece in pieces:
        limit -= len(piece)
        if limit < 0:
            raise CorruptFileError(
                "more bytes arrive than were announced", [], "Nothing was kept of it."
            )
        yield piece


class FolderRemote:
    """Another library on a file system."""

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
