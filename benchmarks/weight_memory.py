"""Memory of the weights alone, from 0.1 to 65 B parameters, in bf16 and in NF4 with double
quantisation. Computed.

    python benchmarks/weight_memory.py

Each model is built without storage from its published shape and packed as `veneer plan` packs it.
GB are 10^9 bytes. LLaMA 7B has the shape of Llama-2 7B; those of 33B and 65B are written here.
Paper: Dettmers et al. 2023, arXiv:2305.14314: what its authors give for the model in 4 bits; cited
from memory.
"""

import torch
from torch import nn

from veneer.bases.loading.blueprint import config_from
from veneer.bases.loading.from_config import build
from veneer.bases.loading.shapes import SHAPES
from veneer.plan.simulation.weights import packing

LLAMA = SHAPES["llama-2-7b"]
MODELS = {
    "SmolLM2 135M": SHAPES["smollm2-135m"],
    "Llama 3.2 1B": SHAPES["llama-3.2-1b"],
    "LLaMA 7B": LLAMA,
    "LLaMA 33B": {
        **LLAMA,
        "num_hidden_layers": 60,
        "hidden_size": 6656,
        "num_attention_heads": 52,
        "num_key_value_heads": 52,
        "intermediate_size": 17920,
    },
    "LLaMA 65B": {
        **LLAMA,
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "intermediate_size": 22016,
    },
}
PAPER_GB = {"LLaMA 7B": "5.0", "LLaMA 33B": "21", "LLaMA 65B": "41"}
SAVED_BY_DOUBLE_BITS = 32 / 64 - (8 / 64 + 32 / (64 * 256))


def main() -> None:
    print(
        "| model | parameters, B | of them packed | bf16, GB | NF4, the packed layers alone, GB |"
        " NF4 with dense embeddings and head, GB | of bf16 | double quantisation saves, GB | the"
        " paper's, GB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, shape in MODELS.items():
        model = build(config_from(shape), torch.bfloat16)
        dense = sum(p.nbytes for p in model.parameters())
        saved, _ = packing(model)
        head = model.get_output_embeddings()
        values = sum(
            m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head
        )
        packed = 2 * values - saved
        double = values * SAVED_BY_DOUBLE_BITS / 8
        print(
            f"| {name} | {dense / 2e9:.2f} | {2 * values / dense:.0%} | {dense / 1e9:.2f} |"
            f" {packed / 1e9:.2f} | {(dense - saved) / 1e9:.2f} | {(dense - saved) / dense:.2f} |"
            f" {double / 1e9:.2f} | {PAPER_GB.get(name, '')} |"
        )
        assert packed / values < 0.52, (name, packed / values)


if __name__ == "__main__":
    main()
