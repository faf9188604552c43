"""Remembers which version numbers a removed or renamed name has used, so that none is used again.

    names/tickets.used    {"format_version": 1, "next_version": 3, "objects": {"1": "<id>", ...}}

The file is written before the name goes and stays when the name comes back: its record counts on
from there. A library without such files was written by an earlier Veneer, or never lost a name.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from veneer.errors import ConfigError
from veneer.files.atomic import write_text
from veneer.files.strict_json import StoredModel, check_version, json_text, read_json, validated
from veneer.library.records import FORMAT_VERSION, Record

SUFFIX = ".used"


class UsedVersions(StoredModel):
    """Lists the numbers that a name has used."""

    format_version: Literal[1] = 1
    next_version: int = 1
    """The number of the next version; every smaller one is used."""
    objects: dict[str, str] = Field(default_factory=dict)
    """The object of each version that the name had when it went, by number."""


def read_used_versions(record_file: Path) -> UsedVersions:
    """Reads the numbers that were used by the name of a record's file. CorruptFileError."""
    path = record_file.with_suffix(SUFFIX)
    if not path.is_file():
        return UsedVersions()
    stored = read_json(path)
    check_version(stored, path, FORMAT_VERSION)
    headline = f"{path} is not a list of versions that Veneer wrote"
    return validated(UsedVersions, stored, headline, "Restore the file.")


def write_used_versions(record_file: Path, record: Record) -> None:
    """Remembers the numbers of a record whose name is about to go."""
    objects = {str(version.version): version.object for version in record.versions}
    used = UsedVersions(next_version=record.next_version, objects=objects)
    text = json_text(used.model_dump(mode="json"))
    write_text(record_file.with_suffix(SUFFIX), text, replace=True)


def refuse_other_objects(name: str, used: UsedVersions, record: Record) -> None:
    """Raises ConfigError if a version of the record has a number that meant another adapter."""
    faults = [
        f"{name}@{version.version} was another adapter, which was removed"
        for version in record.versions
        if version.version < used.next_version
        and used.objects.get(str(version.version)) != version.object
    ]
    if faults:
        raise ConfigError(
            f"{name!r} has used version numbers up to {used.next_version - 1} before",
            faults,
            f"Take another name, or add the adapter as {name}@{used.next_version}.",
        )
