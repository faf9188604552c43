"""Reads the header keys that several .gguf architectures share into fields of transformers'
configs."""

from typing import Any

from veneer.bases.gguf.header import Hyperparameters

Fields = dict[str, Any]


def read_sizes(header: Hyperparameters) -> Fields:
    """Reads the sizes that most families call by the same names."""
    heads = header.size("attention.head_count")
    return {
        **read_vocabulary(header),
        "max_position_embeddings": header.size("context_length"),
        "hidden_size": header.size("embedding_length"),
        "intermediate_size": header.size("feed_forward_length"),
        "num_hidden_layers": header.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.size("attention.head_count_kv", heads),
    }


def read_vocabulary(header: Hyperparameters) -> Fields:
    """Reads the size of the vocabulary and whether the head shares the embedding."""
    rows = header.tensors["token_embd.weight"][0]
    header.expect("vocab_size", rows)
    header.expect("attention.causal", True)
    header.expect("pooling_type", 0)
    header.expect("nextn_predict_layers", 0)
    return {"vocab_size": rows, "tie_word_embeddings": "output.weight" not in header.tensors}


def refuse_experts(header: Hyperparameters) -> None:
    """Refuses a header with experts."""
    header.expect("expert_count", 0)
    header.expect("expert_used_count", 0)


def read_head_dim(header: Hyperparameters, sizes: Fields) -> int:
    """Reads the size of a head in families with a setting for it. The whole head is rotated."""
    head_dim = header.size(
        "attention.key_length", divide(sizes["hidden_size"], sizes["num_attention_heads"])
    )
    header.expect("attention.value_length", head_dim)
    header.expect("rope.dimension_count", head_dim)
    return head_dim


def derive_head_dim(header: Hyperparameters, sizes: Fields, *, rotated: bool = False) -> int:
    """Computes the size of a head from width and heads, in families without a setting. rotated: the
    whole head is rotated."""
    head_dim = divide(sizes["hidden_size"], sizes["num_attention_heads"])
    for key in ("attention.key_length", "attention.value_length"):
        header.expect(key, head_dim)
    if rotated:
        header.expect("rope.dimension_count", head_dim)
    return head_dim


def divide(whole: int, parts: int) -> int:
    """Divides at least to 1: a header without these sizes is refused later, with all its faults."""
    return max(whole // parts, 1)


def read_rope(header: Hyperparameters, scalable: bool = True) -> Fields:
    """Reads rotary settings. llama.cpp's default scaling is linear, and a factor of 0 or none means
    1."""
    kind = header.choice("rope.scaling.type", "linear", ("none", "linear"))
    rope: Fields = {"rope_theta": header.real("rope.freq_base", 10000.0), "rope_type": "default"}
    for key in ("rope.scale_linear", "rope.scaling.factor"):  # the old name, then the new one
        factor = header.real(key, 0.0)
        if factor in (0.0, 1.0):
            continue
        if kind == "none" or not scalable:
            header.refuse(key, factor, "this model does not scale positions")
        rope |= {"rope_type": "linear", "factor": factor}
    return rope


def read_partial_rope(header: Hyperparameters, head_dim: int, scalable: bool = True) -> Fields:
    """Reads rotary settings of families that rotate a part of each head."""
    rotated = header.size("rope.dimension_count", head_dim)
    share = rotated / head_dim
    if rotated > head_dim or int(head_dim * share) != rotated:
        header.refuse("rope.dimension_count", rotated, f"a head has {head_dim}")
    return {**read_rope(header, scalable), "partial_rotary_factor": share}


def read_rms_epsilon(header: Hyperparameters) -> float:
    return header.real("attention.layer_norm_rms_epsilon")


def read_norm_epsilon(header: Hyperparameters) -> float:
    return header.real("attention.layer_norm_epsilon")
