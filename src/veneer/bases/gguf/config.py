"""Builds the config that a .gguf header describes; every hyperparameter is used or refused by name.

Each architecture has a function below. It reads the keys that llama.cpp reads for it and returns
the fields of transformers' config. `Hyperparameters` records the keys; a key that nothing read is a
fault. Constants that llama.cpp has in its code instead of the file (activations, attention scales,
norms of experts' weights) are written here, so no default of transformers decides.

Source: llama.cpp, src/llama-model.cpp (load_hparams) and src/models/*.cpp (load_arch_hparams,
build_arch_graph); conversion/*.py for the keys that its converter writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    model_type, read = ARCHITECTURES[architecture]
    header = Hyperparameters(architecture, fields, tensors)
    values = read(header) if "token_embd.weight" in tensors else {}
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
    config: PreTrainedConfig = CONFIG_MAPPING[model_type](**{**values, **ids})
    return config


def _llama(header: Hyperparameters) -> Fields:
    sizes = read_sizes(header)
    refuse_experts(header)
    return {
        **sizes,
        "head_dim": read_head_dim(header, sizes),
        "rms_norm_eps": read_rms_epsilon(header),
        "rope_parameters": read_rope(header),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }


def _qwen2_attention(header: Hyperparameters, sizes: Fields) -> Fields:
    head_dim = derive_head_dim(header, sizes["hidden_size"], sizes["num_attention_heads"])
    header.expect("rope.dimension_count", head_dim)
    return {
        "rms_norm_eps": read_rms_epsilon(header),
        "rope_parameters": read_rope(header),
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


def _qwen2(header: Hyperparameters) -> Fields:
    sizes = read_sizes(header)
    refuse_experts(header)
    return {**sizes, **_qwen2_attention(header, sizes)}


def _qwen2moe(header: Hyperparameters) -> Fields:
    sizes = read_sizes(header)
    return {
        **sizes,
        **_qwen2_attention(header, sizes),
        **_experts(header, sizes["intermediate_size"]),
        "shared_expert_intermediate_size": header.size(
            "expert_shared_feed_forward_length", sizes["intermediate_size"]
        ),
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


def _qwen3_attention(header: Hyperparameters, sizes: Fields) -> Fields:
    return {
        "head_dim": read_head_dim(header, sizes),
        "rms_norm_eps": read_rms_epsilon(header),
        "rope_parameters": read_rope(header),
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
    }


def _qwen3(header: Hyperparameters) -> Fields:
    sizes = read_sizes(header)
    refuse_experts(header)
    return {**sizes, **_qwen3_attention(header, sizes)}


def _qwen3moe(header: Hyperparameters) -> Fields:
    sizes = read_sizes(header)
    experts = _experts(header, sizes["intermediate_size"])
    return {**sizes, **_qwen3_attention(header, sizes), **experts, "norm_topk_prob": True}


def _gemma(header: Hyperparameters, scaled_by_width: int) -> Fields:
    """Reads the fields that Gemma 2 and 3 share.

    scaled_by_width: number of layers of the one model size whose scores are scaled by width / heads
    """
    sizes = read_sizes(header)
    refuse_experts(header)
    head_dim = read_head_dim(header, sizes)
    by_width = sizes["num_hidden_layers"] == scaled_by_width
    return {
        **sizes,
        "head_dim": head_dim,
        "rms_norm_eps": read_rms_epsilon(header),
        "query_pre_attn_scalar": divide(sizes["hidden_size"], sizes["num_attention_heads"])
        if by_width
        else head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": False,
    }


def _gemma2(header: Hyperparameters) -> Fields:
    fields, rope = _gemma(header, scaled_by_width=46), read_rope(header)
    header.expect("rope.freq_base_swa", rope["rope_theta"])
    return {
        **fields,
        "rope_parameters": rope,
        "sliding_window": header.size("attention.sliding_window", 4096),
        "layer_types": header.layer_types(fields["num_hidden_layers"], 2),
        "attn_logit_softcapping": header.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": header.real("final_logit_softcapping", 30.0),
    }


def _gemma3(header: Hyperparameters) -> Fields:
    """Reads Gemma 3. Without a window no layer is local, and llama.cpp ignores settings of local
    layers."""
    fields, window = _gemma(header, scaled_by_width=62), header.window()
    layers, local = fields["num_hidden_layers"], header.real("rope.freq_base_swa", 10000.0)
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


def _phi3(header: Hyperparameters) -> Fields:
    """Reads Phi-3. It keeps its window: llama.cpp computes without one while its converter writes 0
    for both."""
    sizes = read_sizes(header)
    refuse_experts(header)
    positions = header.size(
        "rope.scaling.original_context_length", sizes["max_position_embeddings"]
    )
    head_dim = derive_head_dim(header, sizes["hidden_size"], sizes["num_attention_heads"])
    return {
        **sizes,
        "original_max_position_embeddings": positions,
        "rms_norm_eps": read_rms_epsilon(header),
        "rope_parameters": read_partial_rope(header, head_dim, scalable=False),
        "hidden_act": "silu",
        "sliding_window": header.window() or None,
    }


def _falcon(header: Hyperparameters) -> Fields:
    """Reads Falcon. The 7B model has one key/value head; later models have groups, and one or two
    norms."""
    sizes = read_sizes(header)
    refuse_experts(header)
    head_dim = derive_head_dim(header, sizes["hidden_size"], sizes["num_attention_heads"])
    header.expect("rope.dimension_count", head_dim)
    key_heads, width = sizes.pop("num_key_value_heads"), sizes.pop("intermediate_size")
    two_norms = "blk.0.attn_norm_2.weight" in header.tensors
    grouped = key_heads > 1 or two_norms
    return {
        **sizes,
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


def _bloom(header: Hyperparameters) -> Fields:
    vocabulary, width = read_vocabulary(header), header.size("embedding_length")
    refuse_experts(header)
    heads = header.size("attention.head_count")
    derive_head_dim(header, width, heads)
    header.expect("attention.head_count_kv", heads)
    header.expect("feed_forward_length", 4 * width)
    header.expect("attention.max_alibi_bias", 8.0)
    return {
        **vocabulary,
        "seq_length": header.size("context_length"),
        "hidden_size": width,
        "n_layer": header.size("block_count"),
        "n_head": heads,
        "layer_norm_epsilon": read_norm_epsilon(header),
        "apply_residual_connection_post_layernorm": False,
    }


def _gpt2(header: Hyperparameters) -> Fields:
    vocabulary, width = read_vocabulary(header), header.size("embedding_length")
    refuse_experts(header)
    heads = header.size("attention.head_count")
    derive_head_dim(header, width, heads)
    header.expect("attention.head_count_kv", heads)
    return {
        **vocabulary,
        "n_positions": header.size("context_length"),
        "n_embd": width,
        "n_inner": header.size("feed_forward_length"),
        "n_layer": header.size("block_count"),
        "n_head": heads,
        "layer_norm_epsilon": read_norm_epsilon(header),
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }


def _stablelm(header: Hyperparameters) -> Fields:
    sizes = read_sizes(header)
    refuse_experts(header)
    parallel = "blk.0.ffn_norm.weight" not in header.tensors
    header.expect("use_parallel_residual", parallel)
    head_dim = derive_head_dim(header, sizes["hidden_size"], sizes["num_attention_heads"])
    return {
        **sizes,
        "layer_norm_eps": read_norm_epsilon(header),
        "rope_parameters": read_partial_rope(header, head_dim),
        "hidden_act": "silu",
        "use_qkv_bias": "blk.0.attn_q.bias" in header.tensors,
        "use_parallel_residual": parallel,
        "qk_layernorm": False,
    }


def _starcoder2(header: Hyperparameters) -> Fields:
    sizes = read_sizes(header)
    refuse_experts(header)
    head_dim = derive_head_dim(header, sizes["hidden_size"], sizes["num_attention_heads"])
    header.expect("rope.dimension_count", head_dim)
    return {
        **sizes,
        "norm_epsilon": read_norm_epsilon(header),
        "rope_parameters": read_rope(header),
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": True,
        "sliding_window": None,
    }


def _nemotron(header: Hyperparameters) -> Fields:
    """Reads Nemotron. Its converter also writes the epsilon of layer norms under the key of RMS
    norms."""
    sizes, epsilon = read_sizes(header), read_norm_epsilon(header)
    refuse_experts(header)
    header.expect("attention.layer_norm_rms_epsilon", epsilon)
    head_dim = derive_head_dim(header, sizes["hidden_size"], sizes["num_attention_heads"])
    return {
        **sizes,
        "norm_eps": epsilon,
        "rope_parameters": read_partial_rope(header, head_dim),
        "hidden_act": "relu2",
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }


ARCHITECTURES: Mapping[str, tuple[str, Callable[[Hyperparameters], Fields]]] = {
    "llama": ("llama", _llama),
    "qwen2": ("qwen2", _qwen2),
    "qwen2moe": ("qwen2_moe", _qwen2moe),
    "qwen3": ("qwen3", _qwen3),
    "qwen3moe": ("qwen3_moe", _qwen3moe),
    "gemma2": ("gemma2", _gemma2),
    "gemma3": ("gemma3_text", _gemma3),
    "phi3": ("phi3", _phi3),
    "falcon": ("falcon", _falcon),
    "bloom": ("bloom", _bloom),
    "gpt2": ("gpt2", _gpt2),
    "stablelm": ("stablelm", _stablelm),
    "starcoder2": ("starcoder2", _starcoder2),
    "nemotron": ("nemotron", _nemotron),
}
"""general.architecture -> transformers' model_type, and the function that reads the header."""
