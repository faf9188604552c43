"""Lists the shapes of well-known bases by short names, so that a plan needs no files and no
network.

The numbers are those of the published config.json. Fields that change no shape (rotary frequencies,
tokens) keep the architecture's default. Tied: whether the head shares the embedding's weights.
"""

from typing import Any

Fields = dict[str, Any]


def _dense(
    model_type: str,
    layers: int,
    hidden: int,
    heads: int,
    kv: int,
    ff: int,
    vocab: int,
    **more_fields: Any,
) -> Fields:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ff,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
        "dtype": "bfloat16",
        **more_fields,
    }


def _gpt2(layers: int, hidden: int, heads: int) -> Fields:
    return {
        "model_type": "gpt2",
        "n_layer": layers,
        "n_embd": hidden,
        "n_head": heads,
        "vocab_size": 50257,
        "n_positions": 1024,
        "dtype": "float32",
    }


def _gemma2(layers: int, hidden: int, heads: int, kv: int, ff: int, head_dim: int) -> Fields:
    tied = {"tie_word_embeddings": True, "head_dim": head_dim, "max_position_embeddings": 8192}
    return _dense("gemma2", layers, hidden, heads, kv, ff, 256000, **tied)


def _experts(model_type: str, fields: Fields, **more_fields: Any) -> Fields:
    return {**fields, "model_type": model_type, **more_fields}


TIED = {"tie_word_embeddings": True}
HEAD_128 = {"head_dim": 128}

SHAPES: dict[str, Fields] = {
    "smollm2-135m": _dense("llama", 30, 576, 9, 3, 1536, 49152, **TIED),
    "smollm2-360m": _dense("llama", 32, 960, 15, 5, 2560, 49152, **TIED),
    "smollm2-1.7b": _dense("llama", 24, 2048, 32, 32, 8192, 49152, **TIED),
    "llama-2-7b": _dense("llama", 32, 4096, 32, 32, 11008, 32000),
    "llama-2-13b": _dense("llama", 40, 5120, 40, 40, 13824, 32000),
    "llama-2-70b": _dense("llama", 80, 8192, 64, 8, 28672, 32000),
    "llama-3-8b": _dense("llama", 32, 4096, 32, 8, 14336, 128256),
    "llama-3-70b": _dense("llama", 80, 8192, 64, 8, 28672, 128256),
    "llama-3.1-405b": _dense("llama", 126, 16384, 128, 8, 53248, 128256),
    "llama-3.2-1b": _dense("llama", 16, 2048, 32, 8, 8192, 128256, **TIED),
    "llama-3.2-3b": _dense("llama", 28, 3072, 24, 8, 8192, 128256, **TIED),
    "mistral-7b": _dense("mistral", 32, 4096, 32, 8, 14336, 32000, sliding_window=4096),
    "ministral-8b": _dense(
        "mistral", 36, 4096, 32, 8, 12288, 131072, **HEAD_128, sliding_window=None
    ),
    "qwen2.5-0.5b": _dense("qwen2", 24, 896, 14, 2, 4864, 151936, **TIED),
    "qwen2.5-1.5b": _dense("qwen2", 28, 1536, 12, 2, 8960, 151936, **TIED),
    "qwen2.5-7b": _dense("qwen2", 28, 3584, 28, 4, 18944, 152064),
    "qwen2.5-14b": _dense("qwen2", 48, 5120, 40, 8, 13824, 152064),
    "qwen2.5-32b": _dense("qwen2", 64, 5120, 40, 8, 27648, 152064),
    "qwen2.5-72b": _dense("qwen2", 80, 8192, 64, 8, 29568, 152064),
    "qwen3-0.6b": _dense("qwen3", 28, 1024, 16, 8, 3072, 151936, **TIED, **HEAD_128),
    "qwen3-1.7b": _dense("qwen3", 28, 2048, 16, 8, 6144, 151936, **TIED, **HEAD_128),
    "qwen3-4b": _dense("qwen3", 36, 2560, 32, 8, 9728, 151936, **TIED, **HEAD_128),
    "qwen3-8b": _dense("qwen3", 36, 4096, 32, 8, 12288, 151936, **HEAD_128),
    "qwen3-14b": _dense("qwen3", 40, 5120, 40, 8, 17408, 151936, **HEAD_128),
    "qwen3-32b": _dense("qwen3", 64, 5120, 64, 8, 25600, 151936, **HEAD_128),
    "qwen3-30b-a3b": _experts(
        "qwen3_moe",
        _dense("qwen3_moe", 48, 2048, 32, 4, 6144, 151936, **HEAD_128),
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    ),
    "mixtral-8x7b": _experts(
        "mixtral",
        _dense("mixtral", 32, 4096, 32, 8, 14336, 32000),
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "gemma-2-2b": _gemma2(26, 2304, 8, 4, 9216, 256),
    "gemma-2-9b": _gemma2(42, 3584, 16, 8, 14336, 256),
    "gemma-2-27b": _gemma2(46, 4608, 32, 16, 36864, 128),
    "phi-1.5": _dense("phi", 24, 2048, 32, 32, 8192, 51200, max_position_embeddings=2048),
    "phi-4": _dense("phi3", 40, 5120, 40, 10, 17920, 100352),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
}
ALIASES = {
    "llama-70b": "llama-3-70b",
    "llama-8b": "llama-3-8b",
    "llama-7b": "llama-2-7b",
    "llama-3.1-8b": "llama-3-8b",
    "llama-3.1-70b": "llama-3-70b",
    "llama-3.3-70b": "llama-3-70b",
    "llama-405b": "llama-3.1-405b",
}


def shape_of(name: str) -> Fields | None:
    """Returns the config's fields of a named size, or None. Upper case and `-instruct` are
    ignored."""
    key = name.lower().removesuffix("-instruct")
    return SHAPES.get(ALIASES.get(key, key))
