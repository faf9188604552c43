"""Uploaded files of a store of jobs, under ids; a name is only shown, and never a path.

    files/<id>/file.json        UploadedFile
    files/<id>/rows.jsonl       the content, with an ending that says how rows are read

A file is whole or absent, and never changes. Deleting it changes no job: a job has its own copy.
"""

from __future__ import annotations

import re
import secrets
import time
import zlib
from pathlib import Path
from typing import BinaryIO, Literal

from veneer.data.examples import RowFault
from veneer.data.files import parquet
from veneer.data.files.places import PACKED
from veneer.data.files.sources import open_decompressed
from veneer.errors import DataError, QuotaError, UnknownNameError
from veneer.files.atomic import atomic_folder
from veneer.files.partial import sweep, unfinished
from veneer.files.settings import StrictSettings
from veneer.files.strict_json import json_text
from veneer.jobs.job_settings import row_ending
from veneer.jobs.limits import JobLimits, folder_bytes
from veneer.jobs.stored import read_entries, read_stored

MOST_NAME = 200
CHUNK_BYTES = 2**20
_ID = re.compile(r"file-[0-9a-f]{16}")


class UploadedFile(StrictSettings):
    """The content of file.json. created: seconds since 1970. owner: as JobRecord.owner"""

    format_version: Literal[1] = 1
    id: str
    name: str
    content: str
    """Name of the file with the content, such as rows.jsonl."""
    bytes: int
    created: float
    owner: str = ""


class UploadStore:
    """Uploaded files in the folder of a store of jobs."""

    def __init__(self, store_folder: Path, limits: JobLimits) -> None:
        self.store_folder, self.folder = store_folder, store_folder / "files"
        self.limits = limits

    def add(self, source: BinaryIO, *, name: str, owner: str = "") -> UploadedFile:
        """Stores a file of rows. Raises ConfigError for another kind of file, QuotaError."""
        shown_name = "".join(c for c in Path(name).name if c.isprintable())[:MOST_NAME] or "upload"
        content = f"rows{_ending(shown_name)}"
        self._check_room()
        file_id = f"file-{secrets.token_hex(8)}"
        with atomic_folder(self.folder / file_id) as partial:
            size = self._copy(source, partial / content)
            self._check_unpacked(partial / content)
            file = UploadedFile(
                id=file_id,
                name=shown_name,
                content=content,
                bytes=size,
                created=time.time(),
                owner=owner,
            )
            text = json_text(file.model_dump(mode="json"))
            (partial / "file.json").write_text(text, encoding="utf-8")
        return file

    def files(self) -> list[UploadedFile]:
        """Lists the files, the newest first. Leaves out damaged ones."""
        files = read_entries(self.folder, self.get)
        return sorted(files, key=lambda file: (file.created, file.id), reverse=True)

    def get(self, file_id: str) -> UploadedFile:
        """Returns a file. Raises UnknownNameError."""
        if _ID.fullmatch(file_id) is None:
            raise unknown_file(file_id)
        path = self.folder / file_id / "file.json"
        return read_stored(UploadedFile, path, "file", missing=unknown_file(file_id))

    def content_path(self, file_id: str) -> Path:
        """Returns where the content is, for JobStore.create. Raises UnknownNameError."""
        return self.folder / file_id / self.get(file_id).content

    def delete(self, file_id: str) -> None:
        """Removes a file. Raises UnknownNameError."""
        self.get(file_id)
        with unfinished(self.folder) as gone:
            try:
                (self.folder / file_id).rename(gone)
            except FileNotFoundError:  # deleted meanwhile
                raise unknown_file(file_id) from None

    def _check_room(self) -> None:
        sweep(self.folder)
        if (count := len(self.files())) >= self.limits.files:
            raise QuotaError(f"{count:,} files are kept, which is the limit", [], "Delete some.")

    def _copy(self, source: BinaryIO, path: Path) -> int:
        """Copies the content and returns its bytes. Raises QuotaError."""
        disk_bytes = self.limits.disk_bytes - folder_bytes(self.store_folder)
        most, size = min(self.limits.file_bytes, disk_bytes), 0
        with path.open("wb") as file:
            while chunk := source.read(CHUNK_BYTES):
                size += len(chunk)
                if size > most:
                    raise QuotaError(
                        f"the file is larger than the {max(most, 0):,} bytes that are left for it",
                        [],
                        "Upload a smaller file, or delete files and jobs.",
                    )
                file.write(chunk)
        if not size:
            raise DataError("the file is empty")
        return size

    def _check_unpacked(self, path: Path) -> None:
        """Raises QuotaError if a compressed file or one of Parquet holds more than an uploaded one
        may: 1 GiB of empty lines is 1 MiB of gzip. A damaged file passes; its rows are refused
        later."""
        most = self.limits.file_bytes
        try:
            with open_decompressed(path, path.name) as file:
                is_larger = _holds_more_than(file, path.suffix, most)
        except (OSError, EOFError, zlib.error, RowFault):
            return
        if is_larger:
            raise QuotaError(
                f"the file holds more than {most:,} bytes when it is unpacked",
                [],
                "Upload it in parts.",
            )


def _holds_more_than(file: BinaryIO, suffix: str, most: int) -> bool:
    """Returns whether a file holds more bytes than this once it is unpacked."""
    if suffix == ".parquet":
        return parquet.holds_more_than(file, most)
    size = 0
    while suffix in PACKED and size <= most and (chunk := file.read(CHUNK_BYTES)):
        size += len(chunk)
    return size > most


def unknown_file(file_id: str) -> UnknownNameError:
    return UnknownNameError(f"there is no file {file_id[:80]!r}")


def _ending(name: str) -> str:
    """Returns the ending of the stored file; a name without one is taken as .jsonl."""
    return row_ending(name) if Path(name).suffix else ".jsonl"
