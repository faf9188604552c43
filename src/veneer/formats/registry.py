"""Maps methods to file formats, and files to formats. A new method adds a line to each table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.adapters.config import Bottleneck, DoRA, LoRA, MethodConfig, Prefix
from veneer.errors import CorruptFileError, RefusedError
from veneer.formats.bottleneck import BOTTLENECK
from veneer.formats.layout import AdapterFormat
from veneer.formats.peft.low_rank import LOW_RANK
from veneer.formats.prefix import CARTRIDGE, PARTIAL_PREFIX, PREFIX

_BY_METHOD: dict[type[MethodConfig], AdapterFormat] = {
    LoRA: LOW_RANK,
    DoRA: LOW_RANK,
    Bottleneck: BOTTLENECK,
    Prefix: PREFIX,
}
_BY_PEFT_TYPE: dict[str, AdapterFormat] = {
    format.peft_type: format for format in (LOW_RANK, BOTTLENECK, PREFIX, CARTRIDGE, PARTIAL_PREFIX)
}


def format_of_method(config: MethodConfig) -> AdapterFormat:
    """Returns the file format of a method's settings."""
    return _BY_METHOD[type(config)]


def format_of_file(path: Path, stored: Mapping[str, Any]) -> AdapterFormat:
    """Returns the format that an adapter_config.json names; stored: its content.

    Raises CorruptFileError if it names none, RefusedError if Veneer does not support it.
    """
    if not isinstance(kind := stored.get("peft_type"), str):
        raise CorruptFileError(
            f"{path} has no peft_type: not the configuration of a PEFT adapter",
            [],
            "Give an adapter's folder.",
        )
    if kind not in _BY_PEFT_TYPE:
        raise RefusedError(
            f"{path}: peft_type {kind} is not supported yet",
            [],
            f"Veneer reads adapters of peft_type {', '.join(_BY_PEFT_TYPE)}.",
        )
    return _BY_PEFT_TYPE[kind]
