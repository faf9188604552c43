"""Tiny .gguf files as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from tests.tiny import CHATML, VOCAB_SIZE, tiny_model, tiny_tokenizer
from veneer.kernels.gguf import FORMATS, Kind

LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny(family: str, **overrides: Any) -> PreTrainedModel:
    # 1e-5 is no single-precision number, and rows of 64 can be stored in blocks of 32.
    return tiny_model(family, **{"rms_norm_eps": 1e-5, "intermediate_size": 64, **overrides})


def with_merges(folder: Path) -> Path:
    """The tiny tokenizer with two merges: no real one has none, and readers of .gguf files count on that."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    vocab = stored["model"]["vocab"]
    vocab["th"], vocab["\u0120a"] = vocab.pop("\u00c0"), vocab.pop("\u00c1")  # bytes that no UTF-8 text has
    stored["model"]["merges"] = [["t", "h"], ["\u0120", "a"]]
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    return folder


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    pre: str = "gpt-2",
    eos: str = "<|endoftext|>",
    extra: dict[str, Any] | None = None,
    leave_out: str = "none",
) -> Path:
    """As llama.cpp's converter writes it: q and k rows of llama permuted, the vocabulary padded with names."""
    config, tokenizer = model.config, tiny_tokenizer()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if architecture == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    vocabulary |= {259: "Ġt", 260: "Ġ1", 261: "qz"}  # by a merge; by a merge of space and digit; by none
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([vocabulary.get(i, f"[PAD{i}]") for i in range(VOCAB_SIZE)])
    special = set(tokenizer.added_tokens_decoder)
    writer.add_token_types([3 if i in special else 1 if i in vocabulary else 5 for i in range(VOCAB_SIZE)])
    writer.add_token_merges(["Ġ t", "Ġ 1"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids(eos))
    writer.add_chat_template(CHATML)
    for key, value in (extra or {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint16(key, value)
    for name, tensor in model.state_dict().items():
        if (name == "lm_head.weight" and config.tie_word_embeddings) or leave_out in name:
            continue
        values = tensor.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        stored = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        if stored.name.endswith("_K"):  # the gguf package reads these but does not make them
            stored = stored if name.endswith("proj.weight") else gguf.GGMLQuantizationType.F16
        if stored.name.endswith("_K"):
            data = random_blocks(stored.name, len(values), values.shape[1], seed=len(name)).numpy()  # type: ignore[arg-type]
        else:
            data = gguf.quantize(values, stored)
        writer.add_tensor(gguf_name(name), data, raw_dtype=stored)
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config.rope_parameters, config.head_dim))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    parts = name.removeprefix("model.layers.").split(".", 1)
    module, suffix = name.rsplit(".", 1)
    if parts[0].isdigit():
        return f"blk.{parts[0]}.{_NAMES[parts[1].rsplit('.', 1)[0]]}.{suffix}"
    return f"{_NAMES[module]}.{suffix}"


def llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter writes: the loop of its convert_hf_to_gguf.py (LlamaModel)."""
    factors = []
    for frequency in 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)):
        wavelength = 2 * torch.pi / frequency
        old = rope["original_max_position_embeddings"]
        if wavelength < old / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > old / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            smooth = (old / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def random_blocks(kind: Kind, rows: int, columns: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    """uint8 (rows, bytes of a row): any codes; scales usual, tiny, zero and negative, all finite."""
    layout, rng = FORMATS[kind], np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * columns // layout.size, layout.bytes), dtype=np.uint8)
    odd = np.array([6e-8, -6e-8, 0.0, -0.0, 1e-5, 2 * scale], np.float16)
    for number, at in enumerate(layout.scales):
        scales = (rng.standard_normal(len(blocks)) * scale).astype(np.float16)
        scales[number::7] = np.resize(odd, len(scales[number::7]))
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(blocks.reshape(rows, -1))
