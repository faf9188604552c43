"""Drafts: uploaded rows and what a person chose for them, so that the page finds them again.

A draft is a folder named by its id. It holds draft.json; the rows are an uploaded file. Names from
a browser are shown, and are never part of a path.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

from pydantic import Field, JsonValue

from veneer.data.files.places import SHEETS, RowFile, kind_of
from veneer.data.files.sources import READABLE_KINDS
from veneer.errors import DataError, UnknownNameError, VeneerError
from veneer.files.atomic import atomic_folder, write_text
from veneer.files.partial import unfinished
from veneer.files.settings import StrictSettings
from veneer.files.strict_json import json_text, legible
from veneer.jobs.stored import read_stored
from veneer.jobs.uploads import UploadStore
from veneer.serve.refusals import Refusal
from veneer.serve.studio.documents import FOLDER as DOCUMENTS
from veneer.serve.studio.documents import Document

MOST_DRAFTS = 200
MOST_NAME = 120
_ID = re.compile(r"[0-9a-f]{16}")
_FILE = "draft.json"


class Draft(StrictSettings):
    """A set of rows and the choices made for it."""

    id: str
    """Name of the draft's folder."""
    name: str
    """Name of the uploaded file, as the browser sent it."""
    file: str
    """Id of the uploaded file."""
    bytes: int
    """Size of the uploaded file."""
    created: float
    """Seconds since 1970."""
    rows: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of RowChoices."""
    method: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of MethodChoices."""
    document: Document | None = None
    """Text that the teacher of objective distil reads."""
    job: str | None = None
    """Id of the job that trains the rows."""
    model: str | None = None
    """Name in the library of the adapter that was kept."""
    kept: str | None = None
    """Object in the library of that adapter; the name may have other versions."""


class Drafts:
    """Stores drafts in a folder, which the first upload makes. uploads: holds their rows"""

    def __init__(self, folder: Path, uploads: UploadStore) -> None:
        self.folder, self.uploads = folder, uploads
        self._changes = threading.Lock()

    def all(self) -> list[Draft]:
        """Lists the drafts, the newest first. Damaged drafts are left out."""
        drafts = []
        for path in self.folder.glob(f"*/{_FILE}"):
            with suppress(VeneerError, Refusal):
                drafts.append(self.get(path.parent.name))
        return sorted(drafts, key=lambda draft: draft.created, reverse=True)

    def get(self, draft_id: str) -> Draft:
        """Reads a draft. Refusal: 404."""
        file = self.place(draft_id) / _FILE
        return read_stored(Draft, file, "draft", missing=_unknown(draft_id))

    def add(self, name: str, content: bytes, owner: str = "") -> Draft:
        """Stores uploaded rows. Refusal: there are too many drafts. DataError: the name's extension
        is not one of rows. QuotaError: there is no room. owner: name of the caller's key"""
        if len(self.all()) >= MOST_DRAFTS:
            raise Refusal(409, f"There are {MOST_DRAFTS} sets of rows already: remove one.")
        shown_name = public_name(name)
        if PurePath(shown_name).suffix.lower() in SHEETS:
            raise DataError(
                f"{shown_name} is a workbook, which is not read",
                next_step="Save its sheet as CSV (Excel: Save as, CSV UTF-8), and drop that file.",
            )
        if not kind_of(shown_name):
            raise DataError(
                f"{shown_name}: the extension decides how a file is read",
                next_step=f"Kinds of file: {READABLE_KINDS}.",
            )
        file = self.uploads.add(BytesIO(content), name=shown_name, owner=owner)
        draft = Draft(
            id=secrets.token_hex(8),
            name=shown_name,
            file=file.id,
            bytes=file.bytes,
            created=time.time(),
        )
        with atomic_folder(self.place(draft.id)) as folder:
            (folder / _FILE).write_text(_text(draft), encoding="utf-8")
        return draft

    def changed(self, draft_id: str, **changes: Any) -> Draft:
        """Returns a draft with other fields, and stores nothing."""
        return self.get(draft_id).model_copy(update=changes)

    def change(self, draft_id: str, **changes: Any) -> Draft:
        """Replaces fields of a draft."""
        with self._changes:  # a plan and a start may change a draft at once
            draft = self.changed(draft_id, **changes)
            write_text(self.place(draft_id) / _FILE, _text(draft), replace=True)
        return draft

    def remove(self, draft_id: str) -> None:
        """Deletes a draft and its rows."""
        with self._changes:
            file_id = self.get(draft_id).file
            with suppress(UnknownNameError):  # deleted through /v1/files
                self.uploads.delete(file_id)
            with unfinished(self.folder) as gone:  # a plan may write there still
                self.place(draft_id).rename(gone)

    def row_file(self, draft: Draft) -> RowFile:
        """Returns the place of the rows, under the name that errors show. UnknownNameError: the
        uploaded file was deleted."""
        return RowFile(draft.name, self.uploads.content_path(draft.file))

    def document_path(self, draft: Draft) -> Path | None:
        """Returns the path of a draft's document, if it has one."""
        if draft.document is None:
            return None
        return self.place(draft.id) / DOCUMENTS / draft.document.file

    def place(self, draft_id: str) -> Path:
        """Returns where a draft's folder is, if there is such a draft. Refusal: 404, it is no
        id."""
        if not _ID.fullmatch(draft_id):
            raise _unknown(draft_id)
        return self.folder / draft_id


def _text(draft: Draft) -> str:
    return json_text(draft.model_dump(mode="json"))


def public_name(name: str) -> str:
    """Returns the last part of a file's name as printable text."""
    last = re.split(r"[/\\]", name)[-1]
    clean = "".join(c for c in str(legible(last)) if c.isprintable()).strip()
    stem, dot, kind = clean.rpartition(".")
    return f"{stem[:MOST_NAME]}{dot}{kind[:12]}" if dot else clean[:MOST_NAME]


def _unknown(draft_id: str) -> Refusal:
    return Refusal(404, f"There are no rows `{draft_id[:40]}`.", "id", "draft_not_found")
