"""A low-rank adapter as the .gguf file that llama.cpp loads with a model (--lora).

    <base tensor>.lora_a (R, I), <base tensor>.lora_b (O, R)        scale = alpha / R of that tensor
    token_embd: lora_a (V, R), transposed
        q and k of llama: rows of lora_b reordered

There is one alpha for all tensors, and the scale depends on each tensor's rank. So every scaling of
the adapter (rsLoRA, patterns, alphas) is put into lora_b, such that alpha / R times it is right.
Source: llama.cpp, src/llama-adapter.cpp; checked by loading in llama.cpp.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from gguf import GGUFValueType, GGUFWriter
from torch import Tensor
from transformers import PreTrainedModel

from veneer.errors import ConfigError, RefusedError
from veneer.formats.rounding import rounded
from veneer.merge.combine.combine import FactorPair
from veneer.merge.combine.low_rank_adapters import PlacedAdapter
from veneer.merge.gguf.bytes import as_writable
from veneer.merge.gguf.names import GGUFNames, names_of
from veneer.merge.programs import AdapterType

INVOCATION = "adapter.alora.invocation_tokens"
"""Token ids: llama-server applies the adapter from their last occurrence in a prompt on."""


def gguf_adapter_faults(placed: PlacedAdapter, model: PreTrainedModel) -> list[str]:
    """Lists what llama.cpp cannot hold. RefusedError for an unknown family."""
    names = names_of(model.config)
    faults = [
        f"{name}: values trained in full have no place in an adapter file" for name in placed.values
    ]
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    for path, update in placed.updates.items():
        gguf_name = names.of(f"{path}.weight")
        if update.A.dim() > 2 or gguf_name is None:
            faults.append(f"{path}: llama.cpp has no adapters there")
        elif tied and gguf_name == "output.weight":
            faults.append(
                f"{path}: the head is the embedding here, a file of this base has no {gguf_name}"
            )
        elif tied and gguf_name == "token_embd.weight":
            faults.append(
                f"{path}: llama.cpp would apply it to the head too, which is the same tensor"
            )
    return faults


def adapter_tensors(
    updates: Mapping[str, FactorPair], names: GGUFNames, alpha: float
) -> dict[str, Tensor]:
    """Returns tensors by their names in the file, float32; updates have their scaling in B."""
    tensors: dict[str, Tensor] = {}
    for path, update in updates.items():
        target = names.of(f"{path}.weight")
        assert target is not None
        A, B = update.A.float(), update.B * (update.A.shape[0] / alpha)
        tensors[f"{target}.lora_a"] = (
            A.T.contiguous() if target == "token_embd.weight" else A.contiguous()
        )
        tensors[f"{target}.lora_b"] = names.rows(target, B.float()).contiguous()
    return tensors


def write_gguf_adapter(
    path: Path, placed: PlacedAdapter, model: PreTrainedModel, *, dtype: AdapterType = "f32"
) -> tuple[int, float | None]:
    """Writes the file; returns its size, and in f16 the largest relative change of a tensor. model:
    the base's skeleton. RefusedError lists all faults.
    """
    if dtype == "bf16":
        raise ConfigError("a .gguf adapter is f32 or f16", next_step="Leave the type out.")
    if faults := gguf_adapter_faults(placed, model):
        raise RefusedError(
            "llama.cpp cannot use this adapter",
            faults,
            "Export the merged model instead: veneer export --to llamacpp --merged.",
        )
    names = names_of(model.config)
    ranks = [update.A.shape[0] for update in placed.updates.values()]
    alpha = float(max(ranks))
    tensors, rounding = adapter_tensors(placed.updates, names, alpha), None
    if dtype == "f16":
        tensors, rounding = rounded(tensors, torch.float16, instead="Keep f32.")
    writer = GGUFWriter(path, names.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    if placed.stored.file.invocation:
        ids, array = list(placed.stored.file.invocation), GGUFValueType.ARRAY
        writer.add_key_value(INVOCATION, ids, array, GGUFValueType.UINT32)
    for name, tensor in tensors.items():
        writer.add_tensor(name, as_writable(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.stat().st_size, rounding
