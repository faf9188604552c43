"""Describes a base before it is loaded: for a named size its fields, and a config on demand.

Importing transformers takes longer than most answers that reuse an earlier process's results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from veneer.bases.compute import DTYPES
from veneer.bases.loading.shapes import shape_of
from veneer.bases.names.named import NAMED
from veneer.files.home import expanded
from veneer.quant.config import Quantize
from veneer.quant.weight import PackedSize

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Blueprint:
    """What a base's config says.

    source    what the user named
    config_or_fields  the config, or the fields of a named size (shapes.py), which make one
    dtype     of the stored weights, or before they were packed, as far as known
    quantize  the format of packed weights in its files, which stays; None: dense
    packed    the size of each packed weight, if the files are present
    """

    source: str
    config_or_fields: PreTrainedConfig | Mapping[str, Any]
    dtype: torch.dtype
    quantize: Quantize | None = None
    packed: tuple[PackedSize, ...] = ()

    @cached_property
    def config(self) -> PreTrainedConfig:
        return (
            config_from(self.config_or_fields)
            if isinstance(self.config_or_fields, Mapping)
            else self.config_or_fields
        )


def named_size(source: str) -> Blueprint | None:
    """Returns the blueprint of a named size (shapes.py), unless a default base or a path has that
    name."""
    fields = shape_of(source)
    if fields is None or source in NAMED or expanded(source).exists():
        return None
    return blueprint_of_fields(source, fields)


def blueprint_of_fields(source: str, fields: Mapping[str, Any]) -> Blueprint:
    return Blueprint(source, fields, DTYPES[fields["dtype"]])


def config_from(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """Builds a transformers config from `model_type` and its fields."""
    from transformers import AutoConfig

    class_fields = {
        name: value for name, value in fields.items() if name not in ("model_type", "dtype")
    }
    return AutoConfig.for_model(fields["model_type"], **class_fields)
