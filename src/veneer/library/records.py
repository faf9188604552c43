"""What a library knows of a name: its versions, each with the facts of its object. One JSON file a
name.

    names/tickets.json    {"format_version": 1, "next_version": 3, "versions": [...]}

The name is the file's own and stands nowhere inside, so that a rename is one rename. The facts of
an object never change; they are copied here so that listing opens no object. No torch: `ls` reads
this.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from veneer.errors import CorruptFileError, InputError
from veneer.files.atomic import atomic_file
from veneer.files.strict_json import field_faults, illegible, read_json
from veneer.wording import size

FORMAT_VERSION = 1

BaseProof = Literal["fingerprint", "stated", "unverified"]


class _RecordModel(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ObjectFacts(_RecordModel):
    """What can be said of an object without opening its tensors."""

    method: str
    """Name of the method, as in a run file."""
    bytes: int
    """Of all its files."""
    tensors: int
    parameters: int
    rank: int | None = None
    """The settings' rank; modules may deviate."""
    base: str | None = None
    """What it calls its base; proves nothing."""
    base_digest: str | None = None
    """Fingerprint.weights_digest of its base."""
    base_proof: BaseProof = "unverified"
    """fingerprint: training recorded it. stated: whoever added it named the base, and it fits.
    unverified: the file gives a name at most, and nothing was compared."""
    content_hash: str
    """As in veneer.json: of tensors and settings."""
    parent: str | None = None
    """content_hash of the adapter that training started from."""
    data_fingerprint: str | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    intervals: dict[str, list[float]] = Field(default_factory=dict)
    """Low and high end, 95%, of those metrics that have one."""
    origin: Literal["veneer", "peft"] = "veneer"
    """Which program wrote the tensors."""


class Version(_RecordModel):
    """One version of a name."""

    version: int
    object: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hex id of the object: SHA-256 of its MANIFEST.json."""
    added: str
    """When, UTC: 2026-01-31T12:00:00Z."""
    tags: list[str] = Field(default_factory=list)
    note: str = ""
    facts: ObjectFacts

    def told(self) -> tuple[str, str, str, str]:
        """Method, size, base and note, as a table says them."""
        return self.facts.method, size(self.facts.bytes), self.facts.base or "–", self.note


class Record(_RecordModel):
    """All versions of a name, oldest first."""

    format_version: Literal[1] = 1
    next_version: int = 1
    """Numbers are never given twice."""
    versions: list[Version] = Field(default_factory=list)

    @property
    def newest(self) -> Version:
        return self.versions[-1]


def parse_record(stored: dict[str, Any], path: Path) -> Record:
    """Raises CorruptFileError with every field that is wrong; path only names it."""
    if stored.get("format_version") != FORMAT_VERSION:
        raise CorruptFileError(
            f"{path} is of format version {stored.get('format_version')!r}, this Veneer reads"
            f" {FORMAT_VERSION}",
            [],
            "Install the version of Veneer that wrote it, or a newer one.",
        )
    try:
        record = Record.model_validate(stored)
    except ValidationError as fault:
        raise CorruptFileError(
            f"{path} is not a record that Veneer wrote", field_faults(fault), "Restore the file."
        ) from fault
    numbers = [version.version for version in record.versions]
    if not numbers or numbers != sorted(set(numbers)) or numbers[-1] >= record.next_version:
        raise CorruptFileError(
            f"{path} counts its versions wrongly", [f"{numbers}"], "Restore the file."
        )
    return record


def known_version(stored: dict[str, Any]) -> Version:
    """A version of a record that parse_record has passed before: not checked again, which is most
    of the time that listing thousands takes."""
    return Version.model_construct(
        **{**stored, "facts": ObjectFacts.model_construct(**stored["facts"])}
    )


def read_record(path: Path) -> Record:
    """Raises SourceError (no such file) and what parse_record raises."""
    return parse_record(read_json(path), path)


def write_record(path: Path, record: Record) -> None:
    """Raises InputError for a text that read_record would refuse."""
    stored = record.model_dump(mode="json")
    if faults := illegible(stored):
        raise InputError(
            "what holds a NUL or is not UTF-8 is not kept", faults, "Give another text."
        )
    with atomic_file(path, replace=True) as partial:
        text = json.dumps(stored, indent=1, sort_keys=True, allow_nan=False) + "\n"
        partial.write_text(text, encoding="utf-8")
