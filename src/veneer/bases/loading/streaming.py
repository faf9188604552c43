"""Quantises weights while they are read: memory holds the 4-bit model and one dense tensor at most.

transformers builds the model without storage and places the tensors, with its own renaming and
fusing of checkpoints. Its quantiser interface calls us for every tensor. Linear layers and gated
stacks of experts are packed; the output head, embeddings, norms, routers and modules named in
`keep_dense` stay dense. A folder of packed weights is read per tensor as it is: its dense tensors
stay dense (packed/formats.py).
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

from veneer.adapters.methods.expert_stack import is_gated_stack
from veneer.adapters.methods.targets import ends_with
from veneer.adapters.placement.reads import weights_read_past
from veneer.bases.config.model_class import model_class
from veneer.bases.folder.faults import check_loaded
from veneer.bases.folder.model_folder import ModelFolder, weight_files
from veneer.bases.folder.tensor_files import stored_tensors
from veneer.bases.packed.formats import stored_weights
from veneer.bases.packed.moving import LoaderWeight
from veneer.errors import ConfigError, CorruptFileError
from veneer.linear import is_plain_linear, is_transposed_linear
from veneer.private.transformers import conversions_of, keep_conversions, mark_initialized
from veneer.quant.layers import HeldExperts, HeldLinear
from veneer.quant.nf4 import BookName, quantize
from veneer.quant.weight import PackedWeight

_NAME = "veneer"

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Endings of linear layers that choose experts: few values that route every token."""

Placed = Callable[[PreTrainedModel], object]
"""Called with the model while its weights are loaded layer by layer; earlier layers are
complete."""

_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


class _QuantizerConfig(QuantizationConfigMixin):
    """The settings that transformers passes to the quantiser."""

    def __init__(self, book: BookName | None, keep_dense: tuple[str, ...], placed: Placed) -> None:
        self.quant_method = _NAME  # type: ignore[assignment]
        self.placed = placed
        self.book, self.keep_dense = book, keep_dense
        self.unused: list[str] = []
        """Entries of keep_dense that name no module of the model."""

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": _NAME}


class _PlaceOp(ConversionOps):
    """Places one tensor into the model."""

    def __init__(self, quantizer: _Quantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *_: Any, **options: Any) -> dict[str, Any]:
        dense_tensors = {}
        for target, values in input_dict.items():
            value = values[0] if isinstance(values, list) else values
            if (dense := self.quantizer.place(options["model"], target, value)) is not None:
                dense_tensors[target] = dense
            elif (missing := options.get("missing_keys")) is not None:
                missing.discard(target)
        return dense_tensors

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("a packed model is not saved through transformers")


class _Quantizer(HfQuantizer):
    """Packs weights as they arrive. settings.book None: only keeps weights packed that are packed
    in the files."""

    quantization_config: _QuantizerConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **options: Any
    ) -> PreTrainedModel:
        self.faults: list[str] = []
        self.packable = _packable(model)
        matrices = (
            name
            for name, parameter in model.named_parameters()
            if parameter.dim() == 2 and parameter.dtype == model.dtype
        )
        self.matrices = set(matrices) if self.quantization_config.book is None else set()
        keep = self.quantization_config.keep_dense
        paths = {path for path, _ in model.named_modules()} | self.packable.keys()
        self.quantization_config.unused = [
            k for k in keep if not any(ends_with(p, k) for p in paths)
        ]
        self.stays_dense = {
            target
            for target, path in self.packable.items()
            if any(_entry_names(k, path, target) for k in keep)
        }
        self.read_past = self.packable.keys() & weights_read_past(model)
        self.stays_dense |= self.read_past
        return model

    @property
    def quantized_element_size(self) -> float:
        return 0.52

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **options: Any
    ) -> bool:
        return param_name in self.packable or param_name in self.matrices

    def get_quantize_ops(self) -> _PlaceOp:
        return _PlaceOp(self)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def place(
        self, model: PreTrainedModel, target: str, value: Tensor | LoaderWeight
    ) -> Tensor | None:
        """Places the weight `target` into the model, packed. Returns it if it stays dense."""
        self.quantization_config.placed(model)
        book = self.quantization_config.book
        path, _, name = target.rpartition(".")
        module = model.get_submodule(path)
        packed = value.weight if isinstance(value, LoaderWeight) else None
        stays_dense = (
            target not in self.packable
            or (packed is None and book is None)
            or target in self.stays_dense
        )
        dense = module._plain[0] if isinstance(module, HeldExperts) else module
        dense_shape = tuple(dense.get_parameter(name).shape)
        transposed = is_transposed_linear(module) and not (stays_dense and packed is None)
        shape = tuple(value.shape) if isinstance(value, Tensor) else value.weight.shape
        if isinstance(value, Tensor) and transposed:
            value, shape = value.T, shape[::-1]
        if isinstance(value, LoaderWeight) and value.fault is not None:
            self.faults.append(f"packed     {target}: {value.fault}")
            return None
        if shape != (expected_shape := dense_shape[::-1] if transposed else dense_shape):
            self.faults.append(
                f"misshapen  {target}: {shape} in the file, {expected_shape} in the model"
            )
            return None
        if stays_dense:
            # No packed module replaces it: a head, a table, a weight that the model reads directly.
            return (
                value
                if isinstance(value, Tensor)
                else self._decode(target, value.weight, model.dtype, transposed)
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

    def _decode(
        self, target: str, weight: PackedWeight, dtype: torch.dtype, transposed: bool
    ) -> Tensor | None:
        """Decodes a packed weight that must be dense."""
        if len(weight.shape) != 2:
            self.faults.append(f"packed     {target}: there is no module for packed weights here")
            return None
        dense = weight.matrix(dtype).dense_weight(dtype)
        return dense.T.contiguous() if transposed else dense


def _packable(model: PreTrainedModel) -> dict[str, str]:
    """Maps each weight that can be packed to the path of its module."""
    head = model.get_output_embeddings()
    weights = {}
    for path, module in model.named_modules():
        if is_plain_linear(module) or is_transposed_linear(module):
            if module is not head and path.rsplit(".", 1)[-1] not in ROUTERS:
                weights[f"{path}.weight"] = path
        elif is_gated_stack(module):
            weights |= {f"{path}.{name}": path for name in ("gate_up_proj", "down_proj")}
    return weights


def _entry_names(entry: str, path: str, target: str) -> bool:
    """Whether an entry of keep_dense names this module, a parent of it, or its parameter."""
    parents = [path[:position] for position, character in enumerate(path) if character == "."]
    return any(ends_with(name, entry) for name in (target, path, *parents))


def _install(model: PreTrainedModel, path: str, name: str, weight: PackedWeight) -> None:
    """Replaces the dense module by a packed one; a bias that arrives later is placed there."""
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
        transposed = is_transposed_linear(module)
        module = HeldLinear(weight, bias, dtype=model.dtype)
        module.replaces_transposed = transposed
        model.set_submodule(path, module)
    for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        if tensor is not None and not tensor.is_meta:
            mark_initialized(tensor)


def stores_single_experts(names: Iterable[str]) -> bool:
    """Whether the folder stores experts one by one, while the model holds a stack of them.

    If transformers maps such files, it keeps the experts twice, in the stack and in the file's
    pages, as long as any other weight of the file is in use. So they are better read tensor by
    tensor, even if nothing is packed.
    """
    return any(_ONE_EXPERT.search(name) for name in names)


def build_packed(
    model_folder: ModelFolder,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    book: BookName | None,
    keep_dense: Sequence[str] = (),
    placed: Placed = bool,
) -> PreTrainedModel:
    """Builds a model with packed weights. book None: only weights that the files hold packed.

    placed: called before each weight, and at the end. Raises CorruptFileError with every weight
    that is missing, misshapen or not finite, ConfigError if keep_dense names nothing.
    """
    weights = stored_weights(model_folder.folder, stored_tensors(weight_files(model_folder.folder)))
    settings = _QuantizerConfig(book, tuple(keep_dense), placed)
    AUTO_QUANTIZER_MAPPING[_NAME] = _Quantizer
    model, info = model_class(config).from_pretrained(
        None,
        config=config,
        state_dict=weights,
        quantization_config=settings,
        dtype=dtype,
        device_map={"": device},
        attn_implementation=None,  # as for dense weights: never the file's choice
        experts_implementation=None,
        use_kernels=False,  # kernels from the hub are code of strangers
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # check_loaded refuses them all at once, with both shapes
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
    check_loaded(model_folder.folder, built, info, quantizer.faults)
    placed(built)
    _forget_quantizer(built)
    for module in built.modules():
        if isinstance(module, PreTrainedModel):
            module.name_or_path = str(model_folder.folder)
    for nested_config in _distinct_configs(built):
        nested_config.name_or_path = str(model_folder.folder)
    if (model_folder.folder / "generation_config.json").is_file():
        built.generation_config = GenerationConfig.from_pretrained(
            model_folder.folder, local_files_only=True
        )
    return built


def _forget_quantizer(model: PreTrainedModel) -> None:
    """Removes every trace of the quantiser, so that the model looks like transformers' own.

    Modelling code checks whether `_is_quantized` exists, not its value: then Jamba's mixers call a
    module whose weight they otherwise multiply themselves. The names of the checkpoint's tensors
    stay, for save_pretrained.
    """
    conversions = conversions_of(model)
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)
    del model.is_quantized
    if conversions is not None:
        keep_conversions(model, conversions)
    for config in _distinct_configs(model):
        for name in ("_is_quantized", "quantization_config"):
            vars(config).pop(name, None)


def _distinct_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Returns the configs of all its modules: layers with their own settings hold copies."""
    module_configs = (getattr(module, "config", None) for module in model.modules())
    return list(
        {
            id(config): config for config in module_configs if isinstance(config, PreTrainedConfig)
        }.values()
    )
