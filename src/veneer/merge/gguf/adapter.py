"""A low-rank adapter as the .gguf file that llama.cpp puts beside a model (--lora).

    <base tensor>.lora_a (R, I), <base tensor>.lora_b (O, R)        scale = alpha / R of that tensor
    token_embd: lora_a (V, R), transposed
        q and k of llama: rows of lora_b reordered

There is one alpha for all, and the scale depends on each tensor's rank: whatever rsLoRA, patterns
and alphas the adapter has, every scale is put into lora_b, so that alpha / R times it is right.
Source: llama.cpp, src/llama-adapter.cpp; checked by loading in llama.cpp.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from gguf import GGUFWriter
from torch import Tensor
from transformers import PreTrainedModel

from veneer.errors import RefusedError
from veneer.merge.combine.adapters import PlacedAdapter
from veneer.merge.combine.combine import FactorPair
from veneer.merge.gguf.bytes import written
from veneer.merge.gguf.names import GGUFNames, names_of

AdapterType = Literal["f32", "f16"]


def gguf_adapter_faults(placed: PlacedAdapter, model: PreTrainedModel) -> list[str]:
    """What llama.cpp has no place for. RefusedError where the family is not known at all."""
    names = names_of(model.config)
    faults = [
        f"{name}: values trained in full have no place in an adapter file" for name in placed.values
    ]
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    for where, update in placed.updates.items():
        found = names.of(f"{where}.weight")
        if update.A.dim() > 2 or found is None:
            faults.append(f"{where}: llama.cpp has no adapters there")
        elif tied and found == "output.weight":
            faults.append(
                f"{where}: the head is the embedding here, a file of this base has no {found}"
            )
        elif tied and found == "token_embd.weight":
            faults.append(
                f"{where}: llama.cpp would apply it to the head too, which is the same tensor"
            )
    return faults


def adapter_tensors(
    updates: Mapping[str, FactorPair], names: GGUFNames, alpha: float
) -> dict[str, Tensor]:
    """Tensors by their names in the file, float32; updates have their scaling in B."""
    found: dict[str, Tensor] = {}
    for where, update in updates.items():
        target = names.of(f"{where}.weight")
        assert target is not None
        A, B = update.A.float(), update.B * (update.A.shape[0] / alpha)
        found[f"{target}.lora_a"] = (
            A.T.contiguous() if target == "token_embd.weight" else A.contiguous()
        )
        found[f"{target}.lora_b"] = names.rows(target, B.float()).contiguous()
    return found


def write_gguf_adapter(
    path: Path, placed: PlacedAdapter, model: PreTrainedModel, *, dtype: AdapterType = "f32"
) -> int:
    """Writes the file; returns its size in bytes. model: the base's skeleton. RefusedError with
    every fault."""
    if faults := gguf_adapter_faults(placed, model):
        raise RefusedError(
            "llama.cpp cannot use this adapter",
            faults,
            "Export the merged model instead: veneer export --to llamacpp --merged.",
        )
    names = names_of(model.config)
    ranks = [update.A.shape[0] for update in placed.updates.values()]
    alpha = float(max(ranks))
    writer = GGUFWriter(path, names.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in adapter_tensors(placed.updates, names, alpha).items():
        writer.add_tensor(
            name, written(tensor.numpy().astype(np.float16 if dtype == "f16" else np.float32))
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.stat().st_size
