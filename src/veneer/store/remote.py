"""Whole versions to another library and back: a folder, any address that fsspec knows, a repository of the hub.

    /folder, file://...          another library, under its own locks
    s3://, gcs://, ssh://, ...   the same layout at that address; http(s):// for reading
    hf://org/name[@revision]     one adapter, in the repository's root, as PEFT reads it (store/remote_hub.py)

What arrives is compared with the hashes that its id vouches for, byte by byte, before it appears; a transfer that was
cut off goes on where it stopped, and files that are there and whole are not fetched again. What a record says of an
object is not believed: the facts are read from the object.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from veneer.errors import ConfigError, CorruptFileError, SourceError
from veneer.files.atomic import MANIFEST
from veneer.files.hashes import file_hash
from veneer.files.lock import locked
from veneer.store.library import Entry, Library, chosen_version
from veneer.store.names import Reference, check_name, parse_reference
from veneer.store.objects import MAX_MANIFEST_BYTES, listed_files, object_faults, object_id, receiving
from veneer.store.records import Record, Version

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
class Moved:
    """reference: what it is called where it went; skipped: its bytes were there already."""

    reference: str
    address: str
    bytes: int
    skipped: bool


def remote_at(address: str) -> Remote:
    """ConfigError: an address of a kind that nothing here reads."""
    scheme, separator, rest = address.partition("://")
    if not separator or scheme == "file":
        return FolderRemote(Library(rest if separator else address))
    from veneer.store.remote_fsspec import FsspecRemote

    return FsspecRemote(address)


def push(library: Library, reference: str, address: str) -> Moved:
    """Copies a version to another library, under its own name. The same bytes there are not sent again."""
    entry = library.get(reference)
    folder = library.whole(entry.reference)
    if address.startswith("hf://"):
        from veneer.store.remote_hub import push_to_hub

        return push_to_hub(entry, folder, address)
    remote = remote_at(address)
    there = remote.record(entry.name)
    skipped = there is not None and any(v.object == entry.version.object for v in there.versions)
    known = remote.publish(entry.name, entry.version, folder)
    return Moved(known, address, entry.version.facts.bytes, skipped)


def pull(library: Library, address: str, reference: str | None = None, *, name: str | None = None) -> Entry:
    """Fetches a version and makes it the newest of `name` (default: as it is called there)."""
    if address.startswith("hf://"):
        from veneer.store.remote_hub import pull_from_hub

        return pull_from_hub(library, address, name=name)
    if reference is None:
        raise ConfigError("which adapter is meant?", [], "Name it: NAME, NAME@2 or NAME@tag.")
    wanted, remote = parse_reference(reference), remote_at(address)
    version = _wanted(remote, wanted)
    check_name(name or wanted.name)
    with library.receiving():
        fetch_object(library, remote, version.object)
        from veneer.store.adapter import read_adapter  # loads torch
        from veneer.store.intake import facts_of

        facts = facts_of(read_adapter(library.objects / version.object))
        return library.point(name or wanted.name, version.object, facts, tags=version.tags, note=version.note)


def _wanted(remote: Remote, wanted: Reference) -> Version:
    record = remote.record(wanted.name)
    if record is None:
        there = remote.names()
        listed = "" if there is None else f"There is: {', '.join(there[:12]) or 'nothing'}."
        raise SourceError(f"no adapter {wanted.name!r} at {remote.address}", [], listed)
    return chosen_version(wanted, record)


def fetch_object(library: Library, remote: Remote, wanted: str) -> None:
    """Brings an object into the library, in `incoming/` first. CorruptFileError: its bytes are not what its id says."""
    if not object_faults(library.objects / wanted):
        return
    incoming = library.folder / "incoming" / wanted
    with locked(incoming.with_name(f".{wanted}.lock"), wait_seconds=3600):
        incoming.mkdir(parents=True, exist_ok=True)
        manifest = b"".join(_limited(remote.read(f"objects/{wanted}/{MANIFEST}", 0), MAX_MANIFEST_BYTES))
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
                        remote, f"objects/{wanted}/{file}", incoming / file, entry["bytes"], entry["sha256"]
                    )
                    (incoming / file).replace(partial / file)
                (partial / MANIFEST).write_bytes(manifest)
        shutil.rmtree(incoming)


def _fetch_file(remote: Remote, path: str, into: Path, size: int, sha256: str) -> None:
    """Goes on where an earlier transfer stopped; once more from the start if that does not give the right bytes."""
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
        f"{into.stat().st_size:,} of {size:,} bytes, SHA-256 {file_hash(into)[:12]}…, not {sha256[:12]}…"
    ]
    into.unlink()
    raise CorruptFileError(
        f"{remote.address}/{path} did not arrive whole", faults, "Try again, or push it there again."
    )


def _limited(pieces: Iterator[bytes], limit: int) -> Iterator[bytes]:
    """Never more than was announced."""
    for piece in pieces:
        limit -= len(piece)
        if limit < 0:
            raise CorruptFileError("more bytes arrive than were announced", [], "Nothing was kept of it.")
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
