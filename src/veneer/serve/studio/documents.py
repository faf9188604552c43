"""Documents that a teacher reads (objective distil): text files of a draft.

    drafts/<id>/documents/<hash>.txt

A file is named by its content and never changes, so a run that is resumed reads the same text.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path

from veneer.errors import DataError
from veneer.files.atomic import write_text
from veneer.files.partial import remove
from veneer.files.settings import StrictSettings

FOLDER = "documents"
_ADVICE = "Choose a text file, such as handbook.md."


class Document(StrictSettings):
    """A document of a draft."""

    name: str
    """Name of the uploaded file, for people."""
    file: str
    """Name of the stored file."""
    bytes: int


def store_document(draft_folder: Path, name: str, content: bytes) -> Document:
    """Stores a document. DataError: it is empty, or no text."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{name} is not UTF-8 text", next_step=_ADVICE) from None
    if not text.strip():
        raise DataError(f"{name} is empty", next_step=_ADVICE)
    file = f"{hashlib.sha256(content).hexdigest()[:32]}.txt"
    folder = draft_folder / FOLDER
    folder.mkdir(exist_ok=True)
    write_text(folder / file, text, replace=True)
    return Document(name=name, file=file, bytes=len(content))


def remove_documents(draft_folder: Path, *, keep: Collection[str | None]) -> None:
    """Removes the documents of a draft, except some by the names of their files."""
    for path in (draft_folder / FOLDER).glob("*.txt"):
        if path.name not in keep:
            remove(path)
