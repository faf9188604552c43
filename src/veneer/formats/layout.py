"""How one family of methods lies in an adapter's two files: what a method owes whoever reads and
writes it.

    write   tensors and settings of a live adapter, in the file's terms
    read    the file's settings, strictly, without a model
    fit     what of the file goes where on a base, and why not

Not known here: which methods there are (registry.py), folders (adapter.py).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from veneer.adapters.config import AdapterConfig
from veneer.adapters.placement.attachment import Attachment
from veneer.formats.manifest import BaseIdentity


@dataclass(frozen=True)
class Fit:
    """How a file's tensors go onto a base.

    settings   attach exactly what the file holds; None where there are faults
    values     name among Attachment.parameters() -> its value, in its shape
    scaling    path -> factor of the update
    faults     why they do not go on, one line each; empty if they do
    concerned  how many of the file's and the base's tensors the faults are about
    """

    settings: AdapterConfig | None
    values: Mapping[str, Tensor] = field(default_factory=dict)
    scaling: Mapping[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    concerned: int = 0


class FileSettings(Protocol):
    """adapter_config.json as one method's file holds it."""

    @property
    def base_model_name_or_path(self) -> str | None: ...

    @property
    def front_places(self) -> int:
        """Positions that what it adds takes in front of every text."""

    def settings(self, tensors: Mapping[str, Tensor]) -> AdapterConfig:
        """In Veneer's terms, without a model to resolve them on. tensors: the file's, by bare
        names.

        Raises CorruptFileError where the tensors are not those of such an adapter, ConfigError
        where the settings make no adapter.
        """

    def fit(
        self,
        tensors: Mapping[str, Tensor],
        model: nn.Module,
        head: nn.Module | None,
        read_past: Collection[str],
    ) -> Fit:
        """tensors: by bare names; model: with or without other adapters; head: its output head;
        read_past: the weights that the model takes past their modules
        (adapters/placement/reads.py)."""


@dataclass(frozen=True)
class Layout:
    """peft_type   what adapter_config.json calls the method: PEFT's own name, or VENEER_... where
                   PEFT has none
    tensors        (adapter, the model it sits on) -> every tensor of the file by its full name
    config         (adapter, model, base) -> adapter_config.json
    read           (path, its content) -> the settings, and the names of unknown fields that are off
    """

    peft_type: str
    tensors: Callable[[Attachment, nn.Module], dict[str, Tensor]]
    config: Callable[[Attachment, nn.Module, BaseIdentity], dict[str, Any]]
    read: Callable[[Path, Mapping[str, Any]], tuple[FileSettings, list[str]]]

    @property
    def peft_reads(self) -> bool:
        return not self.peft_type.startswith("VENEER_")
