"""A base's sizes as the entries of a .gguf file, and what llama.cpp fixes for an architecture instead of reading it.

What it fixes is held against the config: a model that differs there would be read, and answer wrongly.
Source: llama.cpp, conversion/gemma.py, src/models/gemma3.cpp and llama-model.cpp (hyperparameters of Gemma 3).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from transformers import PreTrainedConfig

from veneer.errors import RefusedError
from veneer.merge.gguf_names import Names

_PERIOD = 6
"""Of Gemma 3's layers in llama.cpp every sixth is without a window."""
_LOCAL_THETA = 10000.0
_SCALED_BY_WIDTH = 62
"""Layers of the one Gemma 3 (27B) whose scores llama.cpp scales by hidden size / heads instead of a head's size."""


def write_hyperparameters(writer: GGUFWriter, config: PreTrainedConfig, where: Names, ids: int) -> None:
    """config: of the text. RefusedError: with everything that llama.cpp would compute otherwise."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    gemma = config.model_type == "gemma3_text"
    rope = _rope(config)
    if faults := _gemma_faults(config) if gemma else _faults(config, rope):
        raise RefusedError(
            "this base has what is not written into .gguf files yet",
            faults,
            "Merge into a folder (veneer merge) and use llama.cpp's convert_hf_to_gguf.py on it.",
        )
    if rope.get("rope_type") == "llama3":
        writer.add_tensor_info("rope_freqs.weight", (head_dim // 2,), np.dtype(np.float32), head_dim // 2 * 4)
    writer.add_type("model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(where.key_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(ids)
    if gemma:
        writer.add_sliding_window(config.sliding_window)
        if rope.get("rope_type") == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rope["factor"]))


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Of the layers without a window, where these have their own."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    return dict(rope.get("full_attention", rope))


def _faults(config: PreTrainedConfig, rope: dict[str, Any]) -> list[str]:
    faults = []
    if rope.get("rope_type", "default") not in ("default", "llama3"):
        faults.append(f"rotary scaling {rope['rope_type']}")
    layers = getattr(config, "layer_types", None) or []
    if getattr(config, "sliding_window", None) and (config.model_type == "mistral" or "sliding_attention" in layers):
        faults.append(f"a sliding window of {config.sliding_window}")
    return faults


def _gemma_faults(config: Any) -> list[str]:
    """What llama.cpp takes for granted of a Gemma 3 and this one has otherwise."""
    faults, rope = [], _rope(config)
    local = dict((config.rope_parameters or {}).get("sliding_attention", {}))
    if rope.get("rope_type", "default") not in ("default", "linear"):
        faults.append(f"rotary scaling {rope['rope_type']}")
    if local.get("rope_type", "default") != "default" or local.get("rope_theta") != _LOCAL_THETA:
        faults.append(f"rotary settings of the layers with a window other than theta {_LOCAL_THETA:g}: {local}")
    wanted = [
        "full_attention" if (n + 1) % _PERIOD == 0 else "sliding_attention" for n in range(len(config.layer_types))
    ]
    if list(config.layer_types) != wanted:
        faults.append(f"layers without a window that are not every {_PERIOD}th one")
    by_width = config.num_hidden_layers == _SCALED_BY_WIDTH
    scale = config.hidden_size // config.num_attention_heads if by_width else config.head_dim
    if config.query_pre_attn_scalar != scale:
        faults.append(f"query_pre_attn_scalar {config.query_pre_attn_scalar}, where llama.cpp takes {scale}")
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "attention_bias"):
        if getattr(config, name, None):
            faults.append(f"{name}: {getattr(config, name)}")
    if config.hidden_activation != "gelu_pytorch_tanh":
        faults.append(f"hidden_activation {config.hidden_activation}, where llama.cpp takes gelu_pytorch_tanh")
    return faults


def rope_factors(config: PreTrainedConfig) -> Iterator[np.ndarray[Any, Any]]:
    """Llama 3's frequency divisors, the first tensor of its files: transformers' formula of rope_type llama3."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = rope["rope_theta"] ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths, original = 2 * np.pi / frequencies, rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    yield (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
