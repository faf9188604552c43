"""Where a base's weights stand in a .gguf file: names, architecture, the row order of q and k.

llama.cpp rotates pairs of neighbouring rows, transformers' llama the first half against the second:
    in a file of that
architecture the rows of q and k stand as  (heads, 2, head_dim / 2) -> (heads, head_dim / 2, 2).
                                           Qwen's do not.
Source: llama.cpp, convert_hf_to_gguf.py; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor
from transformers import PreTrainedConfig

from veneer.errors import RefusedError

_ARCHITECTURES: dict[str, tuple[MODEL_ARCH, bool]] = {
    "llama": (MODEL_ARCH.LLAMA, True),
    "mistral": (MODEL_ARCH.LLAMA, True),
    "qwen2": (MODEL_ARCH.QWEN2, False),
    "qwen3": (MODEL_ARCH.QWEN3, False),
    "gemma3_text": (MODEL_ARCH.GEMMA3, False),
}
"""transformers' model_type -> llama.cpp's architecture, and whether it puts the rows of q and k in
another order."""


@dataclass(frozen=True)
class GGUFNames:
    """architecture: as general.architecture says it; reordered: q and k in llama.cpp's row order;
    shifted: norms stand there with the 1 that transformers adds as it computes."""

    architecture: str
    reordered: bool
    shifted: bool
    query_heads: int
    key_heads: int
    _map: Any

    def of(self, name: str) -> str | None:
        """model.layers.0.self_attn.q_proj.weight -> blk.0.attn_q.weight; None: no place in such a
        file."""
        of_text = (
            name.replace("model.language_model.", "model.", 1)
            if name.startswith("model.language")
            else name
        )
        return self._map.get_name(of_text, try_suffixes=(".weight", ".bias"))

    def values(self, gguf_name: str, weight: Tensor) -> Tensor:
        """Returns a weight as the file holds it."""
        return (
            weight + 1
            if self.shifted and gguf_name.endswith("norm.weight")
            else self.rows(gguf_name, weight)
        )

    def rows(self, gguf_name: str, rows: Tensor) -> Tensor:
        """Returns `rows` (O, ...) of a weight, a bias or a lora_b in the order of the file."""
        last = gguf_name.split(".")[-2]
        heads = {"attn_q": self.query_heads, "attn_k": self.key_heads}.get(last)
        if not self.reordered or heads is None:
            return rows
        pairs = rows.view(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        return pairs.transpose(1, 2).reshape(rows.shape)


def names_of(config: PreTrainedConfig) -> GGUFNames:
    """Returns the names of a family. Raises RefusedError if its files are not known here."""
    config = config.get_text_config()
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        raise RefusedError(
            f"a .gguf file of a {kind} model cannot be written yet",
            [f"families that can: {', '.join(_ARCHITECTURES)}"],
            "Merge into a folder (veneer merge) and use llama.cpp's convert_hf_to_gguf.py on it.",
        )
    architecture, reordered = _ARCHITECTURES[kind]
    heads: int = config.num_attention_heads
    return GGUFNames(
        MODEL_ARCH_NAMES[architecture],
        reordered,
        architecture == MODEL_ARCH.GEMMA3,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        get_tensor_name_map(architecture, config.num_hidden_layers),
    )
