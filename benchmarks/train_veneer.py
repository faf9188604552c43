"""Train with Veneer as the peers' scripts train: the same rows in file order, constant rate; print
one JSON line.

The keys are those of the peers' lines, so that `benchmarks/train_speed.py` can set them side by
side. The first step is a warm-up: not timed, not counted. Loading, tokenising and the longest-batch
check are not timed.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from veneer import api
from veneer.adapters.config import Full, LoRA
from veneer.base import Base
from veneer.linear import frozen_linear
from veneer.quant.config import FORMATS
from veneer.training.config import DataConfig, RunConfig
from veneer.training.output.records import read_records
from veneer.training.output.screen import QuietScreen


def matrix_rate(rows: int, width: int, out: int, dtype: torch.dtype) -> float:
    """GFLOP/s of x (rows, width) times W (out, width), the best of 20: the roof of this step on
    this machine."""
    x, w = torch.randn(rows, width).to(dtype), torch.randn(out, width).to(dtype)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return 2 * rows * width * out / best / 1e9


def step_flops(base: Base, rank: int | None, computed: int, trained: int) -> float:
    """Of forward and backward: 4 per linear weight and row with a frozen base (6 if it trains), 6
    per factor's, head."""
    model = base.model
    head = model.get_output_embeddings()
    linears = [f for m in model.modules() if m is not head and (f := frozen_linear(m)) is not None]
    weights = sum(f.in_features * f.out_features for f in linears)
    factors = sum(f.in_features + f.out_features for f in linears)
    per_row = 6 * weights if rank is None else 4 * weights + 6 * rank * factors
    return per_row * computed + 4 * head.weight.numel() * trained


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--base", required=True)
    p.add_argument("--rows", required=True)
    p.add_argument("--method", choices=["lora", "full"], default="lora")
    p.add_argument("--quantize", choices=FORMATS, help="the format that the frozen base is held in")
    p.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--steps", type=int, default=15)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--lr", type=float, default=2e-4)
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the adapter's first values; the rows stay in file order",
    )
    p.add_argument("--targets", default="all-linear", help="all-linear, or names joined by commas")
    p.add_argument("--order", default="file", choices=["file", "bucketed"])
    p.add_argument("--train-on", default="last", choices=["last", "all", "assistant"])
    p.add_argument("--length", type=int, default=8192)
    p.add_argument("--no-sharing", action="store_true")
    p.add_argument("--checkpointing", action="store_true")
    args = p.parse_args()
    targets = args.targets if args.targets == "all-linear" else args.targets.split(",")
    method = (
        Full()
        if args.method == "full"
        else LoRA(rank=args.rank, alpha=2.0 * args.rank, targets=targets)
    )
    with tempfile.TemporaryDirectory() as scratch:
        config = RunConfig(
            base=args.base,
            quantize=args.quantize,
            dtype=args.dtype,
            out=f"{scratch}/run",
            method=method,
            batch=args.batch,
            steps=args.steps + 1,
            data=DataConfig(train=args.rows, validation_share=0.0, train_on=args.train_on),
            order=args.order,
            learning_rate=args.lr,
            schedule="constant",
            warmup=0.0,
            length=args.length,
            seed=args.seed,
            share_prompt=not args.no_sharing,
            checkpointing=args.checkpointing,
        )
        started = time.perf_counter()
        summary = api.train_run(config, resume=False, screen=QuietScreen())
        whole = time.perf_counter() - started
        records = read_records(Path(scratch) / "run" / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "step"]
    timed = steps[1:]
    seconds, computed = sum(r["seconds"] for r in timed), sum(r["computed_tokens"] for r in timed)
    real, supervised = sum(r["tokens"] for r in timed), sum(r["trained_tokens"] for r in timed)
    base = api.load(args.base, quantize=args.quantize, dtype=args.dtype)
    config_ = base.config.get_text_config()
    rate = matrix_rate(
        max(1, computed // len(timed)), config_.hidden_size, config_.intermediate_size, base.dtype
    )
    flops = step_flops(base, None if args.method == "full" else args.rank, computed, supervised)
    line = {
        "tool": "veneer",
        "method": args.method,
        "real_tokens": real,
        "supervised_tokens": supervised,
        "computed_tokens": computed,
        "examples": args.batch * args.steps,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(real / seconds, 1),
        "examples_per_s": round(args.batch * args.steps / seconds, 3),
        "first_loss": round(steps[0]["loss"], 4),
        "last_loss": round(steps[-1]["loss"], 4),
        "peak_rss_mib": round(summary["peak_memory_bytes"] / 2**20, 1),
        "idle_rss_mib": round(summary["idle_memory_bytes"] / 2**20, 1),
        "gflops_per_s": round(flops / seconds / 1e9, 1),
        "matrix_gflops_per_s": round(rate, 1),
        "share_of_matrix_rate": round(flops / seconds / 1e9 / rate, 3),
        "whole_run_seconds": round(whole, 1),
        "settings": {
            **{k: v for k, v in vars(args).items() if k not in ("base", "rows")},
            "threads": torch.get_num_threads(),
        },
        "versions": summary["versions"],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
