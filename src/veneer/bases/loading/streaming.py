"""Weights quantised while they are read: at no time more than the 4-bit model and one dense tensor
are in memory.

transformers builds the model without storage and places the tensors, with its own renaming and
fusing of checkpoints; its quantiser seam asks us, tensor by tensor, what to put there. Linear
layers and gated stacks of experts are packed; the output head, embeddings, norms, routers and what
`keep_dense` names stay. A folder that holds packed weights is read as it is, per tensor: what it
left dense stays dense (packed/formats.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from veneer.adapters.methods.experts import is_gated_stack
from veneer.adapters.methods.targets import ends_with
from veneer.adapters.placement.reads import weights_read_past
from veneer.bases.config.model_class import model_class
from veneer.bases.folder.faults import check_loaded
from veneer.bases.folder.model_folder import Found, weight_files
from veneer.bases.folder.tensor_files import stored_tensors
from veneer.bases.packed.formats import stored_weights
from veneer.bases.packed.moving import Moving
from veneer.errors import ConfigError, CorruptFileError
from veneer.linear import is_plain_linear, is_transposed_linear
from veneer.quant.layers import HeldExperts, HeldLinear
from veneer.quant.nf4 import BookName, quantize
from veneer.quant.weight import PackedWeight

_NAME = "veneer"

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Endings of linear layers that choose experts: a few values that decide where every token goes."""

Placed = Callable[[PreTrainedModel], object]
"""What is told of a model while its weights come, layer after layer: those before the next one are
in their places."""

_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


class _Settings(QuantizationConfigMixin):
    """What transformers hands to the quantiser."""

    def __init__(self, book: BookName | None, keep_dense: tuple[str, ...], placed: Placed) -> None:
        self.quant_method = _NAME  # type: ignore[assignment]
        self.placed = placed
        self.book, self.keep_dense = book, keep_dense
        self.unused: list[str] = []
        """Names of keep_dense that the model does not have."""

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": _NAME}


class _Pack(ConversionOps):
    """One tensor on its way into the model."""

    def __init__(self, quantizer: _Quantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *_: Any, **others: Any) -> dict[str, Any]:
        left = {}
        for target, values in input_dict.items():
            value = values[0] if isinstance(values, list) else values
            if (dense := self.quantizer.place(others["model"], target, value)) is not None:
                left[target] = dense
            elif (missing := others.get("missing_keys")) is not None:
                missing.discard(target)
        return left

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("a packed model is not saved through transformers")


class _Quantizer(HfQuantizer):
    """settings.book None: only what the files hold packed is packed."""

    quantization_config: _Settings

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **others: Any
    ) -> PreTrainedModel:
        self.faults: list[str] = []
        self.wanted = _packable(model)
        matrices = (
            name
            for name, each in model.named_parameters()
            if each.dim() == 2 and each.dtype == model.dtype
        )
        self.matrices = set(matrices) if self.quantization_config.book is None else set()
        keep = self.quantization_config.keep_dense
        paths = {path for path, _ in model.named_modules()} | self.wanted.keys()
        self.quantization_config.unused = [
            k for k in keep if not any(ends_with(p, k) for p in paths)
        ]
        self.kept = {
            target
            for target, path in self.wanted.items()
            if any(_names(k, path, target) for k in keep)
        }
        self.read_past = self.wanted.keys() & weights_read_past(model)
        self.kept |= self.read_past
        return model

    @property
    def quantized_element_size(self) -> float:
        return 0.52

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **others: Any
    ) -> bool:
        return param_name in self.wanted or param_name in self.matrices

    def get_quantize_ops(self) -> _Pack:
        return _Pack(self)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def place(self, model: PreTrainedModel, target: str, value: Tensor | Moving) -> Tensor | None:
        """Put the weight called `target` into the model, packed; what is given back stays dense."""
        self.quantization_config.placed(model)
        book = self.quantization_config.book
        path, _, name = target.rpartition(".")
        module = model.get_submodule(path)
        packed = value.weight if isinstance(value, Moving) else None
        stays = (
            target not in self.wanted or (packed is None and book is None) or target in self.kept
        )
        dense = tuple(_dense(module).get_parameter(name).shape)
        turned = is_transposed_linear(module) and not (stays and packed is None)
        found = tuple(value.shape) if isinstance(value, Tensor) else value.weight.shape
        if isinstance(value, Tensor) and turned:
            value, found = value.T, found[::-1]
        if isinstance(value, Moving) and value.fault is not None:
            self.faults.append(f"packed     {target}: {value.fault}")
            return None
        if found != (expected := dense[::-1] if turned else dense):
            self.faults.append(f"misshapen  {target}: {found} in the file, {expected} in the model")
            return None
        if stays:
            # What no module of ours stands for (a head, a table, weights that the model takes past
            # their modules).
            return (
                value
                if isinstance(value, Tensor)
                else self._decoded(target, value.weight, model.dtype, turned)
            )
        if isinstance(value, Tensor):
            assert book is not None
            try:
                packed = quantize(value, book=book, name=target)
            except CorruptFileError as fault:
                self.faults.append(f"not finite {target}: {fault.faults[0]}")
                return None
        assert packed is not None
        _install(model, path, name, packed)
        return None

    def _decoded(
        self, target: str, weight: PackedWeight, dtype: torch.dtype, turned: bool
    ) -> Tensor | None:
        if len(weight.shape) != 2:
            self.faults.append(f"packed     {target}: no module for packed weights takes its place")
            return None
        dense = weight.matrix(dtype).dense_weight(dtype)
        return dense.T.contiguous() if turned else dense


AUTO_QUANTIZER_MAPPING[_NAME] = _Quantizer


def _packable(model: PreTrainedModel) -> dict[str, str]:
    """Parameter name -> path of its module, of every weight that can be packed."""
    head = model.get_output_embeddings()
    found = {}
    for path, module in model.named_modules():
        if is_plain_linear(module) or is_transposed_linear(module):
            if module is not head and path.rsplit(".", 1)[-1] not in ROUTERS:
                found[f"{path}.weight"] = path
        elif is_gated_stack(module):
            found |= {f"{path}.{name}": path for name in ("gate_up_proj", "down_proj")}
    return found


def _names(entry: str, path: str, target: str) -> bool:
    """Whether an entry of keep_dense names this module, one above it, or its parameter."""
    above = [path[:place] for place, letter in enumerate(path) if letter == "."]
    return any(ends_with(each, entry) for each in (target, path, *above))


def _dense(module: nn.Module) -> nn.Module:
    return module._plain[0] if isinstance(module, HeldExperts) else module


def _install(model: PreTrainedModel, path: str, name: str, weight: PackedWeight) -> None:
    """The packed module in the dense one's place; a bias that has not come yet finds it there."""
    module = model.get_submodule(path)
    if isinstance(module, HeldExperts):
        module.hold(name, weight)
    elif is_gated_stack(module):
        experts = HeldExperts(module, dtype=model.dtype, device=weight.tensors[""].device)
        experts.hold(name, weight)
        model.set_submodule(path, experts)
        module = experts
    else:
        bias = module.bias if isinstance(module.bias, nn.Parameter) else None
        turned = is_transposed_linear(module)
        module = HeldLinear(weight, bias, dtype=model.dtype)
        module.replaces_transposed = turned
        model.set_submodule(path, module)
    for each in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        if each is not None and not each.is_meta:
            each._is_hf_initialized = True  # type: ignore[attr-defined]


def holds_experts_apart(names: Iterable[str]) -> bool:
    """Whether of a folder's weights experts are stored one by one, while the model holds a stack of
    them.

    Where transformers maps such files, it keeps the experts two times, in the stack and in the
    file's pages, for as long as any other weight of the file is in use: they are better read tensor
    by tensor, also where nothing is packed.
    """
    return any(_ONE_EXPERT.search(name) for name in names)


def build_packed(
    found: Found,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    book: BookName | None,
    keep_dense: Sequence[str] = (),
    placed: Placed = bool,
) -> PreTrainedModel:
    """book None: read packed what the files hold packed, and nothing else. placed: told before each
    weight, and at the end.

    Raises CorruptFileError (missing, misshapen, not finite: every one), ConfigError (keep_dense
    names nothing).
    """
    weights = stored_weights(found.folder, stored_tensors(weight_files(found.folder)))
    settings = _Settings(book, tuple(keep_dense), placed)
    model, info = model_class(config).from_pretrained(
        None,
        config=config,
        state_dict=weights,
        quantization_config=settings,
        dtype=dtype,
        device_map={"": device},
        attn_implementation=None,  # as for dense weights: never what a file says
        experts_implementation=None,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # they are refused below, all at once and with both shapes
        output_loading_info=True,
    )
    built: PreTrainedModel = model
    quantizer: Any = built.hf_quantizer
    if settings.unused:
        raise ConfigError(
            "keep_dense names modules that the model does not have",
            settings.unused,
            "Correct the names.",
        )
    check_loaded(found.folder, built, info, quantizer.faults)
    placed(built)
    _forget_quantizer(built)
    for module in built.modules():
        if isinstance(module, PreTrainedModel):
            module.name_or_path = str(found.folder)
    for own in _configs(built):
        own.name_or_path = str(found.folder)
    if (found.folder / "generation_config.json").is_file():
        built.generation_config = GenerationConfig.from_pretrained(
            found.folder, local_files_only=True
        )
    return built


def _forget_quantizer(model: PreTrainedModel) -> None:
    """Removes every trace of the quantiser, so that the model is transformers' own but for packed
    modules.

    Modelling code asks whether `_is_quantized` exists, not what it holds: where it does, Jamba's
    mixers call a module whose weight they otherwise multiply by themselves. The names of the
    checkpoint's tensors stay, for save_pretrained.
    """
    conversions = getattr(model, "_weight_conversions", None)
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)
    del model.is_quantized
    if conversions is not None:
        model._weight_conversions = conversions
    for config in _configs(model):
        for name in ("_is_quantized", "quantization_config"):
            vars(config).pop(name, None)


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs of all its modules: layers with settings of their own hold copies."""
    held = (getattr(module, "config", None) for module in model.modules())
    return list(
        {id(config): config for config in held if isinstance(config, PreTrainedConfig)}.values()
    )
