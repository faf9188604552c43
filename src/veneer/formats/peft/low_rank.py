"""Composes PEFT's file format of LoRA and its variants from tensors, settings and fit."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.adapters.config import LowRank
from veneer.adapters.placement.attachment import Attachment
from veneer.errors import CorruptFileError
from veneer.formats.layout import AdapterFormat, FileSettings, Fit
from veneer.formats.manifest import BaseIdentity
from veneer.formats.peft.config import PeftLoRA, config_json, read_config
from veneer.formats.peft.fit_check import fit
from veneer.formats.peft.matching import peft_config
from veneer.formats.peft.tensors import adapted_modules, file_tensors


@dataclass(frozen=True)
class LowRankFile(FileSettings):
    """The adapter_config.json of LoRA or a variant."""

    fields: PeftLoRA

    @property
    def invocation(self) -> tuple[int, ...]:
        return tuple(self.fields.alora_invocation_tokens or ())

    def settings(self, tensors: Mapping[str, Tensor]) -> LowRank:
        if not (adapted := adapted_modules(tensors)):
            raise CorruptFileError(
                f"{self.path.parent} holds no low-rank factors", [], "Copy the folder again."
            )
        return self.fields.low_rank(adapted)

    def fit(
        self,
        tensors: Mapping[str, Tensor],
        model: nn.Module,
        head: nn.Module | None,
        read_past: Collection[str],
    ) -> Fit:
        return fit(self.fields, tensors, model, head, read_past)


def _config(attachment: Attachment, model: nn.Module, base: BaseIdentity) -> dict[str, Any]:
    return config_json(
        peft_config(attachment, model, name_or_path=base.name, revision=base.revision)
    )


def _read(path: Path, stored: Mapping[str, Any]) -> tuple[LowRankFile, list[str]]:
    settings, ignored = read_config(path, stored)
    return LowRankFile(path, settings), ignored


LOW_RANK = AdapterFormat("LORA", file_tensors, _config, _read, lists_saved=True)
