"""Planned against measured peak memory: 40 runs of random bases and the real one, each in a process of its own.

    python benchmarks/plan_accuracy.py                the 40 of the documentation
    python benchmarks/plan_accuracy.py --only 4       the first four: minutes

Every run is `veneer.train` for three steps; summary.json holds what was planned before the first step and what was
measured. Memory does not depend on the machine's load. Prints one line a run, then median and worst error.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BASES = {
    "smollm2-135m": None,
    "llama": {"model_type": "llama", "num_hidden_layers": 12, "hidden_size": 512, "num_attention_heads": 8,
              "num_key_value_heads": 4, "intermediate_size": 1536, "vocab_size": 32000, "tie_word_embeddings": False},
    "qwen": {"model_type": "qwen3", "num_hidden_layers": 16, "hidden_size": 512, "num_attention_heads": 8,
             "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1408, "vocab_size": 64000,
             "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma2", "num_hidden_layers": 12, "hidden_size": 512, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 2048, "vocab_size": 64000,
              "tie_word_embeddings": True, "sliding_window": 256},
    "gpt2": {"model_type": "gpt2", "n_layer": 12, "n_embd": 512, "n_head": 8, "vocab_size": 32000, "n_positions": 1024},
    "moe": {"model_type": "qwen3_moe", "num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8,
            "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1408, "moe_intermediate_size": 384,
            "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000, "tie_word_embeddings": False},
}  # fmt: skip
SHAPES = ((4, 256, False), (8, 128, True), (2, 512, False), (8, 512, True))
METHODS = ("lora", "full", "lora", "prefix", "dora", "bottleneck")
DTYPES = ("bfloat16", "float32")


def cases() -> list[tuple[str, str, str, int, int, bool]]:
    """40 of (base, dtype, method, batch, length, checkpointing): every base with every shape, methods and types in turn."""
    grid = itertools.product(BASES, SHAPES, range(2))
    found = []
    for number, (base, (batch, length, kept), half) in enumerate(grid):
        method = METHODS[(number + half) % len(METHODS)]
        method = "lora" if base in ("gpt2", "moe") and method in ("prefix", "bottleneck", "dora") else method
        found.append((base, DTYPES[(number // 2) % 2], method, batch, length, kept))
    return found[:40]


def one(
    folder: Path, base: str, dtype: str, method: str, batch: int, length: int, kept: bool
) -> dict[str, int]:
    """Runs in a process of its own: makes the base if it is random, trains, prints the summary's two figures."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.tiny import tiny_tokenizer
    from veneer import api
    from veneer.models.blueprint import config_from

    source, fields = base, BASES[base]
    if fields is not None:
        source = str(folder / f"{base}-{dtype}")
        if not Path(source).exists():
            model = AutoModelForCausalLM.from_config(
                config_from({**fields, "dtype": dtype}), dtype=getattr(torch, dtype)
            )
            model.save_pretrained(source)
            tiny_tokenizer().save_pretrained(source)
            return {}  # the next process measures: this one has held the model
    rows = folder / f"rows-{base}-{length}.jsonl"
    words = ("abcdefghij klmnop " * length)[: (length - 4) * (1 if fields is not None else 2)]
    rows.write_text("\n".join(json.dumps({"text": f"{n:03d}{words}"}) for n in range(4 * batch)))
    with tempfile.TemporaryDirectory() as out:
        summary = api.train(
            source, {"train": str(rows), "validation_share": 0.0, "long_rows": "cut"}, out=f"{out}/run",
            method={"name": method}, batch=batch, length=length, steps=3, checkpointing=kept, dtype=dtype,
        )  # fmt: skip
    return {key: summary[key] for key in ("planned_memory_bytes", "peak_memory_bytes")}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", type=int, default=40, metavar="N")
    p.add_argument("--one", nargs=7, metavar="X", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        folder, base, dtype, method, batch, length, kept = args.one
        print(json.dumps(one(Path(folder), base, dtype, method, int(batch), int(length), kept == "True")))
        return
    errors = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases()[: args.only]:
            command = [sys.executable, __file__, "--one", scratch, *map(str, case)]
            for _ in range(2):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                found = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else None
                if found != {}:
                    break
            name = " ".join(map(str, case))
            if not found or not found["planned_memory_bytes"]:
                print(f"{name:<50} failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
                continue
            planned, measured = found["planned_memory_bytes"], found["peak_memory_bytes"]
            errors.append(planned / measured - 1)
            print(f"{name:<50} {planned / 1e6:8.0f} {measured / 1e6:8.0f} MB {errors[-1]:+7.1%}", flush=True)
    if errors:
        sizes = sorted(map(abs, errors))
        print(f"{len(errors)} runs: median error {statistics.median(sizes):.1%}, worst {sizes[-1]:.1%}")


if __name__ == "__main__":
    main()
