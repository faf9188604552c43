"""Tiny .gguf files as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from tests.support.tiny import CHATML, VOCAB_SIZE, tiny_model, tiny_tokenizer
from veneer.kernels.packed.gguf import FORMATS, Kind

LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2moe": ("qwen2_moe", {"rms_norm_eps": 1e-5, "intermediate_size": 56}),
    "qwen3moe": (
        "qwen3_moe",
        {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}},
    ),
    "gemma2": ("gemma2", {}),
    "gemma3": (
        "gemma3",
        {"num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"]},
    ),
    "phi3": (
        "phi3",
        {
            "rope_parameters": {"rope_theta": 5e4, "partial_rotary_factor": 0.75},
            "sliding_window": 9,
        },
    ),
    "falcon": (
        "falcon",
        {"num_kv_heads": 1, "ffn_hidden_size": 128, "max_position_embeddings": 2048},
    ),
    "falcon of groups": (
        "falcon",
        {
            "num_kv_heads": 2,
            "ffn_hidden_size": 128,
            "max_position_embeddings": 2048,
            "new_decoder_architecture": True,
            "multi_query": False,
            "num_ln_in_parallel_attn": 2,
        },
    ),
    "bloom": ("bloom", {"layer_norm_epsilon": 1e-4}),
    "gpt2": ("gpt2", {"n_positions": 128, "n_inner": 128, "layer_norm_epsilon": 1e-4}),
    "stablelm": (
        "stablelm",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "starcoder2": (
        "starcoder2",
        {"rope_parameters": {"rope_theta": 999999.4375, "rope_type": "default"}},
    ),
    "nemotron": ("nemotron", {"norm_eps": 3e-4}),
}
"""Architecture (its first word) -> family of tests/support/tiny.py and settings that no default
has."""


def tiny(family: str, **overrides: Any) -> PreTrainedModel:
    # 1e-5 is no single-precision number, and rows of 64 can be stored in blocks of 32.
    return tiny_model(family, **{"rms_norm_eps": 1e-5, "intermediate_size": 64, **overrides})


def with_merges(folder: Path) -> Path:
    """The tiny tokenizer with two merges: no real one has none, and readers of .gguf files count on
    that."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    vocab = stored["model"]["vocab"]
    vocab["th"], vocab["\u0120a"] = (
        vocab.pop("\u00c0"),
        vocab.pop("\u00c1"),
    )  # bytes that no UTF-8 text has
    stored["model"]["merges"] = [["t", "h"], ["\u0120", "a"]]
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    return folder


MOST_LAYERS = 8
"""Layers that a tiny model has at most."""


def header_of(architecture: str, config: Any) -> dict[str, Any]:
    """The hyperparameters that llama.cpp's converter writes for a model of this config.

    Source: set_gguf_parameters in https://github.com/ggml-org/llama.cpp/tree/master/conversion.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    full = rope.get("full_attention", rope)
    heads, width = config.num_attention_heads, config.hidden_size
    header: dict[str, Any] = {
        "context_length": getattr(config, "max_position_embeddings", width),
        "embedding_length": width,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", 4 * width),
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(
            config, "num_kv_heads", getattr(config, "num_key_value_heads", heads)
        ),
        "rope.freq_base": full.get("rope_theta"),
        "attention.layer_norm_rms_epsilon": getattr(
            config, "rms_norm_eps", getattr(config, "norm_eps", None)
        ),
        "attention.layer_norm_epsilon": next(
            (
                v
                for k, v in config.to_dict().items()
                if k in ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")
            ),
            getattr(config, "norm_eps", None),
        ),
        "attention.key_length": getattr(config, "head_dim", None),
        "attention.value_length": getattr(config, "head_dim", None),
        "expert_count": getattr(config, "num_experts", None),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
        "expert_shared_feed_forward_length": getattr(
            config, "shared_expert_intermediate_size", None
        ),
    }
    own: dict[str, dict[str, Any]] = {
        "llama": {
            "rope.dimension_count": config.to_dict().get("head_dim"),
            "vocab_size": config.vocab_size,
        },
        "gemma2": {
            "attn_logit_softcapping": config.to_dict().get("attn_logit_softcapping"),
            "final_logit_softcapping": config.to_dict().get("final_logit_softcapping"),
            "attention.sliding_window": config.to_dict().get("sliding_window"),
            "rope.freq_base": None,
        },
        "gemma3": {
            "attention.sliding_window": config.to_dict().get("sliding_window"),
            "rope.freq_base_swa": rope.get("sliding_attention", {}).get("rope_theta"),
        },
        "phi3": {
            "rope.scaling.original_context_length": config.to_dict().get(
                "original_max_position_embeddings"
            ),
            "attention.sliding_window": config.to_dict().get("sliding_window") or 0,
        },
        "falcon": {"tensor_data_layout": "jploski", "rope.freq_base": None},
        "stablelm": {"use_parallel_residual": False, "rope.freq_base": None},
        "nemotron": {"vocab_size": config.vocab_size, "rope.scaling.type": "none"},
    }
    if (share := full.get("partial_rotary_factor", 1.0)) != 1.0:
        header["rope.dimension_count"] = int(share * width / heads)
    return {
        key: value
        for key, value in {**header, **own.get(architecture, {})}.items()
        if value is not None
    }


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds a key as the type that llama.cpp's converter gives such a value."""
    kinds = {
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.UINT32,
        float: gguf.GGUFValueType.FLOAT32,
    }
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_key_value(key, value, kinds.get(type(value), gguf.GGUFValueType.STRING))


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
    pre: str = "gpt-2",
    eos: str = "<|endoftext|>",
    extra: dict[str, Any] | None = None,
    leave_out: str = "none",
) -> Path:
    """Writes the file as llama.cpp's converter does, the vocabulary padded with names.

    kinds: by a part of a tensor's name, another type than `kind`. extra: keys that are added or
    written otherwise.
    """
    config, tokenizer = model.config, tiny_tokenizer()
    writer = gguf.GGUFWriter(path, architecture)
    header = {
        f"{architecture}.{key}": value for key, value in header_of(architecture, config).items()
    }
    for key, value in {**header, **(extra or {})}.items():
        add_value(writer, key, value)
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    vocabulary |= {
        259: "Ġt",
        260: "Ġ1",
        261: "qz",
    }  # by a merge; by a merge of space and digit; by none
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([vocabulary.get(i, f"[PAD{i}]") for i in range(VOCAB_SIZE)])
    special = set(tokenizer.added_tokens_decoder)
    writer.add_token_types(
        [3 if i in special else 1 if i in vocabulary else 5 for i in range(VOCAB_SIZE)]
    )
    writer.add_token_merges(["Ġ t", "Ġ 1"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids(eos))
    writer.add_chat_template(CHATML)
    for name, tensor in model.state_dict().items():
        if (name == "lm_head.weight" and config.tie_word_embeddings) or leave_out in name:
            continue
        for stored_name, values in stored_tensors(architecture, model, name, tensor):
            stored = next(
                (other for part, other in (kinds or {}).items() if part in stored_name), kind
            )
            stored = stored if values.ndim > 1 else gguf.GGMLQuantizationType.F32
            if stored.name.endswith("_K"):  # the gguf package reads these but does not make them
                stored = stored if name.endswith("proj.weight") else gguf.GGMLQuantizationType.F16
            if stored.name.endswith("_K"):
                data = random_blocks(
                    stored.name, len(values), values.shape[1], seed=len(name)
                ).numpy()  # type: ignore[arg-type]
            else:
                data = gguf.quantize(values, stored)
            writer.add_tensor(stored_name, data, raw_dtype=stored)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, config.head_dim))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored_tensors(
    architecture: str, model: PreTrainedModel, name: str, tensor: torch.Tensor
) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """One tensor of the model as the file has it: name and values, or two of each.

    Source: modify_tensors in https://github.com/ggml-org/llama.cpp/tree/master/conversion.
    """
    config: Any = model.config
    number = next(
        number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture
    )
    table = gguf.get_tensor_name_map(
        number, MOST_LAYERS
    )  # a config may announce any number of them
    if name.endswith("experts.gate_up_proj"):
        layer, (gate, up) = name.split(".")[2], tensor.chunk(2, dim=1)
        return [
            (f"blk.{layer}.ffn_{part}_exps.weight", values.contiguous().numpy())
            for part, values in (("gate", gate), ("up", up))
        ]
    stem, _, last = (
        name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "weight")
    )
    own = table.get_name(stem) or table.get_name(stem.removeprefix("transformer."))
    assert own is not None, name
    heads, rows = config.num_attention_heads, tensor.shape[0]
    if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
        count = heads if stem.endswith("q_proj") else config.num_key_value_heads
        tensor = (
            tensor.reshape(count, 2, rows // count // 2, -1).transpose(1, 2).reshape(tensor.shape)
        )
    elif architecture in ("gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
        tensor = tensor + 1
    elif architecture == "gpt2" and name.endswith(
        (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    ):
        tensor = tensor.T
    elif architecture == "bloom" and "query_key_value" in name:
        parts = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
        tensor = torch.cat(
            [parts[:, part].reshape(rows // 3, *tensor.shape[1:]) for part in range(3)]
        )
    elif architecture == "falcon" and "query_key_value" in name:
        groups, size = config.num_kv_heads, config.hidden_size // heads
        parts = tensor.view(groups, heads // groups + 2, size, config.hidden_size)
        tensor = torch.cat(
            [
                part.reshape(-1, config.hidden_size)
                for part in (parts[:, :-2], parts[:, -2], parts[:, -1])
            ]
        )
    elif name.endswith("shared_expert_gate.weight"):
        tensor = tensor[0]
    return [(f"{own}.{last}", tensor.contiguous().numpy())]


def llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter writes: the loop of its convert_hf_to_gguf.py (LlamaModel)."""
    factors = []
    for frequency in 1.0 / (
        rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    ):
        wavelength = 2 * torch.pi / frequency
        old = rope["original_max_position_embeddings"]
        if wavelength < old / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > old / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            smooth = (old / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def random_blocks(
    kind: Kind, rows: int, columns: int, seed: int = 0, scale: float = 0.02
) -> torch.Tensor:
    """uint8 (rows, bytes of a row): any codes; scales usual, tiny, zero and negative, all
    finite."""
    layout, rng = FORMATS[kind], np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * columns // layout.size, layout.bytes), dtype=np.uint8)
    odd = np.array([6e-8, -6e-8, 0.0, -0.0, 1e-5, 2 * scale], np.float16)
    for number, at in enumerate(layout.scales):
        scales = (rng.standard_normal(len(blocks)) * scale).astype(np.float16)
        scales[number::7] = np.resize(odd, len(scales[number::7]))
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(blocks.reshape(rows, -1))
