"""What a base would be: of a named size its fields alone, and a config of transformers once
somebody asks for it.

Importing transformers takes longer than most answers that need no more than what an earlier process
found.
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

    given     the config, or the fields of a named size (shapes.py), which make one
    dtype     of the weights as they are stored, or were before they were packed, as far as that is
              known
    quantize  the format that its files hold them in, which then is how it is held; None: dense
    packed    what each weight so held takes, where the files are there
    """

    source: str
    given: PreTrainedConfig | Mapping[str, Any]
    dtype: torch.dtype
    quantize: Quantize | None = None
    packed: tuple[PackedSize, ...] = ()

    @cached_property
    def config(self) -> PreTrainedConfig:
        return config_from(self.given) if isinstance(self.given, Mapping) else self.given


def named_size(source: str) -> Blueprint | None:
    """Of a name of shapes.py that nothing here has too."""
    fields = shape_of(source)
    if fields is None or source in NAMED or expanded(source).exists():
        return None
    return of_fields(source, fields)


def of_fields(source: str, fields: Mapping[str, Any]) -> Blueprint:
    return Blueprint(source, fields, DTYPES[fields["dtype"]])


def config_from(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """A config of transformers from `model_type` and its fields."""
    from transformers import AutoConfig

    own = {name: value for name, value in fields.items() if name not in ("model_type", "dtype")}
    config: PreTrainedConfig = AutoConfig.for_model(fields["model_type"], **own)
    return config
