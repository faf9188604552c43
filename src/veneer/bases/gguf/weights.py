"""Maps the tensors of a .gguf file to transformers' parameters, in the model's layout.

llama.cpp's converter reorders or shifts some tensors. This is undone here:

llama              rows of q and k: the two halves that rotate are interleaved in the file
gemma2, gemma3, nemotron    norms include the 1 that transformers adds while it computes
gpt2               matrices of Conv1D are transposed
bloom, falcon      q, k and v follow each other; in the model they are ordered by heads or groups of
                   heads
qwen2moe           the gate of the shared expert is a vector
qwen2moe, qwen3moe gate and up projections of all experts are two tensors, in the model one

Source: modify_tensors in https://github.com/ggml-org/llama.cpp/tree/master/conversion.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, ReaderTensor, dequantize, get_tensor_name_map
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

_MERGED = ("ffn_gate_exps", "ffn_up_exps")
"""Tensors of all experts that are one parameter in the model, in its order."""


def parameter_names(architecture: str, model: PreTrainedModel) -> dict[str, str]:
    """Maps each name in the file to the model's parameter, by the gguf package's table."""
    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
    table = get_tensor_name_map(number, model.config.num_hidden_layers)
    prefix = f"{model.base_model_prefix}."
    names: dict[str, str] = {}
    for name, _ in model.named_parameters():
        if name.endswith(".mlp.experts.gate_up_proj"):
            layer = name.split(".")[2]
            names |= {f"blk.{layer}.{part}.weight": name for part in _MERGED}
            continue
        stem, _, last = (
            name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "weight")
        )
        name_in_file = table.get_name(stem) or table.get_name(
            stem.removeprefix(prefix)
        )  # Bloom's table has no prefix
        if name_in_file is not None:
            names[f"{name_in_file}.{last}"] = name
    return names


def stored_shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """Returns the shape of a tensor in the file, rows first."""
    return tuple(int(size) for size in reversed(tensor.shape))


def dense_values(
    tensor: ReaderTensor, architecture: str, config: PreTrainedConfig, dtype: torch.dtype
) -> Tensor:
    """Decodes a tensor into the model's layout."""
    values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))).view(
        stored_shape(tensor)
    )
    restore = _LAYOUTS.get(architecture)
    if restore is not None:
        values = restore(tensor.name, values, config)
    return values.to(dtype).contiguous()


def merge_experts(parts: Mapping[str, Tensor]) -> Tensor:
    """Joins gate and up projections of all experts (experts, O, I) to one parameter (experts, 2 O,
    I)."""
    ordered = sorted(parts, key=lambda name: _MERGED.index(name.split(".")[-2]))
    return torch.cat([parts[name] for name in ordered], dim=1)


def count_parts(name: str) -> int:
    """Counts the tensors of the file that make up this parameter of the model."""
    return len(_MERGED) if name.endswith(".mlp.experts.gate_up_proj") else 1


def _llama(name: str, values: Tensor, config: Any) -> Tensor:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
        name.split(".")[-2]
    )
    if heads is None:
        return values
    pairs = values.view(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


def _shifted_norm(name: str, values: Tensor, config: Any) -> Tensor:
    return values - 1 if name.endswith("norm.weight") else values


def _gpt2(name: str, values: Tensor, config: Any) -> Tensor:
    conv1d = name.split(".")[-2] in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    return values.T if conv1d and values.dim() == 2 else values


def _bloom(name: str, values: Tensor, config: Any) -> Tensor:
    if name.split(".")[-2] != "attn_qkv":
        return values
    by_kind = values.view(3, config.n_head, -1, *values.shape[1:])
    return by_kind.transpose(0, 1).reshape(values.shape)


def _falcon(name: str, values: Tensor, config: Any) -> Tensor:
    if name.split(".")[-2] != "attn_qkv":
        return values
    groups = config.num_kv_heads
    rows = config.hidden_size // config.num_attention_heads
    q, k, v = values.split([config.num_attention_heads * rows, groups * rows, groups * rows])
    parts = [part.reshape(groups, -1, rows, *values.shape[1:]) for part in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(values.shape)


def _qwen2moe(name: str, values: Tensor, config: Any) -> Tensor:
    return values.reshape(1, -1) if name.split(".")[-2] == "ffn_gate_inp_shexp" else values


_LAYOUTS: Mapping[str, Callable[[str, Tensor, Any], Tensor]] = {
    "llama": _llama,
    "gemma2": _shifted_norm,
    "gemma3": _shifted_norm,
    "nemotron": _shifted_norm,
    "gpt2": _gpt2,
    "bloom": _bloom,
    "falcon": _falcon,
    "qwen2moe": _qwen2moe,
}
