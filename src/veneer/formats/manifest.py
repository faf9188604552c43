"""Reads and writes veneer.json: the base, data, recipe and hashes that PEFT's two files cannot
hold.

base          name, revision and fingerprint of the base it was trained on
tokenizer     hashes of the tokenizer's behaviour and of the chat template
scaling       factor of each adapted module's update, as in training
content_hash  SHA-256 over the tensor file and the config: changes if either does

It holds no time, host or user: the same adapter written twice is equal to the byte. Not known here:
how a fingerprint is computed (bases/identity/fingerprint.py), what the tensors are
(peft/tensors.py).
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, JsonValue, ValidationError

from veneer.adapters.labels import StoredHead
from veneer.adapters.preamble import Preamble
from veneer.errors import ConfigError, VeneerError
from veneer.files.hashes import file_hash
from veneer.files.strict_json import (
    MAX_JSON_BYTES,
    StoredModel,
    check_version,
    field_faults,
    illegible,
    parse_json,
    read_json,
    validated,
)

MANIFEST_NAME = "veneer.json"
CARD_NAME = "README.md"
FORMAT_VERSION = 1


class BaseIdentity(StoredModel):
    """The base that an adapter was trained on."""

    name: str
    """Hub id or folder that the base was loaded from; informative only."""
    revision: str | None = None
    """Commit of a hub base."""
    fingerprint: dict[str, JsonValue]
    """bases.identity.fingerprint.Fingerprint.to_dict(), compared with other bases."""


class Parent(StoredModel):
    """One of the adapters that this adapter was combined from."""

    content_hash: str
    """Hash of its files."""
    weight: float
    """Factor of its update."""


class Figure(StoredModel):
    """A figure with its 95% interval over rows; low and high are null if the rows determine
    none."""

    value: float
    low: float | None
    high: float | None


class SetHeldOut(StoredModel):
    """Loss on held-out rows of one set, in nats a token."""

    rows: int
    loss: Figure
    """With the saved values."""
    before: Figure | None = None
    """Before step 1."""
    change: Figure | None = None
    """`loss` minus `before`, on the same rows."""


class HeldOut(SetHeldOut):
    """Loss on all held-out rows."""

    tokens: int
    sets: dict[str, SetHeldOut] = Field(default_factory=dict)
    """By name, if there are several."""


class Manifest(StoredModel):
    """The content of veneer.json."""

    format_version: Literal[1] = 1
    """Increased when a reader of the old version would misread the new one."""
    veneer_version: str
    """Version that wrote the folder."""
    method: str
    """Name of the method, as in a run file."""
    trained_by: Literal["veneer", "peft"] = "veneer"
    """Program that trained it. For PEFT's adapters, the user who added it to a library named the
    base."""
    base: BaseIdentity
    tokenizer_hash: str | None = None
    """bases.identity.fingerprint.tokenizer_hash of the tokenizer it was trained with."""
    template_hash: str | None = None
    """ChatTemplate.fingerprint() of the chat template it was trained with."""
    scaling: dict[str, float] = Field(default_factory=dict)
    """Path of each adapted module or parameter -> factor of its update; write_adapter fills it
    in."""
    system: str | None = None
    """System turn that begins every training conversation; added to conversations without one."""
    template_variables: dict[str, JsonValue] = Field(default_factory=dict)
    """Variables of the chat template (enable_thinking, ...)."""
    new_tokens: list[str] = Field(default_factory=list)
    """Texts of its new tokens, in the order of their rows."""
    head: StoredHead | None = None
    """Its score head, if it classifies; write_adapter fills it in."""
    data_fingerprint: str | None = None
    """Hash over the rows it was trained on."""
    recipe: dict[str, JsonValue] | None = None
    """The run's settings, resolved; None if no Veneer run made the adapter."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Metrics on the held-out rows."""
    held_out: HeldOut | None = None
    """Loss on the held-out rows before and after, with intervals."""
    parent: str | None = None
    """content_hash of the adapter that training started from."""
    parents: list[Parent] = Field(default_factory=list)
    """Adapters that it was combined from, or whose sum training started from."""
    content_hash: str = ""
    """SHA-256 over the tensor file and the canonical config; write_adapter fills it in."""

    @property
    def preamble(self) -> Preamble:
        """Returns the system turn, template variables and new tokens."""
        return Preamble(self.system, self.template_variables, tuple(self.new_tokens))

    def to_json(self) -> str:
        """Returns the file's text: sorted keys, ASCII, two spaces, one newline at the end.

        Raises ConfigError if it could not be read again.
        """
        stored = self.model_dump(mode="json")
        if faults := illegible(stored):
            raise ConfigError(
                "texts with a NUL or invalid UTF-8 cannot be stored", faults, "Choose another name."
            )
        return json.dumps(stored, indent=2, sort_keys=True, allow_nan=False) + "\n"


def make_readable(make: Callable[[], Manifest]) -> Manifest:
    """Makes a manifest and checks that it can be read after it is written. Raises ConfigError if
    not."""
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
    """Reads veneer.json. Raises SourceError, UnsafeFileError, or CorruptFileError with every wrong
    field."""
    stored = read_json(path)
    check_version(stored, path, FORMAT_VERSION)
    headline = f"{path} is not a manifest that Veneer wrote"
    return validated(Manifest, stored, headline, "Restore the original file.")


def content_hash(tensor_file: Path, config: dict[str, Any]) -> str:
    """Hashes the tensor file's SHA-256 and the config as JSON with sorted keys (SHA-256, hex)."""
    return content_hash_of(file_hash(tensor_file), config)


def content_hash_of(tensors: str, config: dict[str, Any]) -> str:
    """Computes content_hash from a known SHA-256 of the tensor file."""
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(f"{tensors}\n{canonical}".encode()).hexdigest()
