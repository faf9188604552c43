"""Records of a library: the versions of a name, each with the facts of its object, one JSON file a
name.

    names/tickets.json    {"format_version": 1, "next_version": 3, "versions": [...]}

Only the file's name holds the name, so renaming is one rename. The facts of an object never change;
they are copied here so that listing opens no object. Imports no torch: `ls` reads this.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from veneer.errors import CorruptFileError, InputError
from veneer.files.atomic import write_text
from veneer.files.strict_json import StoredModel, check_version, illegible, read_json, validated
from veneer.wording import size

FORMAT_VERSION = 1

BaseProof = Literal["fingerprint", "stated", "unverified"]


class ObjectFacts(StoredModel):
    """Describes an object without its tensors."""

    method: str
    """Name of the method, as in a run file."""
    bytes: int
    """Size of all its files."""
    tensors: int
    parameters: int
    rank: int | None = None
    """The settings' rank; modules may deviate."""
    base: str | None = None
    """The name it gives its base; proves nothing."""
    base_digest: str | None = None
    """Fingerprint.weights_digest of its base."""
    base_proof: BaseProof = "unverified"
    """fingerprint: recorded by training. stated: named when it was added, and it fits. unverified:
    the file gives at most a name, and nothing was compared."""
    content_hash: str
    """Hash of tensors and settings, as in veneer.json."""
    parent: str | None = None
    """content_hash of the adapter that training started from."""
    data_fingerprint: str | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    intervals: dict[str, list[float]] = Field(default_factory=dict)
    """Ends of the 95% intervals of the metrics that have one."""
    origin: Literal["veneer", "peft"] = "veneer"
    """The program that wrote the tensors."""


class Version(StoredModel):
    """Describes one version of a name."""

    version: int
    object: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hex id of the object: SHA-256 of its MANIFEST.json."""
    added: str
    """Time in UTC, for instance 2026-01-31T12:00:00Z."""
    tags: list[str] = Field(default_factory=list)
    note: str = ""
    facts: ObjectFacts

    def table_cells(self) -> tuple[str, str, str, str]:
        """Returns method, size, base and note, as tables show them."""
        return self.facts.method, size(self.facts.bytes), self.facts.base or "–", self.note


class Record(StoredModel):
    """Lists all versions of a name, oldest first."""

    format_version: Literal[1] = 1
    next_version: int = 1
    """The number of the next version; numbers are never used twice."""
    versions: list[Version] = Field(default_factory=list)

    @property
    def newest(self) -> Version:
        return self.versions[-1]


def parse_record(stored: dict[str, Any], path: Path) -> Record:
    """Validates a record; CorruptFileError lists every wrong field. path: named in errors."""
    check_version(stored, path, FORMAT_VERSION)
    headline = f"{path} is not a record that Veneer wrote"
    record = validated(Record, stored, headline, "Restore the file.")
    numbers = [version.version for version in record.versions]
    if not numbers or numbers != sorted(set(numbers)) or numbers[-1] >= record.next_version:
        raise CorruptFileError(
            f"{path} counts its versions wrongly", [f"{numbers}"], "Restore the file."
        )
    return record


def known_version(stored: dict[str, Any]) -> Version:
    """Builds a version of a record that parse_record has accepted before, without validating it.

    Validation is most of the time that listing thousands of versions takes.
    """
    return Version.model_construct(
        **{**stored, "facts": ObjectFacts.model_construct(**stored["facts"])}
    )


def read_record(path: Path) -> Record:
    """Reads a record. Raises SourceError (no such file) and the errors of parse_record."""
    return parse_record(read_json(path), path)


def write_record(path: Path, record: Record) -> None:
    """Writes a record. Raises InputError for text that read_record would refuse."""
    stored = record.model_dump(mode="json")
    if faults := illegible(stored):
        raise InputError(
            "text with a NUL, or that is not UTF-8, cannot be stored", faults, "Give another text."
        )
    text = json.dumps(stored, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_text(path, text, replace=True)
