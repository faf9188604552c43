"""Reads and writes bottleneck adapters. PEFT has no layout for them: docs/format.md defines the
names.

base_model.model.<block>.bottleneck_down.weight / .bias    (S, D) / (S)
base_model.model.<block>.bottleneck_up.weight / .bias      (D, S) / (D)
base_model.model.<block>.bottleneck_norm.weight / .bias    (D) / (D)       with norm
Shapes: D hidden size, S size of the bottleneck.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from torch import Tensor, nn

from veneer.adapters.config import Bottleneck
from veneer.adapters.methods.bottleneck import find_blocks, hidden_size
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.wrapping import plain_modules, unwrapped
from veneer.bounds import LAYER, SCALING, SHARE, WIDTH
from veneer.errors import ConfigError, CorruptFileError
from veneer.files.strict_json import StoredModel, validated
from veneer.formats.layout import AdapterFormat, FileSettings, Fit
from veneer.formats.manifest import BaseIdentity
from veneer.formats.peft.fit_check import group_by_layer
from veneer.formats.peft.tensors import PREFIX

PEFT_TYPE: Final = "VENEER_BOTTLENECK"
_ENDINGS = {
    "down": "bottleneck_down.weight",
    "down_bias": "bottleneck_down.bias",
    "up": "bottleneck_up.weight",
    "up_bias": "bottleneck_up.bias",
    "norm_weight": "bottleneck_norm.weight",
    "norm_bias": "bottleneck_norm.bias",
}
"""Part of a layer -> the end of its name in the file."""


class BottleneckFields(StoredModel):
    """The fields of adapter_config.json; all are required and no others are allowed."""

    peft_type: Literal["VENEER_BOTTLENECK"]
    task_type: Literal["CAUSAL_LM"]
    placement: Literal["houlsby", "pfeiffer", "parallel"]
    size: Annotated[int, WIDTH]
    activation: Literal["relu", "gelu", "swish", "tanh"]
    norm: bool
    scaling: Annotated[float, SCALING]
    dropout: Annotated[float, SHARE]
    layers: list[Annotated[int, LAYER]]
    """Layer numbers; empty: all."""
    base_model_name_or_path: str | None
    revision: str | None


@dataclass(frozen=True)
class BottleneckFile(FileSettings):
    """The adapter_config.json of a bottleneck adapter."""

    fields: BottleneckFields

    def settings(self, tensors: Mapping[str, Tensor]) -> Bottleneck:
        if not any(name.endswith(_ENDINGS["down"]) for name in tensors):
            raise CorruptFileError(
                f"{self.path.parent} holds no bottleneck layers", [], "Copy the folder again."
            )
        other_fields = {"peft_type", "task_type", "base_model_name_or_path", "revision"}
        return Bottleneck(**self.fields.model_dump(exclude=other_fields))

    def fit(
        self,
        tensors: Mapping[str, Tensor],
        model: nn.Module,
        head: nn.Module | None,
        read_past: Collection[str],
    ) -> Fit:
        settings = self.settings(tensors)
        try:
            paths = find_blocks(plain_modules(model), settings)
            width = hidden_size(None if head is None else unwrapped(head))
        except ConfigError as fault:
            return Fit(None, faults=fault.faults or [fault.headline])
        shapes = part_shapes(settings, width)
        expected = {
            f"{path}.{_ENDINGS[part]}": shape for path in paths for part, shape in shapes.items()
        }
        compared = [
            (
                name,
                str(tuple(tensors[name].shape)) if name in tensors else "missing",
                str(expected.get(name, "no such tensor")),
            )
            for name in sorted(expected.keys() | tensors.keys())
            if name not in tensors or tuple(tensors[name].shape) != expected.get(name)
        ]
        if compared:
            return Fit(None, faults=group_by_layer(compared), concerned=len(compared))
        values = {
            f"{path}.{part}": tensors[f"{path}.{_ENDINGS[part]}"].float()
            for path in paths
            for part in shapes
        }
        return Fit(settings, values, dict.fromkeys(paths, settings.effective_scaling))


def part_shapes(config: Bottleneck, width: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each part of a layer."""
    size = config.bottleneck_size(width)
    shapes: dict[str, tuple[int, ...]] = {
        "down": (size, width),
        "down_bias": (size,),
        "up": (width, size),
        "up_bias": (width,),
    }
    return shapes | ({"norm_weight": (width,), "norm_bias": (width,)} if config.norm else {})


def _tensors(attachment: Attachment, model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{path}.{_ENDINGS[part]}": tensor.contiguous().cpu()
        for path, layer in attachment.layers.items()
        for part, tensor in layer.stored().items()
    }


def _config(attachment: Attachment, model: nn.Module, base: BaseIdentity) -> dict[str, Any]:
    config = attachment.config
    assert isinstance(config, Bottleneck)
    size = next(iter(attachment.layers.values())).parts()["down"].shape[0]
    return BottleneckFields(
        peft_type=PEFT_TYPE,
        task_type="CAUSAL_LM",
        placement=config.placement,
        size=size,
        activation=config.activation,
        norm=config.norm,
        scaling=config.effective_scaling,
        dropout=config.dropout,
        layers=sorted(config.layers),
        base_model_name_or_path=base.name,
        revision=base.revision,
    ).model_dump()


def _read(path: Path, stored: Mapping[str, Any]) -> tuple[BottleneckFile, list[str]]:
    headline = f"{path} has invalid fields"
    return BottleneckFile(path, validated(BottleneckFields, stored, headline, "Restore it.")), []


BOTTLENECK = AdapterFormat(PEFT_TYPE, _tensors, _config, _read)
