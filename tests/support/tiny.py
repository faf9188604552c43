"""Tiny random models, a byte tokenizer and a base built from them: no network, milliseconds each.

Weights are drawn wide, and norms and biases are moved off their trivial starting values, so that
the outputs differ strongly between tokens and a wrong mask, scale or position shows. Layers are
non-square, query heads outnumber key/value heads (4 to 2) where the family allows it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    DeepseekV3Config,
    Ernie4_5Config,
    Exaone4Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    HunYuanDenseV1Config,
    HyperCLOVAXConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    NemotronConfig,
    Olmo2Config,
    OlmoConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

if TYPE_CHECKING:
    from veneer.models.frozen_base import FrozenBase

VOCAB_SIZE = (
    272  # 256 bytes, 3 special tokens, and a few rows that no token uses, as real models have
)
SLIDING_WINDOW = 8
SCALED_FROM = 40
"""Position from which queries of the tiny Ministral 3 are scaled."""
MAX_POSITIONS = 1024

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "initializer_range": 0.3,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_MODERN: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
}
_SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]

_CONFIGS: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {**_MODERN, "tie_word_embeddings": True}),
    "llama_untied": (LlamaConfig, {**_MODERN, "head_dim": 12}),
    "qwen2": (Qwen2Config, {**_MODERN, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {**_MODERN, "head_dim": 12}),
    "mistral": (MistralConfig, {**_MODERN, "head_dim": 12, "sliding_window": SLIDING_WINDOW}),
    "gemma2": (
        Gemma2Config,
        {
            **_MODERN,
            "tie_word_embeddings": True,
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": _SLIDING_THEN_FULL,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            **_MODERN,
            "tie_word_embeddings": True,
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": _SLIDING_THEN_FULL,
        },
    ),
    "gpt2": (
        GPT2Config,
        {
            **_COMMON,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 48,
            "n_positions": MAX_POSITIONS,
        },
    ),
    "phi": (PhiConfig, _MODERN),
    "phi3": (Phi3Config, _MODERN),
    "gpt_neox": (
        GPTNeoXConfig,
        {
            **{k: v for k, v in _MODERN.items() if k != "num_key_value_heads"},
            "intermediate_size": 80,
        },
    ),
    "opt": (
        OPTConfig,
        {
            **_COMMON,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_POSITIONS,
            "init_std": 0.3,
        },
    ),
    "mixtral": (MixtralConfig, {**_MODERN, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            **_MODERN,
            "head_dim": 12,
            "moe_intermediate_size": 24,  # grouped matrix products want 16-byte rows in bf16 too
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "bloom": (BloomConfig, {**_COMMON, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "olmo2": (Olmo2Config, _MODERN),
    "falcon": (
        FalconConfig,
        {
            **_COMMON,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_hidden_size": 48,
        },
    ),
}
FAMILIES = tuple(_CONFIGS)
_FALCON = _CONFIGS["falcon"][1]
_CONFIGS |= {  # by name alone, not in every test of all families
    "falcon_groups": (
        FalconConfig,
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon_heads": (
        FalconConfig,
        {**_FALCON, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "stablelm": (StableLmConfig, _MODERN),  # its layers hand no keyword on to attention
    "starcoder2": (Starcoder2Config, _MODERN),
    "nemotron": (NemotronConfig, _MODERN),
    "gemma": (GemmaConfig, {**_MODERN, "head_dim": 12}),
    "glm4": (Glm4Config, {**_MODERN, "head_dim": 16}),
    "cohere": (CohereConfig, {**_MODERN, "logit_scale": 0.5}),
    "exaone4": (
        Exaone4Config,
        {**_MODERN, "sliding_window": SLIDING_WINDOW, "layer_types": _SLIDING_THEN_FULL},
    ),
    "granite": (
        GraniteConfig,
        {
            **_MODERN,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.2,
            "logits_scaling": 6.0,
        },
    ),
    "ernie4_5": (Ernie4_5Config, {**_MODERN, "head_dim": 16}),
    "hunyuan": (HunYuanDenseV1Config, {**_MODERN, "head_dim": 16}),
    "olmo": (OlmoConfig, _MODERN),
    "modernbert": (
        ModernBertDecoderConfig,
        {
            **{k: v for k, v in _MODERN.items() if k != "num_key_value_heads"},
            "local_attention": 2 * SLIDING_WINDOW,
            "layer_types": _SLIDING_THEN_FULL,
        },
    ),
    "hyperclovax": (HyperCLOVAXConfig, {**_MODERN, "embedding_multiplier": 3.0}),
    "ministral3": (
        Ministral3Config,
        {
            **_MODERN,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": SCALED_FROM,
                "llama_4_scaling_beta": 2.0,
            },
        },
    ),
    "smollm3": (SmolLM3Config, {**_MODERN, "no_rope_layers": [1, 0]}),  # the second is not rotated
    "qwen2_moe": (
        Qwen2MoeConfig,
        {
            **_MODERN,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "olmoe": (OlmoeConfig, {**_MODERN, "num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoehybrid": (
        GraniteMoeHybridConfig,
        {
            **_MODERN,
            "layer_types": ["linear_attention", "full_attention"],
            "mamba_n_heads": 4,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
            "intermediate_size": 24,
            "shared_intermediate_size": 40,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.2,
            "logits_scaling": 6.0,
        },
    ),
    "gpt_oss": (
        GptOssConfig,
        {
            **_MODERN,
            "intermediate_size": 64,
            "head_dim": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": _SLIDING_THEN_FULL,
        },
    ),
    "deepseek_v3": (
        DeepseekV3Config,
        {
            **_MODERN,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 0,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}

CHATML = (
    "{%- if tools %}{{ '<|im_start|>system\\nTools:\\n' }}{%- for tool in tools %}{{ tool | tojson"
    " }}{{ '\\n' }}{%- endfor %}{{ '<|im_end|>\\n' }}{%- endif %}{%- for message in messages %}{{"
    " '<|im_start|>' + message['role'] + '\\n' }}{%- if message['content'] %}{{ message['content']"
    " }}{%- endif %}{%- for call in message['tool_calls'] or [] %}{{ '<tool_call>' }}{{"
    " (call.function or call) | tojson }}{{ '</tool_call>' }}{%- endfor %}{{ '<|im_end|>\\n' }}{%-"
    " endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A random causal LM of `family`, in eval mode, nothing trainable; `overrides` are config
    fields.

    The same seed gives the same weights, whatever torch's global random state is; another dtype
    gives the same weights rounded. Rotary frequencies stay float32, as from_pretrained keeps them.
    """
    config_class, fields = _CONFIGS[family]
    config = config_class(**{**fields, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norm weights and biases: off their 1s and 0s
                parameter.data.add_(torch.randn(parameter.shape) * 0.2)
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval().requires_grad_(False)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: a token i < 256 is one byte (not byte i); 256 <|im_start|>,
    257 <|im_end|> (the end of a turn, and eos), 258 <|endoftext|> (padding). The chat template is
    ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_base(
    family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> FrozenBase:
    """A Base over tiny_model and tiny_tokenizer, as load_base would return it."""
    from veneer.bases.loading.own_pages import reorder_transposed
    from veneer.models.frozen_base import (
        FrozenBase,
    )  # here, so that tests of lower layers load no more than they test

    model = tiny_model(family, dtype, seed, **overrides)
    reorder_transposed(model)
    return FrozenBase(
        model=model,
        tokenizer=tiny_tokenizer(),
        source=f"tiny-{family}",
        name_or_path=f"tiny-{family}",
        revision=None,
    )


def save_tiny(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write tiny_model and tiny_tokenizer as a folder that load_base reads; returns the folder."""
    from veneer.bases.quiet_transformers import quiet

    with quiet():
        tiny_model(family, dtype, seed, **overrides).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder


def save_letters(folder: Path) -> Path:
    """Writes a random model that says letters, and stops one time in some twenty."""
    model, tokenizer = tiny_model("phi"), tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
        model.lm_head.bias.fill_(-100.0)
        model.lm_head.bias[tokenizer("abcdefghijklmnopqrstuvwxyz").input_ids] = 0.0
        model.lm_head.bias[tokenizer.eos_token_id] = 0.3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
