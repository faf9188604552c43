"""Small random models of every causal LM that transformers names, in memory and as folders that
`veneer.load` reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.tiny import CHATML, tiny_tokenizer
from veneer.bases.config.model_class import model_class
from veneer.bases.quiet_transformers import quiet
from veneer.execution.proofs.small_copy import drawn, small_copy
from veneer.models.frozen_base import FrozenBase

WINDOW, SWITCH = 16, 32
"""Longer than what the proof's copies have, shorter than the rows and prompts here."""
IDS = 120
"""Token ids used: below every special one of a small copy."""
DECODER = {"is_decoder": True}
HEADS = {"head_dim": 32}
FIELDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "reformer",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
        ),
        DECODER,
    ),
    "bamba": {"attn_layer_indices": [1, 5]},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": HEADS,
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 6, "num_hidden_layers": 12},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 4, "num_hidden_layers": 12},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "dots1": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "falcon": {"hidden_size": 256, "num_attention_heads": 4},
    "dbrx": {
        "d_model": 256,
        "n_heads": 4,
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"moe_top_k": 2},
    },  # of one, the only weight is always 1: its router has no gradient
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
}
"""What a default config lacks to be a decoder, or to be built at all."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2, window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 16},
    ),
    "qwen2_moe, window": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 16},
    ),
    "phimoe, window": ("phimoe", {"sliding_window": 64}),
    "doge, window": ("doge", {"sliding_window": 64}),
    "olmoe, window": ("olmoe", {"sliding_window": 64}),
    "mixtral, window": ("mixtral", {"sliding_window": 64}),
    "falcon, groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "phi3, longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 4096,
                "short_factor": [1.0 + 0.1 * i for i in range(48)],
                "long_factor": [2.0 + 0.5 * i for i in range(48)],
            },
        },
    ),
    "qwen3_5, images": ("qwen3_5", {"architectures": ["Qwen3_5ForConditionalGeneration"]}),
    "llama, dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "qwen3, windows": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 14},
    ),
    "gemma3n_text, sparse last": (
        "gemma3n_text",
        {"activation_sparsity_pattern": [0.0] * 25 + [0.95] * 10},
    ),
    "llama, yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    ),
}
"""Settings that change the path, or let layers of one model differ, beside the defaults."""
DENSE_HYBRID, SCALED_HYBRID = "granitemoehybrid, dense", "falcon_h1, scaled"
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    DENSE_HYBRID: ("granitemoehybrid", {"num_local_experts": 0}),
    SCALED_HYBRID: (
        "falcon_h1",
        {
            "embedding_multiplier": 3.0,
            "lm_head_multiplier": 0.25,
            "mlp_multipliers": [0.7, 0.4],
            "key_multiplier": 0.6,
            "attention_in_multiplier": 1.2,
            "attention_out_multiplier": 0.8,
            "ssm_in_multiplier": 1.3,
            "ssm_out_multiplier": 0.6,
            "ssm_multipliers": [0.7, 1.4, 0.5, 1.7, 0.6],
        },
    ),
}
"""Settings that change the path of decoding alone; docs/families.md does not compare them."""
WITH_IMAGES = ("mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe")
"""Checkpoints of texts and images that have no class for their text alone; it is trained with the
tower left out."""
SAMPLE = ("qwen2", "qwen2_moe, window", "phi3, longrope", "mamba", "lfm2")
"""Held in CI; the rest by `make soak`."""


def names() -> list[str]:
    return sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *WITH_IMAGES, *VARIANTS])


def family_config(name: str) -> PreTrainedConfig:
    kind, own = (VARIANTS | FORMS).get(name, (name, {}))
    return CONFIG_MAPPING[kind](**{**FIELDS.get(kind, {}), **own})


def _fit_together(config: PreTrainedConfig) -> None:
    """What a small config of some family lacks to be read from a file again."""
    if config.model_type == "dory":  # its three stacks make up all layers
        config.n_input_layers = config.n_output_layers = 1
        config.n_recurrent_layers = config.num_hidden_layers - 2
    if config.model_type == "kolibri1_1":
        config.index_num_heads = 1


_SMALL: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]] = {}


def family_model(name: str) -> PreTrainedModel:
    """Small and random, the same at every call; raises what transformers raises where it cannot be
    built."""
    with quiet():
        if name not in _SMALL:
            config = family_config(name)
            kind = model_class(config)
            if kind.config_class is not type(
                config
            ):  # the text's part of a model that sees or hears
                config = config.get_text_config()
            small = small_copy(kind, config, window=WINDOW, switch=SWITCH).config
            _fit_together(small)
            _SMALL[name] = kind, small
        kind, small = _SMALL[name]
        model = drawn(kind, copy.deepcopy(small))
    for parameter in model.parameters():
        if parameter.dim() == 1:  # a .gguf file of halves then holds norms as they are
            parameter.data = parameter.data.half().float()
    if model.generation_config is not None:
        model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return model


def family_base(name: str) -> FrozenBase:
    return FrozenBase(family_model(name), tiny_tokenizer(), name, name)


def save_family(name: str, folder: Path) -> Path:
    """Writes the model of `name` and a tokenizer of fewer tokens than it has rows, as transformers
    does."""
    with quiet():
        model = family_model(name)
        model.save_pretrained(folder)
        if model_class(model.config) is None:  # its text's config names no class alone
            whole = family_config(name)
            whole.text_config = model.config
            whole.save_pretrained(folder)
        small_tokenizer().save_pretrained(folder)
    return folder


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Printable ASCII and a line break as one token each, one merge, three special tokens, ChatML.

    A small copy has 128 rows, too few for every byte.
    """
    characters = "".join(map(chr, [10, *range(32, 127)]))
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    (letters, _), *_ = alphabet.pre_tokenize_str(characters)
    vocabulary = {letter: number for number, letter in enumerate([*letters, "th"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer
