"""What a step of each method costs, beside LoRA's: time, memory, trained values, bytes on disk.

    python benchmarks/method_cost.py --base smollm2-135m --rows train.jsonl --out cost.json

Each method trains in a process of its own, the methods in turn and all of them --repeats times, so
that what else the machine does falls on all alike. Every run has the same rows in the same order,
so a step is the same work each time: the fastest of its repeats counts, and the mean over steps is
told. The first step of a run is left out. Memory is the peak above what the process held before the
base was loaded. The rank is the same where a method has one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from veneer import api
from veneer.adapters.config import AdapterConfig, Bottleneck, DoRA, Full, LoRA, MethodConfig, Prefix
from veneer.training.config import DataConfig, RunConfig
from veneer.training.output.records import read_records
from veneer.training.output.screen import QuietScreen


def methods(rank: int) -> dict[str, MethodConfig]:
    """qlora: over NF4 whatever --quantize says."""
    alpha = 2.0 * rank
    return {
        "lora": LoRA(rank=rank, alpha=alpha),
        "qlora": LoRA(rank=rank, alpha=alpha),
        "lora, dropout": LoRA(rank=rank, alpha=alpha, dropout=0.1),
        "pissa": LoRA(rank=rank, alpha=alpha, init="pissa", svd_iterations=4),
        "dora": DoRA(rank=rank, alpha=alpha),
        "houlsby": Bottleneck(placement="houlsby"),
        "pfeiffer": Bottleneck(placement="pfeiffer"),
        "parallel": Bottleneck(placement="parallel"),
        "prefix": Prefix(tokens=30, start="random"),
        "full": Full(),
    }


def one(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        config = RunConfig(
            base=args.base,
            out=f"{scratch}/run",
            method=methods(args.rank)[args.one],
            batch=args.batch,
            steps=args.steps + 1,
            data=DataConfig(train=args.rows, validation_share=0.0),
            order="file",
            schedule="constant",
            warmup=0.0,
            quantize="nf4" if args.one == "qlora" else args.quantize,
            checkpointing=args.checkpointing,
        )
        summary = api.train_run(config, resume=False, screen=QuietScreen())
        steps = [
            r for r in read_records(Path(scratch) / "run" / "metrics.jsonl") if r["kind"] == "step"
        ][1:]
    return {
        "seconds": [step["seconds"] for step in steps],
        "memory_bytes": summary["peak_memory_bytes"] - summary["idle_memory_bytes"],
        "trainable_parameters": summary["trainable_parameters"],
        "file_bytes": summary["adapter_bytes"],
        "last_loss": steps[-1]["loss"],
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--base", required=True)
    p.add_argument("--rows", required=True)
    p.add_argument("--out", type=Path, default=Path("method_cost.json"))
    p.add_argument("--methods", nargs="+", choices=list(methods(1)), default=list(methods(1)))
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--steps", type=int, default=15)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--quantize", choices=["nf4", "fp4", "gguf"])
    p.add_argument("--checkpointing", action="store_true")
    p.add_argument("--one", choices=list(methods(1)), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one is not None:
        print(json.dumps(one(args)))
        return
    chosen = [
        m for m in args.methods if args.quantize is None or isinstance(methods(1)[m], AdapterConfig)
    ]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for _ in range(args.repeats):
        for name in chosen:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}:\n{done.stderr[-2000:]}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows: dict[str, dict[str, float]] = {}
    for name, runs in found.items():
        steps = [run.pop("seconds") for run in runs]
        rows[name] = {"step_seconds": statistics.mean(map(min, zip(*steps, strict=True)))}
        rows[name] |= {"slowest_run_seconds": max(statistics.mean(run) for run in steps)}
        rows[name] |= {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    settings = {k: v for k, v in vars(args).items() if k not in ("one", "out")} | {
        "rows": Path(args.rows).name
    }
    args.out.write_text(json.dumps({"settings": settings, "methods": rows}, indent=2) + "\n")
    unit = rows.get("lora", next(iter(rows.values())))
    print(
        "| method | trained | file, MB | s/step | × LoRA | memory, MB | × LoRA"
        " |\n|---|---|---|---|---|---|---|"
    )
    for name, row in rows.items():
        seconds, memory = row["step_seconds"], row["memory_bytes"]
        print(
            f"| {name} | {row['trainable_parameters']:,.0f} | {row['file_bytes'] / 1e6:.2f} |"
            f" {seconds:.3f} | {seconds / unit['step_seconds']:.2f} | {memory / 1e6:,.0f} |"
            f" {memory / unit['memory_bytes']:.2f} |"
        )


if __name__ == "__main__":
    main()
