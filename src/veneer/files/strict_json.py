"""Reads untrusted JSON and YAML strictly and within limits, and writes JSON that it can read.

Imports no torch. Not known here: what the object should hold.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from veneer.errors import CorruptFileError, SourceError, UnsafeFileError, VeneerError
from veneer.files.nesting import TOO_DEEP, text_too_deep, yaml_fault

MAX_JSON_BYTES = 4_000_000
MAX_MODEL_JSON_BYTES = 100_000_000
MAX_YAML_BYTES = 1_000_000

_SHOWN = 60  # characters of a text in a message
_UNPRINTABLE = re.compile("[\0\ud800-\udfff]")
RESTORE = "Copy the original file again; this one was cut short or changed."
DOWNLOAD_AGAIN = "Download the model again."
FOREIGN = (
    "An adapter file holds a few thousand named matrices of floats and nothing else: do not use"
    " this one."
)


class StoredModel(BaseModel):
    """The content of a JSON file of ours: other fields and other types are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], stored: Any, headline: str, next_step: str = "") -> Model:
    """Builds a pydantic model of what a file holds. Raises CorruptFileError with this headline and
    every wrong field."""
    try:
        return model.model_validate(stored)
    except ValidationError as fault:
        raise CorruptFileError(headline, field_faults(fault), next_step) from fault


def check_version(stored: Mapping[str, Any], path: Path, version: int) -> None:
    """Raises CorruptFileError if a file is of another format version."""
    if stored.get("format_version") != version:
        raise CorruptFileError(
            f"{path} is of format version {stored.get('format_version')!r}, this Veneer reads"
            f" {version}",
            [],
            "Install the version of Veneer that wrote it, or a newer one.",
        )


def field_faults(fault: ValidationError) -> list[str]:
    """Describes each field that a pydantic model refused, one line each."""
    return [f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in fault.errors()]


def read_json(
    path: Path, *, max_bytes: int = MAX_JSON_BYTES, repair: bool = False
) -> dict[str, Any]:
    """Reads the JSON object in a file of at most max_bytes. Raises SourceError, or as
    parse_json."""
    return parse_json(_beginning(path, max_bytes), path, max_bytes=max_bytes, repair=repair)


def _beginning(path: Path, max_bytes: int) -> bytes:
    """Reads a file, but of a larger one only a byte more than max_bytes."""
    try:
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except OSError as fault:
        raise SourceError(f"{path} cannot be read: {fault.strerror}") from fault


def read_model_json(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file of a model's folder, as leniently as transformers.

    Duplicate keys and infinite numbers are allowed (Mamba 2's configs hold one); an index of many
    shards is long. Depth is limited as everywhere. Raises CorruptFileError.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_MODEL_JSON_BYTES + 1)
        if len(text) > MAX_MODEL_JSON_BYTES:
            raise ValueError(f"more than {MAX_MODEL_JSON_BYTES:,} bytes of JSON, the limit")
        decoded = text.decode("utf-8")
        if text_too_deep(decoded):
            raise ValueError(f"it {TOO_DEEP}")
        value = json.loads(decoded)
    except (OSError, ValueError) as fault:
        raise CorruptFileError(
            f"{path} cannot be read: {fault}", next_step=DOWNLOAD_AGAIN
        ) from fault
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path} is not a JSON object", next_step=DOWNLOAD_AGAIN)
    return value


def read_yaml(path: Path, *, max_bytes: int = MAX_YAML_BYTES) -> dict[str, Any]:
    """Reads the mapping in a YAML file, for instance a run's settings. Raises SourceError."""
    return parse_yaml(_beginning(path, max_bytes), path, max_bytes=max_bytes)


def parse_yaml(text: bytes, path: Path, *, max_bytes: int = MAX_YAML_BYTES) -> dict[str, Any]:
    """Parses a YAML mapping; `path` only names it in errors. Raises SourceError."""
    import yaml

    if len(text) > max_bytes:
        raise SourceError(f"{path} holds more than {max_bytes:,} bytes of YAML, the limit")
    try:
        decoded = text.decode("utf-8")
        if reason := yaml_fault(decoded):
            raise SourceError(f"{path}{reason}")
        value = yaml.safe_load(decoded)
    except RecursionError:
        raise SourceError(f"{path} {TOO_DEEP}") from None
    except (ValueError, yaml.YAMLError) as fault:  # a ValueError: not UTF-8, or an invalid date
        raise SourceError(f"{path} is not valid YAML: {fault}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path} is not a mapping")
    return value


def parse_json(text: bytes, path: Path, *, max_bytes: int, repair: bool = False) -> dict[str, Any]:
    """Parses a JSON object; `path` only names it in errors.

    Stricter than json.loads: no duplicate keys, no NaN or infinity (nor 1e999), no lone surrogates,
    no NUL (repair: they are replaced, for files of older versions), limited size and depth. Raises
    UnsafeFileError beyond the limits, else CorruptFileError.
    """
    if len(text) > max_bytes:
        raise UnsafeFileError(
            f"{path} holds more than {max_bytes:,} bytes of JSON, the limit", [], FOREIGN
        )
    try:
        decoded = text.decode("utf-8")
        if text_too_deep(decoded):
            raise UnsafeFileError(f"{path} {TOO_DEEP}", [], FOREIGN)
        value = json.loads(
            decoded,
            object_pairs_hook=_repair_pairs if repair else _refuse_duplicates,
            parse_constant=refuse_constant,
            parse_float=finite_float,
        )
    except VeneerError:
        raise
    except ValueError as fault:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CorruptFileError(f"{path} is not valid JSON: {fault}", [], RESTORE) from fault
    if not isinstance(value, dict):
        raise CorruptFileError(
            f"{path} holds a JSON {type(value).__name__}, not an object", [], RESTORE
        )
    return value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"duplicate key {_shorten(key)}")
        for text in (key, *_strings(value)):
            if _UNPRINTABLE.search(text):
                raise ValueError(f"{_shorten(text)} holds a NUL or half a surrogate pair")
        table[key] = value
    return table


def _repair_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return _refuse_duplicates([(legible(key), legible(value)) for key, value in pairs])


def _shorten(text: str) -> str:
    return ascii(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def _strings(value: Any) -> list[str]:
    """Returns the strings in a value and its lists; _refuse_duplicates has checked objects
    already."""
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def refuse_constant(name: str) -> float:
    """Refuses NaN and infinity, as json.loads calls it for them. Raises ValueError."""
    raise ValueError(f"{name} is not a JSON number")


def finite_float(text: str) -> float:
    """Reads a number. Raises ValueError if it is too large, such as 1e999."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def finite_or_null(value: Any) -> Any:
    """Replaces numbers that are not finite by null, because JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return value


def legible(value: Any) -> Any:
    """Makes JSON data that parse_json accepts: non-finite numbers become null, NUL and lone
    surrogates U+FFFD.

    For texts of models and data. Names that a user gave are refused instead: `illegible`.
    """
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {legible(str(key)): legible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [legible(item) for item in value]
    return finite_or_null(value)


def illegible(value: Any, name: str = "") -> list[str]:
    """Returns `name: text` of every text in JSON data, keys too, that parse_json would refuse."""
    if isinstance(value, Mapping):
        keys = [fault for key in value for fault in illegible(str(key), name or "a key")]
        return keys + [
            f for key, item in value.items() for f in illegible(item, f"{name}.{key}".lstrip("."))
        ]
    if isinstance(value, list | tuple):
        return [fault for item in value for fault in illegible(item, name)]
    return [f"{name}: {value!r}"] if isinstance(value, str) and _UNPRINTABLE.search(value) else []


def json_text(value: Mapping[str, Any], *, indent: int | None = 2, sort_keys: bool = True) -> str:
    """Returns a file's text, which parse_json reads back; with a newline at its end."""
    text = json.dumps(
        legible(value), indent=indent, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False
    )
    return text + "\n"
