"""LoRA and decoding over the blocks of a .gguf file (quantize: gguf) against the same file
dequantised to bf16.

    python benchmarks/gguf_base.py --rows e2e_json.jsonl
        # the named default, a Q4_1 file
    python benchmarks/gguf_base.py --rows ROWS.jsonl --base model.Q4_K_M.gguf --steps 8 --rounds 3

Each figure comes from a process of its own, the two kinds alternating, their order swapped every
round. Printed: bytes of the weights, memory of the loaded process that belongs to it alone (the
mapped file is not in it), examples/s of LoRA on all linear layers, decode tokens/s, and whether
losses and adapter are the same.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = {"dequantised": None, "blocks": "gguf"}


def own_memory_bytes() -> int:
    """Pages of this process alone: what is mapped from files is left out (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """In this process: load, decode, then train on the same base anew."""
    from veneer import api
    from veneer.adapters.config import LoRA
    from veneer.bases.quiet_transformers import quiet
    from veneer.decoding.generate import generate
    from veneer.training.config import DataConfig, RunConfig
    from veneer.training.output.records import read_records
    from veneer.training.output.screen import QuietScreen

    quantize: Any = KINDS[kind]
    api.load(
        args.base, quantize=quantize
    )  # converts the file on the first call, and warms the page cache
    before = own_memory_bytes()
    base = api.load(args.base, quantize=quantize)
    memory = own_memory_bytes() - before
    weights = sum(p.nbytes for p in {id(p): p for p in base.model.parameters()}.values())
    ids = [
        base.tokenizer("The history of the bicycle begins", add_special_tokens=False)["input_ids"]
    ]
    with quiet():
        generate(base, ids, max_new_tokens=4)
        start = time.perf_counter()
        (new,) = generate(base, ids, max_new_tokens=args.decode)
        seconds = time.perf_counter() - start
    del base
    with tempfile.TemporaryDirectory() as scratch:
        config = RunConfig(
            base=args.base,
            quantize=quantize,
            out=f"{scratch}/run",
            method=LoRA(rank=16, alpha=32.0),
            batch=args.batch,
            steps=args.steps + 1,
            data=DataConfig(train=args.rows, validation_share=0.0),
            learning_rate=2e-4,
            schedule="constant",
            warmup=0.0,
            order="file",
        )
        summary = api.train_run(config, resume=False, screen=QuietScreen())
        losses = [
            r["loss"] for r in read_records(f"{scratch}/run/metrics.jsonl") if r["kind"] == "step"
        ]
    return {
        "weights_bytes": weights,
        "memory_bytes": memory,
        "decode_tokens_per_s": len(new) / seconds,
        "examples_per_s": summary["examples_per_second"],
        "losses": losses,
        "adapter": summary["adapter_sha256"],
        "peak_bytes": summary["peak_memory_bytes"],
    }


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base", default="smollm2-135m", help="a .gguf file, or the named default")
    p.add_argument("--rows", required=True)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--decode", type=int, default=128, help="tokens to decode")
    p.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for number in range(args.rounds):
        for kind in list(KINDS)[:: 1 if number % 2 == 0 else -1]:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", kind]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            found[kind].append(json.loads(done.stdout.strip().splitlines()[-1]))
    for name, unit, scale in (
        ("weights_bytes", "MiB of weights", 2**20),
        ("memory_bytes", "MiB of the process for them", 2**20),
        ("examples_per_s", "examples/s", 1.0),
        ("decode_tokens_per_s", "tokens/s decoded", 1.0),
        ("peak_bytes", "MiB peak of the training process", 2**20),
    ):
        for kind, lines in found.items():
            values = sorted(line[name] / scale for line in lines)
            middle = statistics.median(values)
            print(f"{unit:>34}  {kind:<12} {middle:>10.2f}  ({values[0]:.2f}-{values[-1]:.2f})")
    everything = [line for lines in found.values() for line in lines]
    same = all(line["losses"] == everything[0]["losses"] for line in everything)
    adapters = {line["adapter"] for line in everything}
    print(
        f"losses {'equal to the bit' if same else 'differ'}; adapters: {len(adapters)} different"
        " file(s)"
    )
    print(
        "first and last loss:",
        *(f"{line['losses'][0]:.4f} {line['losses'][-1]:.4f};" for line in everything),
    )


if __name__ == "__main__":
    main()
