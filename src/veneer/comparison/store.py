"""Stores a comparison's files for machines without a shared disk: in a folder, or at an fsspec
address.

    inputs/SHA256           a file that jobs read
    runs/NAME/SHA256        a file of a run's folder
    runs/NAME.json          files of that folder: {path: {bytes, sha256}}, written last
    runs/NAME.KEY.done      how a job of this run ended

Existing files are not sent again, and every download is compared with its hash. A folder that is
replaced while it is read is found intact, or not at all.
"""

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
"""Largest text: the messages of a job."""
Listed = Mapping[str, str]
"""SHA-256 of each file of a folder, by path."""


class RunStore:
    def __init__(self, address: str) -> None:
        """Raises ConfigError for an invalid address, or one that needs a package."""
        self.address = address.rstrip("/")
        self._fs, self._root = file_system(self.address)

    # texts

    def text(self, name: str) -> str | None:
        """Returns a text, None if it does not exist."""
        with self._explained(name):
            try:
                content = self._fs.cat_file(self._at(name))
            except FileNotFoundError:
                return None
        return str(content.decode("utf-8", "replace"))

    def object(self, name: str) -> dict[str, Any] | None:
        """Returns a JSON object, None if it does not exist. Raises CorruptFileError."""
        text = self.text(name)
        where = Path(f"{self.address}/{name}")
        return (
            None
            if text is None
            else parse_json(text.encode(), where, max_bytes=MOST_BYTES, repair=True)
        )

    def put_text(self, name: str, text: str) -> None:
        """Replaces a text atomically."""
        with self._explained(name):
            partial = self._at(f"{name}.{uuid4().hex}.partial")
            self._fs.makedirs(partial.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(partial, text.encode())
            self._fs.mv(partial, self._at(name))

    # files

    def put_file(self, file: Path) -> str:
        """Stores a file; returns its name, made from its content."""
        digest = file_hash(file)
        self._put(file, f"inputs/{digest}")
        return digest

    def get_file(self, digest: str, into: Path) -> None:
        self._get(f"inputs/{digest}", into, digest)

    # folders

    def listed(self, name: str) -> Listed | None:
        """Lists the files of a folder, None if it was never stored."""
        files = self.object(f"runs/{name}.json")
        return None if files is None else {path: str(digest) for path, digest in files.items()}

    def put_folder(self, folder: Path, name: str) -> Listed:
        """Stores a folder. FileNotFoundError if it changed meanwhile; its previous state then
        stays.
        """
        files = files_of(folder)
        for path, digest in files.items():
            self._put(folder / path, f"runs/{name}/{digest}")
        previous = self.listed(name) or {}
        self.put_text(f"runs/{name}.json", json.dumps(files, indent=1) + "\n")
        for digest in set(previous.values()) - set(files.values()):
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._at(f"runs/{name}/{digest}"))
        return files

    def get_folder(self, name: str, into: Path) -> None:
        """Makes a folder hold exactly what was stored."""
        wanted = self.listed(name) or {}
        existing = files_of(into) if into.is_dir() else {}
        into.mkdir(parents=True, exist_ok=True)
        for path, digest in wanted.items():
            if existing.get(path) != digest:
                self._get(f"runs/{name}/{digest}", _within(into, path), digest)
        for path in existing.keys() - wanted.keys():
            (into / path).unlink()
        for folder in sorted(
            (path_inside for path_inside in into.rglob("*") if path_inside.is_dir()), reverse=True
        ):
            with suppress(OSError):
                folder.rmdir()

    def _put(self, file: Path, name: str) -> None:
        size = file.stat().st_size
        with self._explained(name):
            target = self._at(name)
            if not (self._fs.exists(target) and self._fs.size(target) == size):
                self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._fs.put_file(str(file), target)

    def _get(self, name: str, into: Path, digest: str) -> None:
        into.parent.mkdir(parents=True, exist_ok=True)
        with self._explained(name):
            self._fs.get_file(self._at(name), str(into))
        if (received := file_hash(into)) != digest:
            raise CorruptFileError(
                f"{self.address}/{name} arrived damaged",
                [f"SHA-256 {received[:12]}…, not {digest[:12]}…"],
                "Try again.",
            )

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except VeneerError:
            raise
        except Exception as fault:  # every store raises errors of its own
            message = f"{type(fault).__name__}: {fault}".strip().splitlines()[0][:200]
            raise InputError(
                f"{self.address}/{name} cannot be read or written",
                [message],
                "Try again; downloaded parts are kept.",
            ) from fault


def files_of(folder: Path) -> dict[str, str]:
    """Returns the hash of each finished file in a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: file_hash(path) for name, path in names.items() if not _unfinished(name)}


def results(listed: Listed, names: Collection[str]) -> dict[str, str]:
    """Returns a folder's files with these names, and those in subfolders with these names."""
    return {path: digest for path, digest in listed.items() if path.partition("/")[0] in names}


def key_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _unfinished(name: str) -> bool:
    return any(part.startswith((PREFIX, ".replaced")) for part in name.split("/"))


def _within(folder: Path, path: str) -> Path:
    """Returns a path inside the folder. CorruptFileError if it leads out of it."""
    target = folder / path
    if (
        "\0" in path
        or target.resolve() == folder.resolve()
        or not target.resolve().is_relative_to(folder.resolve())
    ):
        raise CorruptFileError(f"{path!r} leads out of its folder")
    return target
