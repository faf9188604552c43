"""Defines the file format of a family of methods: what it must provide to read and write adapters.

write   tensors and settings of a live adapter, in the file's terms
read    the file's settings, strictly, without a model
fit     where the file's values go on a base, and why not

Not known here: which methods exist (registry.py), folders (adapter.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.adapters.config import AdapterConfig
from veneer.adapters.placement.attachment import Attachment
from veneer.formats.manifest import BaseIdentity


@dataclass(frozen=True)
class Fit:
    """Where a file's tensors go on a base.

    settings   attach exactly what the file holds; None if there are faults
    values     name among Attachment.parameters() -> its value, in its shape
    scaling    path -> factor of the update
    faults     why they do not fit, one line each; empty if they do
    concerned  number of the file's and the base's tensors that the faults are about
    next_step  what to do, where another base does not help; empty: another base may fit
    """

    settings: AdapterConfig | None
    values: Mapping[str, Tensor] = field(default_factory=dict)
    scaling: Mapping[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    concerned: int = 0
    next_step: str = ""


@dataclass(frozen=True)
class FileSettings(ABC):
    """The adapter_config.json of one method's file."""

    path: Path
    fields: Any
    """Its fields that Veneer reads."""

    @property
    def base_model_name_or_path(self) -> str | None:
        return self.fields.base_model_name_or_path

    @property
    def prefix_length(self) -> int:
        """Returns the number of positions of its prefix, in front of every text."""
        return 0

    @property
    def invocation(self) -> tuple[int, ...]:
        """Returns the token ids from which on it acts; empty: it acts on all tokens."""
        return ()

    @abstractmethod
    def settings(self, tensors: Mapping[str, Tensor]) -> AdapterConfig:
        """Returns the settings in Veneer's terms, without a model. tensors: of the file, by bare
        names

        Raises CorruptFileError if the tensors do not belong to such an adapter, ConfigError if the
        settings are invalid.
        """

    @abstractmethod
    def fit(
        self,
        tensors: Mapping[str, Tensor],
        model: nn.Module,
        head: nn.Module | None,
        read_past: Collection[str],
    ) -> Fit:
        """Finds where the tensors go on a model.

        tensors: by bare names; model: with or without other adapters; head: its output head;
        read_past: weights that the model reads directly, not through their modules
        (adapters/placement/reads.py)
        """


@dataclass(frozen=True)
class AdapterFormat:
    """How a family of methods reads and writes its files.

    peft_type      name of the method in adapter_config.json: PEFT's own, or VENEER_...
    tensors        (adapter, its model) -> every tensor of the file by its full name
    config         (adapter, model, base) -> adapter_config.json
    read           (path, its content) -> the settings, and the names of unknown fields that are off
    lists_saved    whether adapter_config.json lists modules that are saved whole, such as a head
    """

    peft_type: str
    tensors: Callable[[Attachment, nn.Module], dict[str, Tensor]]
    config: Callable[[Attachment, nn.Module, BaseIdentity], dict[str, Any]]
    read: Callable[[Path, Mapping[str, Any]], tuple[FileSettings, list[str]]]
    lists_saved: bool = False

    @property
    def peft_reads(self) -> bool:
        """Whether PEFT can load such files."""
        return not self.peft_type.startswith("VENEER_")
