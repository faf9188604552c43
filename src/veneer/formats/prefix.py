"""Reads and writes prefix adapters in PEFT's two files: one tensor, prompt_embeddings (M, 2 L t).

A prefix whose first tokens do not train is PEFT's CARTRIDGE: the same tensor, and the number of
those tokens. A prefix of only some layers, which PEFT cannot load, is VENEER_PREFIX with the same
tensor and one more setting, `layers`. Values that an MLP computed in training are written and read
as plain values: prefix_projection says how they were trained, and changes nothing. Shapes: M
tokens, L layers with a prefix, t = key/value heads * head size. Facts: PEFT 0.21.2,
peft/tuners/prefix_tuning and peft/tuners/cartridge.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from veneer.adapters.config import Prefix
from veneer.adapters.methods.prefix import decoder_of, key_shape
from veneer.adapters.methods.prefix_layer import PART, PrefixLayer
from veneer.adapters.placement.attachment import Attachment
from veneer.bounds import FROZEN_PLACES, LAYER, PLACES, WIDTH
from veneer.errors import CorruptFileError, RefusedError
from veneer.files.strict_json import validated
from veneer.formats.layout import AdapterFormat, FileSettings, Fit
from veneer.formats.manifest import BaseIdentity
from veneer.formats.peft.config import PEFT_LAYOUT

PEFT_TYPE, CARTRIDGE_TYPE, PARTIAL_TYPE = "PREFIX_TUNING", "CARTRIDGE", "VENEER_PREFIX"
_INERT = {
    "auto_mapping",
    "encoder_hidden_size",
    "inference_mode",
    "init_weights",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "prefix_projection",
    "runtime_config",
}
"""Fields that do not affect a finished prefix; modules_to_save is refused if it names any."""


class PeftPrefix(BaseModel):
    """The fields that decide what a prefix computes, with PEFT's names."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    num_virtual_tokens: Annotated[int, PLACES]
    num_layers: Annotated[int, LAYER]
    num_attention_heads: Annotated[int, WIDTH]
    """Heads of keys and values."""
    token_dim: Annotated[int, WIDTH]
    num_transformer_submodules: Literal[1] = 1
    layers: list[Annotated[int, LAYER]] | None = None
    """Numbers of the layers with a prefix; None: all."""
    num_frozen_tokens: Annotated[int, FROZEN_PLACES] | None = None
    """First tokens that did not train; only a CARTRIDGE has them."""
    task_type: Literal["CAUSAL_LM"] | None = "CAUSAL_LM"
    base_model_name_or_path: str | None = None
    revision: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_virtual_tokens, 2 * self.num_layers * self.token_dim


@dataclass(frozen=True)
class PrefixFile(FileSettings):
    """The adapter_config.json of a prefix adapter."""

    fields: PeftPrefix

    @property
    def prefix_length(self) -> int:
        return self.fields.num_virtual_tokens

    def settings(self, tensors: Mapping[str, Tensor]) -> Prefix:
        if PART not in tensors:
            raise CorruptFileError(
                f"{self.path.parent} holds no {PART}", [], "Copy the folder again."
            )
        if (shape := tuple(tensors[PART].shape)) != self.fields.shape:
            raise CorruptFileError(
                f"{self.path.parent} is inconsistent",
                [f"{PART} is {shape}, {self.path.name} makes it {self.fields.shape}"],
                "Copy the folder again.",
            )
        return Prefix(
            tokens=self.fields.num_virtual_tokens,
            layers=self.fields.layers or [],
            frozen_tokens=self.fields.num_frozen_tokens,
        )

    def fit(
        self,
        tensors: Mapping[str, Tensor],
        model: nn.Module,
        head: nn.Module | None,
        read_past: Collection[str],
    ) -> Fit:
        settings = self.settings(tensors)
        path, _ = decoder_of(model)
        keys = key_shape(model)
        faults = [f"{name} does not belong to a prefix" for name in sorted(tensors.keys() - {PART})]
        rows = [("key/value heads", self.fields.num_attention_heads, keys.heads)]
        rows += [
            ("values of one token's keys in a layer", self.fields.token_dim, keys.heads * keys.size)
        ]
        if self.fields.layers is None:
            rows += [("layers", self.fields.num_layers, len(keys.layers))]
        elif unknown := sorted(set(self.fields.layers) - set(keys.layers)):
            faults.append(f"layers {unknown}   the model has layers 0-{max(keys.layers)}")
        faults += [
            f"{label}   adapter {in_file}   model {in_model}"
            for label, in_file, in_model in rows
            if in_file != in_model
        ]
        if faults:
            return Fit(None, faults=faults, concerned=1)
        return Fit(settings, {f"{path}.{PART}": tensors[PART].float()}, {path: PrefixLayer.scaling})


def _layer(attachment: Attachment) -> PrefixLayer:
    (layer,) = attachment.layers.values()
    assert isinstance(layer, PrefixLayer)
    return layer


def _tensors(attachment: Attachment, model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.contiguous().cpu() for name, tensor in _layer(attachment).stored().items()}


def _config(attachment: Attachment, model: nn.Module, base: BaseIdentity) -> dict[str, Any]:
    layer = _layer(attachment)
    partial = len(layer.layers) < len(key_shape(model).layers)
    fields = {
        "auto_mapping": None,
        "base_model_name_or_path": base.name,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": layer.kv_heads,
        "num_layers": len(layer.layers),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": layer.tokens,
        "peft_version": PEFT_LAYOUT,
        "revision": base.revision,
        "task_type": "CAUSAL_LM",
        "token_dim": layer.token_size,
    }
    frozen = _frozen_tokens(attachment)
    if frozen is not None:
        of_type = {"peft_type": CARTRIDGE_TYPE, "num_frozen_tokens": frozen}
    else:
        of_type = {
            "peft_type": PARTIAL_TYPE if partial else PEFT_TYPE,
            "encoder_hidden_size": layer.token_size,
            "init_weights": None,
            "prefix_projection": False,
            **({"layers": list(layer.layers)} if partial else {}),
        }
    return dict(sorted((fields | of_type).items()))


def _frozen_tokens(attachment: Attachment) -> int | None:
    config = attachment.config
    assert isinstance(config, Prefix)
    return config.frozen_tokens


def _read(path: Path, stored: Mapping[str, Any]) -> tuple[PrefixFile, list[str]]:
    refused = []
    if stored.get("modules_to_save"):
        refused.append(
            f"modules_to_save {stored['modules_to_save']!r}: not supported with a prefix"
        )
    if (stacks := stored.get("num_transformer_submodules", 1)) != 1:
        refused.append(f"num_transformer_submodules {stacks!r}: Veneer runs models of one stack")
    if (task := stored.get("task_type")) not in (None, "CAUSAL_LM"):
        refused.append(f"task_type {task!r}: Veneer runs causal language models")
    unknown = sorted(set(stored) - set(PeftPrefix.model_fields) - _INERT)
    refused += [f"{name}: unknown, and switched on" for name in unknown if stored[name]]
    if refused:
        raise RefusedError(
            f"{path} requires something that Veneer does not support",
            refused,
            "Train the prefix again with Veneer.",
        )
    config = validated(PeftPrefix, stored, f"{path} has invalid fields", "Restore it.")
    faults = []
    if config.token_dim % config.num_attention_heads:
        faults.append(
            f"token_dim {config.token_dim} is not a multiple of {config.num_attention_heads} heads"
        )
    if config.layers is not None and sorted({*config.layers}) != config.layers:
        faults.append(f"layers {config.layers} are not rising")
    if config.layers is not None and len(config.layers) != config.num_layers:
        faults.append(f"num_layers {config.num_layers}, and {len(config.layers)} layers are listed")
    kind, frozen = stored["peft_type"], config.num_frozen_tokens
    if (config.layers is not None) != (kind == PARTIAL_TYPE):
        faults.append(f"peft_type {kind}, and layers {config.layers}")
    if (frozen is not None) != (kind == CARTRIDGE_TYPE):
        faults.append(f"peft_type {kind}, and num_frozen_tokens {frozen}")
    if frozen is not None and frozen > config.num_virtual_tokens:
        faults.append(f"num_frozen_tokens {frozen} of {config.num_virtual_tokens} tokens")
    if faults:
        raise CorruptFileError(f"{path} is inconsistent", faults, "Restore it.")
    return PrefixFile(path, config), [name for name in unknown if not stored[name]]


PREFIX = AdapterFormat(PEFT_TYPE, _tensors, _config, _read)
CARTRIDGE = replace(PREFIX, peft_type=CARTRIDGE_TYPE)
PARTIAL_PREFIX = replace(PREFIX, peft_type=PARTIAL_TYPE)
