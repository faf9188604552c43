"""Reads what a store of jobs keeps: a folder for each job or file, with a JSON record in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from veneer.errors import CorruptFileError, SourceError, VeneerError
from veneer.files.settings import StrictSettings
from veneer.files.strict_json import field_faults, read_json

RecordT = TypeVar("RecordT", bound=StrictSettings)
EntryT = TypeVar("EntryT")


def read_stored(
    model: type[RecordT], path: Path, noun: str, *, missing: Exception | None = None
) -> RecordT:
    """Reads a record. Raises SourceError, or CorruptFileError, which says that the file does not
    describe a `noun`.

    missing: the error if there is no such file, also if it is deleted at this moment
    """
    try:
        return model.model_validate(read_json(path))
    except SourceError as fault:
        if missing is None or not isinstance(fault.__cause__, FileNotFoundError):
            raise
        raise missing from None
    except ValidationError as fault:
        raise CorruptFileError(f"{path} does not describe a {noun}", field_faults(fault)) from None


def read_entries(folder: Path, read: Callable[[str], EntryT]) -> list[EntryT]:
    """Reads the entries of a folder by their names. Leaves out an entry that is of another kind,
    is damaged, or was removed meanwhile."""
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    entries = []
    for name in names:
        try:
            entries.append(read(name))
        except VeneerError:
            continue
    return entries
