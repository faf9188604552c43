"""Where a comparison's files are gathered from machines that share no disk: a folder, or any
address of fsspec's.

    inputs/SHA256           a file that jobs read
    runs/NAME/SHA256        a file of a run's folder
    runs/NAME.json          which files that folder has: {path: {bytes, sha256}}, written last
    runs/NAME.KEY.done      how a job of this run ended

What is there already is not sent again, and what arrives is compared with its hash. A folder that
is replaced while somebody reads it is not found any more, or found whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from veneer.errors import CorruptFileError, InputError, VeneerError
from veneer.files.addresses import file_system
from veneer.files.hashes import file_hash
from veneer.files.partial import PREFIX
from veneer.files.strict_json import parse_json
from veneer.training.state.place import LOCK

MOST_BYTES = 2**28
"""Of a text: what a job said stands in one."""
Listed = Mapping[str, str]
"""SHA-256 of each file of a folder, by its path in it."""


class RunStore:
    def __init__(self, address: str) -> None:
        """ConfigError: no address, or one that needs a package."""
        self.address = address.rstrip("/")
        self._fs, self._root = file_system(self.address)

    # texts

    def text(self, name: str) -> str | None:
        """None: it is not there."""
        with self._told(name):
            try:
                found = self._fs.cat_file(self._at(name))
            except FileNotFoundError:
                return None
        return str(found.decode("utf-8", "replace"))

    def object(self, name: str) -> dict[str, Any] | None:
        """The same of JSON. CorruptFileError: it is none."""
        text = self.text(name)
        where = Path(f"{self.address}/{name}")
        return (
            None
            if text is None
            else parse_json(text.encode(), where, max_bytes=MOST_BYTES, mend=True)
        )

    def put_text(self, name: str, text: str) -> None:
        """Whole or not at all, in place of what was there."""
        with self._told(name):
            beside = self._at(f"{name}.{uuid4().hex}.partial")
            self._fs.makedirs(self._fs._parent(beside), exist_ok=True)
            self._fs.pipe_file(beside, text.encode())
            self._fs.mv(beside, self._at(name))

    # files

    def put_file(self, file: Path) -> str:
        """Its name here, by its content."""
        digest = file_hash(file)
        self._put(file, f"inputs/{digest}")
        return digest

    def get_file(self, digest: str, into: Path) -> None:
        self._get(f"inputs/{digest}", into, digest)

    # folders

    def listed(self, name: str) -> Listed | None:
        """The files of a folder; None: it was never put."""
        found = self.object(f"runs/{name}.json")
        return None if found is None else {path: str(digest) for path, digest in found.items()}

    def put_folder(self, folder: Path, name: str) -> Listed:
        """FileNotFoundError: it changed meanwhile, and what was put before stays."""
        files = files_of(folder)
        for path, digest in files.items():
            self._put(folder / path, f"runs/{name}/{digest}")
        before = self.listed(name) or {}
        self.put_text(f"runs/{name}.json", json.dumps(files, indent=1) + "\n")
        for digest in set(before.values()) - set(files.values()):
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._at(f"runs/{name}/{digest}"))
        return files

    def get_folder(self, name: str, into: Path) -> None:
        """It holds afterwards what was put, and nothing else."""
        wanted = self.listed(name) or {}
        here = files_of(into) if into.is_dir() else {}
        into.mkdir(parents=True, exist_ok=True)
        for path, digest in wanted.items():
            if here.get(path) != digest:
                self._get(f"runs/{name}/{digest}", _within(into, path), digest)
        for path in here.keys() - wanted.keys():
            (into / path).unlink()
        for folder in sorted((each for each in into.rglob("*") if each.is_dir()), reverse=True):
            with suppress(OSError):
                folder.rmdir()

    def _put(self, file: Path, name: str) -> None:
        size = file.stat().st_size
        with self._told(name):
            there = self._at(name)
            if not (self._fs.exists(there) and self._fs.size(there) == size):
                self._fs.makedirs(self._fs._parent(there), exist_ok=True)
                self._fs.put_file(str(file), there)

    def _get(self, name: str, into: Path, digest: str) -> None:
        into.parent.mkdir(parents=True, exist_ok=True)
        with self._told(name):
            self._fs.get_file(self._at(name), str(into))
        if (found := file_hash(into)) != digest:
            raise CorruptFileError(
                f"{self.address}/{name} did not arrive whole",
                [f"SHA-256 {found[:12]}…, not {digest[:12]}…"],
                "Try again.",
            )

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        try:
            yield
        except VeneerError:
            raise
        except Exception as fault:  # every store raises errors of its own
            said = f"{type(fault).__name__}: {fault}".strip().splitlines()[0][:200]
            raise InputError(
                f"{self.address}/{name} cannot be read or written",
                [said],
                "Try again; what has arrived is kept.",
            ) from fault


def files_of(folder: Path) -> dict[str, str]:
    """Of what is finished in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: file_hash(path) for name, path in names.items() if not _unfinished(name)}


def results(listed: Listed, names: Collection[str]) -> dict[str, str]:
    """Of a folder's files those of this name, and those in folders of this name."""
    return {path: digest for path, digest in listed.items() if path.partition("/")[0] in names}


def key_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _unfinished(name: str) -> bool:
    return any(part.startswith((PREFIX, ".replaced")) for part in name.split("/"))


def _within(folder: Path, path: str) -> Path:
    """CorruptFileError: it would lie elsewhere."""
    found = folder / path
    if (
        "\0" in path
        or found.resolve() == folder.resolve()
        or not found.resolve().is_relative_to(folder.resolve())
    ):
        raise CorruptFileError(f"{path!r} leads out of the folder that it is in")
    return found
