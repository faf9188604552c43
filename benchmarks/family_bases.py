"""Writes a random base of each family at one shape, to be trained by train_speed.py.

    python benchmarks/family_bases.py --tokenizer BASE --out bases --families llama qwen3 gemma2
    python benchmarks/train_speed.py --base bases/qwen3 --rows e2e.jsonl ...

The shape is SmolLM2-135M's with --layers layers, in bf16, as in family_speed.py. The tokenizer and
its chat template are those of the folder BASE.
"""

import argparse
from pathlib import Path

import torch
from family_speed import FAMILIES, SHAPE
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, metavar="BASE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--layers", type=int, default=30)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    for family in args.families:
        fields = SHAPE | FAMILIES[family] | {"num_hidden_layers": args.layers}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **fields), dtype=torch.bfloat16
        )
        model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(args.out / family)
        tokenizer.save_pretrained(args.out / family)
        print(args.out / family, flush=True)


if __name__ == "__main__":
    main()
