"""Planned against measured peak memory: 40 runs of random bases and the real one, each in a process
of its own.

    python benchmarks/plan_accuracy.py                    the 40 of the documentation
    python benchmarks/plan_accuracy.py --only qwen        those whose name holds this word
    python benchmarks/plan_accuracy.py --dtype float32
        all in this type, where bf16 products would take for ever
    python benchmarks/plan_accuracy.py --keep found.json  also write every case's figures

Every run is `veneer.train` for two steps; summary.json holds what was planned before the first step
and what was measured. Memory does not depend on the machine's load. Prints one line a run, then
median and worst error.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BASES = {
    "smollm2-135m": None,
    "llama": {
        "model_type": "llama",
        "num_hidden_layers": 12,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1536,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "qwen": {
        "model_type": "qwen3",
        "num_hidden_layers": 16,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 1408,
        "vocab_size": 64000,
        "tie_word_embeddings": True,
    },
    "gemma": {
        "model_type": "gemma2",
        "num_hidden_layers": 12,
        "hidden_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 2048,
        "vocab_size": 64000,
        "tie_word_embeddings": True,
        "sliding_window": 256,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_layer": 12,
        "n_embd": 512,
        "n_head": 8,
        "vocab_size": 32000,
        "n_positions": 1024,
    },
    "moe": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 1408,
        "moe_intermediate_size": 384,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora"},
    "dora": {"name": "dora"},
    "full": {"name": "full"},
    "prefix": {"name": "prefix"},
    "houlsby": {"name": "bottleneck", "placement": "houlsby"},
    "pfeiffer": {"name": "bottleneck", "placement": "pfeiffer"},
    "parallel": {"name": "bottleneck"},
    "nf4": {"name": "lora"},
    "gguf": {"name": "lora"},
}
CASES = """
smollm2-135m bfloat16 lora     4 x 256       llama        bfloat16 lora     4 x 256
qwen         bfloat16 lora     4 x 512       gemma        bfloat16 lora     4 x 256
gpt2         bfloat16 lora     8 x 256       moe          bfloat16 lora     4 x 256
smollm2-135m bfloat16 full     4 x 128       llama        bfloat16 full     8 x 128
llama        bfloat16 prefix   4 x 256       llama        bfloat16 nf4      8 x 256
smollm2-135m bfloat16 houlsby  4 x 256       moe          float32  lora     8 x 128 kept
gpt2         float32  dora     4 x 128       gemma        float32  houlsby  4 x 256
smollm2-135m bfloat16 gguf     2 x 512       qwen         float32  parallel 4 x 256
qwen         bfloat16 full     8 x 256 kept  gemma        bfloat16 dora     4 x 256
llama        float32  lora     8 x 256 kept  smollm2-135m bfloat16 dora     2 x 256
qwen         bfloat16 prefix   2 x 512       moe          bfloat16 full     4 x 256
gpt2         bfloat16 full     4 x 256       gpt2         bfloat16 parallel 4 x 512
smollm2-135m bfloat16 nf4      4 x 256       qwen         bfloat16 nf4      8 x 256
moe          bfloat16 parallel 8 x 256       gemma        bfloat16 full     2 x 512
smollm2-135m float32  lora     4 x 128       smollm2-135m bfloat16 lora     8 x 256 kept
smollm2-135m bfloat16 prefix   8 x 128       llama        bfloat16 pfeiffer 8 x 256
llama        float32  dora     2 x 512       qwen         float32  lora     8 x 128
qwen         bfloat16 dora     8 x 256 kept  gemma        float32  lora     8 x 128 kept
gpt2         float32  lora     4 x 256 kept  smollm2-135m float32  full     2 x 128 kept
smollm2-135m bfloat16 nf4      8 x 128 kept  smollm2-135m bfloat16 lora     2 x 512
"""
"""base, type, method, rows x tokens, checkpointing ("kept": only a layer's input is kept)."""


def cases(dtype: str | None) -> list[str]:
    """Each case once; in `dtype`, where one is given."""
    words, found = CASES.split(), []
    while words:
        size = 7 if len(words) > 6 and words[6] == "kept" else 6
        base, own, *rest = words[:size]
        found.append(" ".join([base, dtype or own, *rest]))
        words = words[size:]
    return list(dict.fromkeys(found))


def one(folder: Path, case: str) -> dict[str, int]:
    """Runs in a process of its own: makes the base if it is random, trains, returns the summary's
    figures."""
    import torch
    from transformers import AutoModelForCausalLM

    import veneer
    from tests.support.tiny import tiny_tokenizer
    from veneer.bases.loading.blueprint import config_from

    base, dtype, method, batch, _, length, *kept = case.split()
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
    words = ("abcdefghij klmnop " * int(length))[
        : (int(length) - 4) * (1 if fields is not None else 2)
    ]
    rows.write_text(
        "\n".join(json.dumps({"text": f"{n:03d}{words}"}) for n in range(4 * int(batch)))
    )
    with tempfile.TemporaryDirectory() as out:
        summary = veneer.train(
            source,
            {"train": str(rows), "validation_share": 0.0, "long_rows": "cut"},
            out=f"{out}/run",
            method=METHODS[method],
            quantize=method if method in ("nf4", "gguf") else None,
            batch=int(batch),
            length=int(length),
            steps=2,
            checkpointing=bool(kept),
            dtype=dtype,
            quiet=True,
        )
        lines = [
            json.loads(line) for line in Path(f"{out}/run/metrics.jsonl").read_text().splitlines()
        ]
    steps = [line for line in lines if line["kind"] == "step"]
    return {
        key: summary[key]
        for key in ("planned_memory_bytes", "peak_memory_bytes", "idle_memory_bytes")
    } | {"computed_tokens": steps[-1]["computed_tokens"]}


def measure_all(
    command: Sequence[str], cases: Mapping[str, str], scratch: Path | None, keep: Path | None
) -> None:
    """Measures each case in a process of its own and prints planned memory, measured memory and the
    error.

    command   words after `python`; the scratch folder and the case's value follow them
    cases     name on the screen -> value for the command
    """
    errors: list[float] = []
    kept: dict[str, Any] = {}
    width = max(map(len, cases), default=0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (scratch or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in cases.items():
            result = None
            for _ in range(2):  # the first call for a random base only makes it
                words = [sys.executable, *command, str(folder), value]
                done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
                result = (
                    json.loads(done.stdout.strip().splitlines()[-1])
                    if done.returncode == 0
                    else None
                )
                if result != {}:
                    break
            if not result or not result["planned_memory_bytes"]:
                print(
                    f"{name:<{width}} failed: {done.stderr.strip().splitlines()[-1:]}", flush=True
                )
                continue
            kept[name] = result
            planned, measured = result["planned_memory_bytes"], result["peak_memory_bytes"]
            errors.append(planned / measured - 1)
            megabytes = f"{planned / 1e6:8.0f} {measured / 1e6:8.0f} MB"
            print(f"{name:<{width}} {megabytes} {errors[-1]:+7.1%}", flush=True)
            if keep:
                keep.write_text(json.dumps(kept, indent=1))
    if errors:
        sizes = sorted(map(abs, errors))
        print(
            f"{len(errors)} runs: median error {statistics.median(sizes):.1%}, worst"
            f" {sizes[-1]:.1%}"
        )


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--only", default="", metavar="WORD")
    p.add_argument("--dtype", choices=["float32", "bfloat16"])
    p.add_argument("--keep", type=Path, metavar="FILE")
    p.add_argument("--scratch", type=Path, help="keep the random bases here, for the next time")
    p.add_argument("--one", nargs=2, metavar="X", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        print(json.dumps(one(Path(args.one[0]), args.one[1])))
        return
    chosen = {case: case for case in cases(args.dtype) if args.only in case}
    measure_all(["-m", "benchmarks.plan_accuracy", "--one"], chosen, args.scratch, args.keep)


if __name__ == "__main__":
    main()
