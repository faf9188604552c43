"""A Llama-shaped folder of random bf16 weights, written shard by shard: never more than one layer
in memory."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def write_random_llama(
    folder: Path,
    *,
    tokenizer_of: Path,
    hidden: int,
    feed_forward: int,
    layers: int,
    heads: int,
    kv_heads: int,
) -> int:
    """Returns the number of weights. The tokenizer, and so the vocabulary, is that of another
    folder."""
    folder.mkdir(parents=True)
    vocabulary = AutoConfig.from_pretrained(tokenizer_of).vocab_size
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer_of / name).is_file():
            shutil.copy(tokenizer_of / name, folder / name)
    generator = torch.Generator().manual_seed(0)
    key_values = hidden // heads * kv_heads

    def matrix(out: int, width: int) -> torch.Tensor:
        return (torch.randn(out, width, generator=generator) * 0.02).bfloat16()

    weight_map: dict[str, str] = {}
    count = 0
    for number in range(-1, layers):
        shard = f"model-{number + 2:05d}-of-{layers + 1:05d}.safetensors"
        if number < 0:
            tensors = {
                "model.embed_tokens.weight": matrix(vocabulary, hidden),
                "model.norm.weight": torch.ones(hidden).bfloat16(),
            }
        else:
            prefix = f"model.layers.{number}."
            tensors = {
                f"{prefix}self_attn.q_proj.weight": matrix(hidden, hidden),
                f"{prefix}self_attn.k_proj.weight": matrix(key_values, hidden),
                f"{prefix}self_attn.v_proj.weight": matrix(key_values, hidden),
                f"{prefix}self_attn.o_proj.weight": matrix(hidden, hidden),
                f"{prefix}mlp.gate_proj.weight": matrix(feed_forward, hidden),
                f"{prefix}mlp.up_proj.weight": matrix(feed_forward, hidden),
                f"{prefix}mlp.down_proj.weight": matrix(hidden, feed_forward),
                f"{prefix}input_layernorm.weight": torch.ones(hidden).bfloat16(),
                f"{prefix}post_attention_layernorm.weight": torch.ones(hidden).bfloat16(),
            }
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        count += sum(t.numel() for t in tensors.values())
    index = {"metadata": {"total_size": 2 * count}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return count
