"""Trains on pairs with Veneer and with TRL in alternating rounds, and prints both and their ratio.

    python benchmarks/pairs_speed.py --base FOLDER --rows e2e.jsonl viggo.jsonl --peer-python PY
    python benchmarks/pairs_speed.py ... --rows e2e.jsonl --steps 3 --rounds 2    (4 minutes)

A row's rejected answer is the answer of the row behind it. Both train the same new LoRA of rank 16
by `dpo` on the same pairs in file order, in bf16. The last column is the largest difference of the
loss of a step: rounding, which grows with the steps. Veneer computes the reference once, before
step 1; its pairs per second count this time (for the share of pairs that is timed). TRL computes it
in each step. PY is the Python of an environment with `trl` and `peft`.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train_speed import run, spread

import veneer

HERE = Path(__file__).parent


def write_pairs(source: Path, target: Path, count: int) -> None:
    """Writes `count` pairs from rows of `messages`."""
    rows = [json.loads(line)["messages"] for line in source.read_text("utf-8").splitlines()]
    with target.open("w", encoding="utf-8") as file:
        for row, following in itertools.islice(itertools.pairwise(rows), count):
            pair = {"prompt": row[:-1], "chosen": row[-1:], "rejected": following[-1:]}
            file.write(json.dumps(pair) + "\n")


def save_start(base: str, folder: Path) -> None:
    """Saves a new adapter, which both tools train on."""
    with veneer.load(base).trainer(veneer.LoRA(rank=16, alpha=32.0)) as trainer:
        trainer.save(folder)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Trains once with Veneer. Without a cache, so that the reference is computed."""
    from veneer import api
    from veneer.training import trainee
    from veneer.training.config import DataConfig, RunConfig
    from veneer.training.output.records import read_records
    from veneer.training.output.screen import QuietScreen

    compute, seconds = trainee.compute_reference, []

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = compute(*arguments)
        seconds.append(time.perf_counter() - start)
        return result

    trainee.compute_reference = timed  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as scratch:
        config = RunConfig.model_validate(
            {
                "base": args.base,
                "out": f"{scratch}/run",
                "from_adapter": [args.start],
                "dtype": args.dtype,
                "objective": "dpo",
                "batch": args.batch,
                "steps": args.steps + 1,
                "data": DataConfig(train=args.pairs, validation_share=0.0),
                "order": "file",
                "learning_rate": args.lr,
                "schedule": "constant",
                "warmup": 0.0,
            }
        )
        summary = api.train_run(config, resume=False, screen=QuietScreen())
        records = read_records(Path(scratch) / "run" / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    timed_seconds = sum(record["seconds"] for record in steps[1:])
    reference = sum(seconds) * args.steps / (args.steps + 1)
    return {
        "tool": "veneer",
        "pairs_per_s": round(args.batch * args.steps / (timed_seconds + reference), 3),
        "reference_seconds": round(sum(seconds), 3),
        "losses": [round(step["loss"], 4) for step in steps],
        "peak_rss_mib": round(summary["peak_memory_bytes"] / 2**20, 1),
        "idle_rss_mib": round(summary["idle_memory_bytes"] / 2**20, 1),
    }


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base", required=True)
    p.add_argument("--rows", nargs="+", type=Path, default=[])
    p.add_argument("--pairs", help="train once with Veneer on these pairs, and print one JSON line")
    p.add_argument("--start", help="folder of the adapter that is trained on with --pairs")
    p.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    p.add_argument("--peer-python")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--steps", type=int, default=12)
    p.add_argument("--lr", type=float, default=2e-5)
    p.add_argument("--rounds", type=int, default=3)
    args = p.parse_args()
    if args.pairs:
        print(json.dumps(train(args)))
        return
    for rows in args.rows:
        lines: dict[str, list[dict[str, Any]]] = {"veneer": [], "trl": []}
        with tempfile.TemporaryDirectory() as scratch:
            pairs = Path(scratch) / "pairs.jsonl"
            write_pairs(rows, pairs, args.batch * (args.steps + 1))
            start = Path(scratch) / "start"
            save_start(args.base, start)
            common = ["--base", args.base, "--pairs", str(pairs), "--batch", str(args.batch)]
            common += ["--steps", str(args.steps), "--lr", str(args.lr), "--start", str(start)]
            common += ["--dtype", args.dtype]
            commands = [
                ("veneer", [sys.executable, str(HERE / "pairs_speed.py"), *common]),
                ("trl", [args.peer_python, str(HERE / "pairs_trl.py"), *common]),
            ]
            for number in range(args.rounds):
                for tool, command in commands if number % 2 == 0 else reversed(commands):
                    with tempfile.TemporaryDirectory() as cache:
                        lines[tool].append(run(command, VENEER_CACHE=cache))
        medians = {
            tool: statistics.median(line["pairs_per_s"] for line in tool_lines)
            for tool, tool_lines in lines.items()
        }
        idle = statistics.median(line["idle_rss_mib"] for line in lines["veneer"])
        memory = {
            tool: statistics.median(line["peak_rss_mib"] for line in tool_lines) - idle
            for tool, tool_lines in lines.items()
        }
        print(f"{rows.stem}: {args.rounds} rounds of {args.steps} steps, batch {args.batch}")
        for tool, tool_lines in lines.items():
            losses = tool_lines[0]["losses"]
            print(
                f"  {tool:6}  {spread(tool_lines, 'pairs_per_s')} pairs/s  {memory[tool]:.0f} MiB"
                f" above an idle process  loss {losses[0]} to {losses[-1]}"
            )
        both = zip(lines["veneer"][0]["losses"], lines["trl"][0]["losses"], strict=True)
        print(
            f"  pairs/s {medians['veneer'] / medians['trl']:.2f} times, memory"
            f" {memory['veneer'] / memory['trl']:.2f}, losses differ by at most"
            f" {max(abs(mine - peers) for mine, peers in both):.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
