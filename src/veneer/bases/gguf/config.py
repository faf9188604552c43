"""Builds the config that a .gguf header describes; every hyperparameter is used or refused by name.

Each architecture has a function below. It reads the keys that llama.cpp reads for it and returns
the fields of transformers' config. `Hyperparameters` records the keys; a key that nothing read is a
fault. Constants that llama.cpp has in its code instead of the file (activations, attention scales,
norms of experts' weights) are written here, so no default of transformers decides.

Source: llama.cpp, src/llama-model.cpp (load_hparams) and src/models/*.cpp (load_arch_hparams,
build_arch_graph); conversion/*.py for the keys that its converter writes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from transformers import CONFIG_MAPPING, PreTrainedConfig

from veneer.bases.gguf.fields import (
    Fields,
    derive_head_dim,
    divide,
    read_head_dim,
    read_norm_epsilon,
    read_partial_rope,
    read_rms_epsilon,
    read_rope,
    read_sizes,
    read_vocabulary,
    refuse_experts,
)
from veneer.bases.gguf.header import Hyperparameters, Shapes
from veneer.bases.gguf.rope import llama3_scaling
from veneer.errors import SourceError

MOST_FAULTS = 20
OTHER_SOURCE = "Choose the model's safetensors version (a hub id or a folder)."
_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}


def described_config(
    architecture: str,
    fields: Mapping[str, Any],
    tensors: Shapes,
    rope_factors: np.ndarray[Any, Any] | None = None,
) -> PreTrainedConfig:
    """Builds the config of the header's model. rope_factors: divisors of Llama 3's rotary
    frequencies

    Raises SourceError with every key that is missing, unknown or has a value that transformers'
    model cannot have.
    """
    family = ARCHITECTURES[architecture]
    header = Hyperparameters(architecture, fields, tensors)
    values = family.fields(header) if "token_embd.weight" in tensors else {}
    if not values:
        header.faults.append("token_embd.weight is not in the file")
    header.refuse_unread()
    if rope_factors is not None and values:
        scaling = (
            llama3_scaling(rope_factors, values["rope_parameters"])
            if architecture == "llama"
            else None
        )
        if scaling is None:
            header.faults.append(
                "rope_freqs.weight: these rotary factors are not those of a Llama 3 model"
            )
        else:
            values["rope_parameters"] |= scaling
    if header.faults:
        raise SourceError(
            f"the header describes a {architecture} model that cannot be built faithfully",
            header.faults[:MOST_FAULTS],
            OTHER_SOURCE,
        )
    tokens = {name: fields.get(f"tokenizer.ggml.{key}") for name, key in _TOKENS.items()}
    rows = tensors["token_embd.weight"][0]
    ids = {
        name: id if isinstance(id, int) and 0 <= id < rows else None for name, id in tokens.items()
    }
    return CONFIG_MAPPING[family.model_type](**{**values, **ids})


@dataclass(frozen=True)
class Family:
    """How the header of an architecture is read.

    model_type   transformers' name for it
    read         (header, sizes) -> further fields of the config; may remove sizes
    has_experts  its experts are read; otherwise a header with experts is refused
    read_sizes   reads the sizes, under transformers' names
    """

    model_type: str
    read: Callable[[Hyperparameters, Fields], Fields]
    has_experts: bool = False
    read_sizes: Callable[[Hyperparameters], Fields] = read_sizes

    def fields(self, header: Hyperparameters) -> Fields:
        sizes = self.read_sizes(header)
        if not self.has_experts:
            refuse_experts(header)
        own = self.read(header, sizes)
        return sizes | own


def _rms_and_silu(header: Hyperparameters) -> Fields:
    return {
        "rms_norm_eps": read_rms_epsilon(header),
        "rope_parameters": read_rope(header),
        "hidden_act": "silu",
    }


def _llama(header: Hyperparameters, sizes: Fields) -> Fields:
    return {
        **_rms_and_silu(header),
        "head_dim": read_head_dim(header, sizes),
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }


def _qwen2(header: Hyperparameters, sizes: Fields) -> Fields:
    derive_head_dim(header, sizes, rotated=True)
    return {**_rms_and_silu(header), "use_sliding_window": False}


def _qwen2moe(header: Hyperparameters, sizes: Fields) -> Fields:
    width = sizes["intermediate_size"]
    return {
        **_qwen2(header, sizes),
        **_experts(header, width),
        "shared_expert_intermediate_size": header.size("expert_shared_feed_forward_length", width),
        "norm_topk_prob": False,
        "qkv_bias": "blk.0.attn_q.bias" in header.tensors,
    }


def _experts(header: Hyperparameters, width: int) -> Fields:
    """Reads the settings of experts, which every layer has.

    Without a width of its own, an expert has a share of the layer's width.
    """
    chosen = header.size("expert_used_count")
    return {
        "num_experts": header.size("expert_count"),
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": header.size("expert_feed_forward_length", divide(width, chosen)),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen3(header: Hyperparameters, sizes: Fields) -> Fields:
    return {
        **_rms_and_silu(header),
        "head_dim": read_head_dim(header, sizes),
        "attention_bias": False,
        "use_sliding_window": False,
    }


def _qwen3moe(header: Hyperparameters, sizes: Fields) -> Fields:
    experts = _experts(header, sizes["intermediate_size"])
    return {**_qwen3(header, sizes), **experts, "norm_topk_prob": True}


def _gemma(header: Hyperparameters, sizes: Fields, scaled_by_width: int) -> Fields:
    """Reads the fields that Gemma 2 and 3 share.

    scaled_by_width: number of layers of the one model size whose scores are scaled by width / heads
    """
    head_dim = read_head_dim(header, sizes)
    by_width = sizes["num_hidden_layers"] == scaled_by_width
    return {
        "head_dim": head_dim,
        "rms_norm_eps": read_rms_epsilon(header),
        "query_pre_attn_scalar": divide(sizes["hidden_size"], sizes["num_attention_heads"])
        if by_width
        else head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": False,
    }


def _gemma2(header: Hyperparameters, sizes: Fields) -> Fields:
    fields, rope = _gemma(header, sizes, scaled_by_width=46), read_rope(header)
    header.expect("rope.freq_base_swa", rope["rope_theta"])
    return {
        **fields,
        "rope_parameters": rope,
        "sliding_window": header.size("attention.sliding_window", 4096),
        "layer_types": header.layer_types(sizes["num_hidden_layers"], 2),
        "attn_logit_softcapping": header.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": header.real("final_logit_softcapping", 30.0),
    }


def _gemma3(header: Hyperparameters, sizes: Fields) -> Fields:
    """Reads Gemma 3. Without a window no layer is local, and llama.cpp ignores settings of local
    layers."""
    fields, window = _gemma(header, sizes, scaled_by_width=62), header.window()
    layers, local = sizes["num_hidden_layers"], header.real("rope.freq_base_swa", 10000.0)
    return {
        **fields,
        "rope_parameters": {
            "full_attention": read_rope(header),
            "sliding_attention": {"rope_theta": local, "rope_type": "default"},
        },
        "sliding_window": window or 4096,
        "layer_types": header.layer_types(layers, 6) if window else ["full_attention"] * layers,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": header.real("final_logit_softcapping", 0.0) or None,
    }


def _phi3(header: Hyperparameters, sizes: Fields) -> Fields:
    """Reads Phi-3. It keeps its window: llama.cpp computes without one while its converter writes 0
    for both."""
    positions = header.size(
        "rope.scaling.original_context_length", sizes["max_position_embeddings"]
    )
    head_dim = derive_head_dim(header, sizes)
    return {
        "original_max_position_embeddings": positions,
        "rms_norm_eps": read_rms_epsilon(header),
        "rope_parameters": read_partial_rope(header, head_dim, scalable=False),
        "hidden_act": "silu",
        "sliding_window": header.window() or None,
    }


def _falcon(header: Hyperparameters, sizes: Fields) -> Fields:
    """Reads Falcon. The 7B model has one key/value head; later models have groups, and one or two
    norms."""
    derive_head_dim(header, sizes, rotated=True)
    key_heads, width = sizes.pop("num_key_value_heads"), sizes.pop("intermediate_size")
    two_norms = "blk.0.attn_norm_2.weight" in header.tensors
    grouped = key_heads > 1 or two_norms
    return {
        "ffn_hidden_size": width,
        "num_kv_heads": key_heads,
        "multi_query": not grouped,
        "new_decoder_architecture": grouped,
        "num_ln_in_parallel_attn": (2 if two_norms else 1) if grouped else None,
        "parallel_attn": True,
        "bias": "blk.0.attn_qkv.bias" in header.tensors,
        "alibi": False,
        "activation": "gelu",
        "layer_norm_epsilon": read_norm_epsilon(header),
        "rope_parameters": read_rope(header),
    }


def _by_position_sizes(width_name: str, header: Hyperparameters) -> Fields:
    """Reads the sizes of BLOOM and GPT-2, which have one key head for each query head."""
    sizes = {**read_vocabulary(header), width_name: header.size("embedding_length")}
    heads = header.size("attention.head_count")
    derive_head_dim(header, {"hidden_size": sizes[width_name], "num_attention_heads": heads})
    header.expect("attention.head_count_kv", heads)
    return {
        **sizes,
        "n_layer": header.size("block_count"),
        "n_head": heads,
        "layer_norm_epsilon": read_norm_epsilon(header),
    }


def _bloom(header: Hyperparameters, sizes: Fields) -> Fields:
    header.expect("feed_forward_length", 4 * sizes["hidden_size"])
    header.expect("attention.max_alibi_bias", 8.0)
    return {
        "seq_length": header.size("context_length"),
        "apply_residual_connection_post_layernorm": False,
    }


def _gpt2(header: Hyperparameters, sizes: Fields) -> Fields:
    return {
        "n_positions": header.size("context_length"),
        "n_inner": header.size("feed_forward_length"),
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }


def _stablelm(header: Hyperparameters, sizes: Fields) -> Fields:
    parallel = "blk.0.ffn_norm.weight" not in header.tensors
    header.expect("use_parallel_residual", parallel)
    head_dim = derive_head_dim(header, sizes)
    return {
        "layer_norm_eps": read_norm_epsilon(header),
        "rope_parameters": read_partial_rope(header, head_dim),
        "hidden_act": "silu",
        "use_qkv_bias": "blk.0.attn_q.bias" in header.tensors,
        "use_parallel_residual": parallel,
        "qk_layernorm": False,
    }


def _starcoder2(header: Hyperparameters, sizes: Fields) -> Fields:
    derive_head_dim(header, sizes, rotated=True)
    return {
        "norm_epsilon": read_norm_epsilon(header),
        "rope_parameters": read_rope(header),
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": True,
        "sliding_window": None,
    }


def _nemotron(header: Hyperparameters, sizes: Fields) -> Fields:
    """Reads Nemotron. Its converter also writes the epsilon of layer norms under the key of RMS
    norms."""
    epsilon = read_norm_epsilon(header)
    header.expect("attention.layer_norm_rms_epsilon", epsilon)
    head_dim = derive_head_dim(header, sizes)
    return {
        "norm_eps": epsilon,
        "rope_parameters": read_partial_rope(header, head_dim),
        "hidden_act": "relu2",
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }


ARCHITECTURES: Mapping[str, Family] = {
    "llama": Family("llama", _llama),
    "qwen2": Family("qwen2", _qwen2),
    "qwen2moe": Family("qwen2_moe", _qwen2moe, has_experts=True),
    "qwen3": Family("qwen3", _qwen3),
    "qwen3moe": Family("qwen3_moe", _qwen3moe, has_experts=True),
    "gemma2": Family("gemma2", _gemma2),
    "gemma3": Family("gemma3_text", _gemma3),
    "phi3": Family("phi3", _phi3),
    "falcon": Family("falcon", _falcon),
    "bloom": Family("bloom", _bloom, read_sizes=partial(_by_position_sizes, "hidden_size")),
    "gpt2": Family("gpt2", _gpt2, read_sizes=partial(_by_position_sizes, "n_embd")),
    "stablelm": Family("stablelm", _stablelm),
    "starcoder2": Family("starcoder2", _starcoder2),
    "nemotron": Family("nemotron", _nemotron),
}
"""The families by their general.architecture."""
