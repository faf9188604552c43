"""veneer.json: what an adapter's two PEFT files cannot say: which base, which data, which recipe,
which bytes.

    base          name, revision and fingerprint of the base it was trained on
    tokenizer     hashes of what the tokenizer does and of the chat template
    scaling       what each adapted module's update is multiplied with, as it was while training
    content_hash  SHA-256 over the tensor file and the config: changes if either does

No time, host or user stands in it: the same adapter written twice is the same to the byte. Not
known here: how a fingerprint is computed (bases/identity/fingerprint.py), what the tensors are
(peft/tensors.py).
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from veneer.adapters.preamble import Preamble
from veneer.errors import ConfigError, CorruptFileError, VeneerError
from veneer.files.hashes import file_hash
from veneer.files.strict_json import MAX_JSON_BYTES, field_faults, illegible, parse_json, read_json

MANIFEST_NAME = "veneer.json"
CARD_NAME = "README.md"
FORMAT_VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class BaseIdentity(_Strict):
    name: str
    """Hub id or folder the base was loaded from; for people, proves nothing."""
    revision: str | None = None
    """Commit of a hub base."""
    fingerprint: dict[str, JsonValue]
    """models.fingerprint.Fingerprint.to_dict(): this is what another base is compared with."""


class Parent(_Strict):
    """One of the adapters that an adapter was combined from."""

    content_hash: str
    """Of its files."""
    weight: float
    """What its update was multiplied with."""


class Figure(_Strict):
    """A figure with its 95% interval over rows; low and high are null where the rows do not
    determine one."""

    value: float
    low: float | None
    high: float | None


class SetHeldOut(_Strict):
    """Loss on rows that were not learnt, nats a token."""

    rows: int
    loss: Figure
    """Of the values that were kept."""
    before: Figure | None = None
    """Before step 1."""
    change: Figure | None = None
    """The first less the second, on the same rows."""


class HeldOut(SetHeldOut):
    """Of all held-out rows."""

    tokens: int
    sets: dict[str, SetHeldOut] = Field(default_factory=dict)
    """By name, where there are several."""


class Manifest(_Strict):
    format_version: Literal[1] = 1
    """Raised when a reader of the old version would misread the new one."""
    veneer_version: str
    """Version that wrote the folder."""
    method: str
    """Name of the method, as in a run file."""
    trained_by: Literal["veneer", "peft"] = "veneer"
    """Program that trained it. Of another one's adapter, whoever added it to a library named the
    base."""
    base: BaseIdentity
    tokenizer_hash: str | None = None
    """models.fingerprint.tokenizer_hash of the tokenizer it was trained with."""
    template_hash: str | None = None
    """ChatTemplate.fingerprint() of the chat template it was trained with."""
    scaling: dict[str, float] = Field(default_factory=dict)
    """Path of each adapted module or parameter -> factor of its update; write_adapter fills it
    in."""
    system: str | None = None
    """System turn that every conversation it was trained on begins with: given to those that have
    none."""
    template_variables: dict[str, JsonValue] = Field(default_factory=dict)
    """What the chat template was told (enable_thinking, ...)."""
    new_tokens: list[str] = Field(default_factory=list)
    """Texts of the tokens that it brings, in the order of their rows."""
    data_fingerprint: str | None = None
    """Hash over the rows it was trained on."""
    recipe: dict[str, JsonValue] | None = None
    """The run's settings, resolved; None for an adapter that no run of ours made."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """What was measured on the held-out rows."""
    held_out: HeldOut | None = None
    """The loss on them before and after, with intervals."""
    parent: str | None = None
    """content_hash of the adapter that training started from."""
    parents: list[Parent] = Field(default_factory=list)
    """The adapters that it was combined from, or whose sum training started from."""
    content_hash: str = ""
    """SHA-256 over the tensor file and the canonical config; write_adapter fills it in."""

    @property
    def preamble(self) -> Preamble:
        return Preamble(self.system, self.template_variables, tuple(self.new_tokens))

    def to_json(self) -> str:
        """The file's text: sorted keys, ASCII, two spaces, one newline at the end. ConfigError: it
        could not be read."""
        stored = self.model_dump(mode="json")
        if faults := illegible(stored):
            raise ConfigError(
                "what holds a NUL or is not UTF-8 is not kept", faults, "Give another name."
            )
        return json.dumps(stored, indent=2, sort_keys=True, allow_nan=False) + "\n"


def readable(make: Callable[[], Manifest]) -> Manifest:
    """The manifest that is made, if it can be, and can be read again once it is written; else
    ConfigError says why not."""
    try:
        manifest = make()
        text = manifest.to_json().encode()
        Manifest.model_validate(parse_json(text, Path(MANIFEST_NAME), max_bytes=MAX_JSON_BYTES))
    except (ValidationError, VeneerError) as fault:
        raise ConfigError(
            f"{MANIFEST_NAME} cannot be written with these settings",
            field_faults(fault) if isinstance(fault, ValidationError) else [str(fault)],
            "Change them: a result could not say how it was made.",
        ) from fault
    return manifest


def read_manifest(path: Path) -> Manifest:
    """Raises SourceError, UnsafeFileError or CorruptFileError with every field that is wrong."""
    stored = read_json(path)
    if stored.get("format_version") != FORMAT_VERSION:
        raise CorruptFileError(
            f"{path} is of format version {stored.get('format_version')!r}, this Veneer reads"
            f" {FORMAT_VERSION}",
            [],
            "Install the version of Veneer that wrote it, or a newer one.",
        )
    try:
        return Manifest.model_validate(stored)
    except ValidationError as fault:
        raise CorruptFileError(
            f"{path} is not a manifest that Veneer wrote",
            field_faults(fault),
            "Restore the file from where it was made.",
        ) from fault


def content_hash(tensor_file: Path, config: dict[str, Any]) -> str:
    """SHA-256, in hex, over the tensor file's own SHA-256 and the config as JSON with sorted
    keys."""
    return content_hash_of(file_hash(tensor_file), config)


def content_hash_of(tensors: str, config: dict[str, Any]) -> str:
    """content_hash where the SHA-256 of the tensor file is known."""
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(f"{tensors}\n{canonical}".encode()).hexdigest()
