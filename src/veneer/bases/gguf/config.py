"""The config that a .gguf header describes. Every hyperparameter of the header is used or refused
by name.

Each architecture has a function below. It reads the keys that llama.cpp reads for that architecture
and returns the fields of transformers' config. `Hyperparameters` notes what was read; a key that
nothing read is a fault. Whatever llama.cpp computes with but does not read from the file
(activations, attention scales, norms of experts' weights) is written here as llama.cpp has it, so
no default of transformers decides.

Source: llama.cpp, src/llama-model.cpp (load_hparams) and src/models/*.cpp (load_arch_hparams,
build_arch_graph); conversion/*.py for the keys that its converter writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from transformers import CONFIG_MAPPING, PreTrainedConfig

from veneer.bases.gguf.header import Hyperparameters, Shapes
from veneer.bases.gguf.rope import llama3_scaling
from veneer.errors import SourceError

MOST_FAULTS = 20
OTHER_SOURCE = "Take the model's safetensors version (a hub id or a folder)."
_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}

Fields = dict[str, Any]


def described_config(
    architecture: str,
    fields: Mapping[str, Any],
    tensors: Shapes,
    rope_factors: np.ndarray[Any, Any] | None = None,
) -> PreTrainedConfig:
    """The config of the header's model. rope_factors: what Llama 3's rotary frequencies are divided
    by.

    Raises SourceError with every key that is missing, unknown or of a value that transformers'
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
                "rope_freqs.weight: these rotary factors are not the scaling of a Llama 3"
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


def _sizes(header: Hyperparameters) -> Fields:
    """The sizes that most families call by the same names."""
    heads = header.size("attention.head_count")
    return {
        **_vocabulary(header),
        "max_position_embeddings": header.size("context_length"),
        "hidden_size": header.size("embedding_length"),
        "intermediate_size": header.size("feed_forward_length"),
        "num_hidden_layers": header.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.size("attention.head_count_kv", heads),
    }


def _vocabulary(header: Hyperparameters) -> Fields:
    rows = header.tensors["token_embd.weight"][0]
    header.expect("vocab_size", rows)
    header.expect("attention.causal", True)
    header.expect("pooling_type", 0)
    header.expect("nextn_predict_layers", 0)
    return {"vocab_size": rows, "tie_word_embeddings": "output.weight" not in header.tensors}


def _no_experts(header: Hyperparameters) -> None:
    header.expect("expert_count", 0)
    header.expect("expert_used_count", 0)


def _own_head_dim(header: Hyperparameters, sizes: Fields) -> int:
    """The size of a head where the family has a setting for it. All of a head is rotated."""
    head_dim = header.size(
        "attention.key_length", _share(sizes["hidden_size"], sizes["num_attention_heads"])
    )
    header.expect("attention.value_length", head_dim)
    header.expect("rope.dimension_count", head_dim)
    return head_dim


def _head_dim(header: Hyperparameters, hidden_size: int, heads: int) -> int:
    """The size of a head where width and heads give it."""
    head_dim = _share(hidden_size, heads)
    header.expect("attention.key_length", head_dim)
    header.expect("attention.value_length", head_dim)
    return head_dim


def _share(whole: int, parts: int) -> int:
    """What each part has of a whole, at least 1: a header without these sizes is refused later,
    with all its faults."""
    return max(whole // parts, 1)


def _rope(header: Hyperparameters, scalable: bool = True) -> Fields:
    """Rotary settings. A scaling that is linear is llama.cpp's default, and 0 or no factor means
    1."""
    kind = header.choice("rope.scaling.type", "linear", ("none", "linear"))
    rope: Fields = {"rope_theta": header.real("rope.freq_base", 10000.0), "rope_type": "default"}
    for key in (
        "rope.scale_linear",
        "rope.scaling.factor",
    ):  # the first is the older name; the second one wins
        factor = header.real(key, 0.0)
        if factor in (0.0, 1.0):
            continue
        if kind == "none" or not scalable:
            header.refuse(key, factor, "nothing is scaled in this model")
        rope |= {"rope_type": "linear", "factor": factor}
    return rope


def _partial_rope(header: Hyperparameters, head_dim: int, scalable: bool = True) -> Fields:
    """Rotary settings of families that rotate a part of each head."""
    rotated = header.size("rope.dimension_count", head_dim)
    share = rotated / head_dim
    if rotated > head_dim or int(head_dim * share) != rotated:
        header.refuse("rope.dimension_count", rotated, f"a head has {head_dim}")
    return {**_rope(header, scalable), "partial_rotary_factor": share}


def _rms_norm(header: Hyperparameters) -> float:
    return header.real("attention.layer_norm_rms_epsilon")


def _layer_norm(header: Hyperparameters) -> float:
    return header.real("attention.layer_norm_epsilon")


def _llama(header: Hyperparameters) -> Fields:
    sizes = _sizes(header)
    _no_experts(header)
    return {
        **sizes,
        "head_dim": _own_head_dim(header, sizes),
        "rms_norm_eps": _rms_norm(header),
        "rope_parameters": _rope(header),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }


def _qwen2_attention(header: Hyperparameters, sizes: Fields) -> Fields:
    head_dim = _head_dim(header, sizes["hidden_size"], sizes["num_attention_heads"])
    header.expect("rope.dimension_count", head_dim)
    return {
        "rms_norm_eps": _rms_norm(header),
        "rope_parameters": _rope(header),
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


def _qwen2(header: Hyperparameters) -> Fields:
    sizes = _sizes(header)
    _no_experts(header)
    return {**sizes, **_qwen2_attention(header, sizes)}


def _qwen2moe(header: Hyperparameters) -> Fields:
    sizes = _sizes(header)
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
    """Every layer has experts; their width is a share of the layer's where the header names
    none."""
    chosen = header.size("expert_used_count")
    return {
        "num_experts": header.size("expert_count"),
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": header.size("expert_feed_forward_length", _share(width, chosen)),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen3_attention(header: Hyperparameters, sizes: Fields) -> Fields:
    return {
        "head_dim": _own_head_dim(header, sizes),
        "rms_norm_eps": _rms_norm(header),
        "rope_parameters": _rope(header),
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
    }


def _qwen3(header: Hyperparameters) -> Fields:
    sizes = _sizes(header)
    _no_experts(header)
    return {**sizes, **_qwen3_attention(header, sizes)}


def _qwen3moe(header: Hyperparameters) -> Fields:
    sizes = _sizes(header)
    experts = _experts(header, sizes["intermediate_size"])
    return {**sizes, **_qwen3_attention(header, sizes), **experts, "norm_topk_prob": True}


def _gemma(header: Hyperparameters, scaled_by_width: int) -> Fields:
    """What Gemma 2 and 3 share. Of one size of each, told by its layers, scores are scaled by width
    / heads."""
    sizes = _sizes(header)
    _no_experts(header)
    head_dim = _own_head_dim(header, sizes)
    by_width = sizes["num_hidden_layers"] == scaled_by_width
    return {
        **sizes,
        "head_dim": head_dim,
        "rms_norm_eps": _rms_norm(header),
        "query_pre_attn_scalar": _share(sizes["hidden_size"], sizes["num_attention_heads"])
        if by_width
        else head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": False,
    }


def _gemma2(header: Hyperparameters) -> Fields:
    fields, rope = _gemma(header, scaled_by_width=46), _rope(header)
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
    """Without a window no layer is local, and llama.cpp does not look at what local layers would
    have."""
    fields, window = _gemma(header, scaled_by_width=62), header.window()
    layers, local = fields["num_hidden_layers"], header.real("rope.freq_base_swa", 10000.0)
    return {
        **fields,
        "rope_parameters": {
            "full_attention": _rope(header),
            "sliding_attention": {"rope_theta": local, "rope_type": "default"},
        },
        "sliding_window": window or 4096,
        "layer_types": header.layer_types(layers, 6) if window else ["full_attention"] * layers,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": header.real("final_logit_softcapping", 0.0) or None,
    }


def _phi3(header: Hyperparameters) -> Fields:
    """The window is the model's own: llama.cpp computes without it as long as its converter writes
    0 for both."""
    sizes = _sizes(header)
    _no_experts(header)
    positions = header.size(
        "rope.scaling.original_context_length", sizes["max_position_embeddings"]
    )
    head_dim = _head_dim(header, sizes["hidden_size"], sizes["num_attention_heads"])
    return {
        **sizes,
        "original_max_position_embeddings": positions,
        "rms_norm_eps": _rms_norm(header),
        "rope_parameters": _partial_rope(header, head_dim, scalable=False),
        "hidden_act": "silu",
        "sliding_window": header.window() or None,
    }


def _falcon(header: Hyperparameters) -> Fields:
    """Falcon 7B has one key/value head; later ones have groups, and two norms in front of a layer
    or one."""
    sizes = _sizes(header)
    _no_experts(header)
    head_dim = _head_dim(header, sizes["hidden_size"], sizes["num_attention_heads"])
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
        "layer_norm_epsilon": _layer_norm(header),
        "rope_parameters": _rope(header),
    }


def _bloom(header: Hyperparameters) -> Fields:
    vocabulary, width = _vocabulary(header), header.size("embedding_length")
    _no_experts(header)
    heads = header.size("attention.head_count")
    _head_dim(header, width, heads)
    header.expect("attention.head_count_kv", heads)
    header.expect("feed_forward_length", 4 * width)
    header.expect("attention.max_alibi_bias", 8.0)
    return {
        **vocabulary,
        "seq_length": header.size("context_length"),
        "hidden_size": width,
        "n_layer": header.size("block_count"),
        "n_head": heads,
        "layer_norm_epsilon": _layer_norm(header),
        "apply_residual_connection_post_layernorm": False,
    }


def _gpt2(header: Hyperparameters) -> Fields:
    vocabulary, width = _vocabulary(header), header.size("embedding_length")
    _no_experts(header)
    heads = header.size("attention.head_count")
    _head_dim(header, width, heads)
    header.expect("attention.head_count_kv", heads)
    return {
        **vocabulary,
        "n_positions": header.size("context_length"),
        "n_embd": width,
        "n_inner": header.size("feed_forward_length"),
        "n_layer": header.size("block_count"),
        "n_head": heads,
        "layer_norm_epsilon": _layer_norm(header),
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }


def _stablelm(header: Hyperparameters) -> Fields:
    sizes = _sizes(header)
    _no_experts(header)
    parallel = "blk.0.ffn_norm.weight" not in header.tensors
    header.expect("use_parallel_residual", parallel)
    head_dim = _head_dim(header, sizes["hidden_size"], sizes["num_attention_heads"])
    return {
        **sizes,
        "layer_norm_eps": _layer_norm(header),
        "rope_parameters": _partial_rope(header, head_dim),
        "hidden_act": "silu",
        "use_qkv_bias": "blk.0.attn_q.bias" in header.tensors,
        "use_parallel_residual": parallel,
        "qk_layernorm": False,
    }


def _starcoder2(header: Hyperparameters) -> Fields:
    sizes = _sizes(header)
    _no_experts(header)
    head_dim = _head_dim(header, sizes["hidden_size"], sizes["num_attention_heads"])
    header.expect("rope.dimension_count", head_dim)
    return {
        **sizes,
        "norm_epsilon": _layer_norm(header),
        "rope_parameters": _rope(header),
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": True,
        "sliding_window": None,
    }


def _nemotron(header: Hyperparameters) -> Fields:
    """Its converter writes the epsilon of its layer norms under the key of RMS norms too."""
    sizes, epsilon = _sizes(header), _layer_norm(header)
    _no_experts(header)
    header.expect("attention.layer_norm_rms_epsilon", epsilon)
    head_dim = _head_dim(header, sizes["hidden_size"], sizes["num_attention_heads"])
    return {
        **sizes,
        "norm_eps": epsilon,
        "rope_parameters": _partial_rope(header, head_dim),
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
"""general.architecture -> transformers' model_type, and what reads the header's keys."""
