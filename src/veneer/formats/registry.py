"""Which file layout each method has, and which one a file is in. A new method adds a line to each
table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.adapters.config import AdapterConfig, Bottleneck, DoRA, LoRA, Prefix
from veneer.errors import CorruptFileError, RefusedError
from veneer.formats.bottleneck import BOTTLENECK
from veneer.formats.layout import Layout
from veneer.formats.peft.low_rank import LOW_RANK
from veneer.formats.prefix import PARTIAL_PREFIX, PREFIX

_BY_METHOD: dict[type[AdapterConfig], Layout] = {
    LoRA: LOW_RANK,
    DoRA: LOW_RANK,
    Bottleneck: BOTTLENECK,
    Prefix: PREFIX,
}
_BY_PEFT_TYPE: dict[str, Layout] = {
    layout.peft_type: layout for layout in (LOW_RANK, BOTTLENECK, PREFIX, PARTIAL_PREFIX)
}


def layout_of(config: AdapterConfig) -> Layout:
    return _BY_METHOD[type(config)]


def layout_in(path: Path, stored: Mapping[str, Any]) -> Layout:
    """The layout that an adapter_config.json names; stored: its content.

    Raises CorruptFileError (names none), RefusedError (one that Veneer does not know).
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
