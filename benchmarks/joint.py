"""Jobs that train together beside the same jobs one after another, and a sweep of twelve jobs.

    python benchmarks/joint.py --data DATA --task viggo_text --batch 1 --jobs 8 --quantize nf4
    python benchmarks/joint.py --data DATA --task viggo_text --batch 1 --sweep

DATA holds the data sets of results.py. A cell prints one line of JSON: examples a second of the
steps, seconds until the last adapter with and without start-up, and peak memory. Every figure comes
from processes of their own, started one at a time. Jobs one after another differ by their seed
alone, so --singles of them are measured and their mean counts for all. With --sweep twelve learning
rates and ranks train for equal steps, and once more with halving. The first round of a cell fills
caches of plans and proofs, so take the second of --rounds 2. Wants a quiet machine.

The bound of a cell with batch 1 is the speed of one job whose batch has the rows of all jobs,
without shared prompts, as each job computes its own. Jobs together are at most as fast per row.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from results import TASKS, write_rows

from veneer import api
from veneer.quant.config import FORMATS
from veneer.training.config import RunConfig
from veneer.training.output.screen import QuietScreen
from veneer.training.supervisor import SuccessiveHalving, halving_shares

SWEEP = list(product((3e-4, 6e-4, 1.3e-3, 2.6e-3), (8, 16, 32)))
"""Learning rates and ranks of the sweep."""


def settings(args: argparse.Namespace, rows: list[Path], **fields: Any) -> dict[str, Any]:
    train, validation, _ = rows
    return {
        "base": args.base,
        "quantize": args.quantize,
        "data": {"train": str(train), "validation": str(validation)},
        "batch": args.batch,
        "steps": args.steps,
        "evaluate_every": args.steps,
        "show_answers": False,
        "keep": 1,
        **fields,
    }


def train(request: dict[str, Any]) -> dict[str, Any]:
    """Trains jobs in this process; returns their figures."""
    configs = [RunConfig.of(fields) for fields in request["jobs"]]
    shares = halving_shares(len(configs)) if request["halving"] else None
    results = api.train_jobs(
        configs,
        resume=False,
        screens=[QuietScreen() for _ in configs],
        supervisor=None if shares is None else SuccessiveHalving(shares),
    )
    summaries = [result for result in results if isinstance(result, dict)]
    if len(summaries) < len(results):
        raise SystemExit(next(str(result) for result in results if not isinstance(result, dict)))
    timed = [s for s in summaries if s["seconds"]]  # a job that stops at step 1 has no timed step
    seconds = sum(summary["seconds"] for summary in timed)
    examples = sum(summary["examples_per_second"] * summary["seconds"] for summary in timed)
    return {
        "examples_per_second": examples / seconds,
        "step_seconds": sum(summary["total_seconds"] for summary in summaries),
        "steps": sum(summary["steps"] for summary in summaries),
        "peak_memory_bytes": max(summary["peak_memory_bytes"] for summary in summaries),
        "best_loss": min(summary["validation_loss"] for summary in summaries),
    }


def measured(jobs: list[dict[str, Any]], *, halving: bool = False) -> dict[str, Any]:
    """Trains jobs in a new process; adds the seconds of the whole process."""
    with tempfile.TemporaryDirectory() as scratch:
        placed = [{**job, "out": f"{scratch}/{number}"} for number, job in enumerate(jobs)]
        request = json.dumps({"jobs": placed, "halving": halving})
        start = time.perf_counter()
        child = subprocess.run(
            [sys.executable, __file__, "--child"],
            input=request,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - start
    figures: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return {**figures, "seconds_to_last_adapter": seconds}


def one_after_another(jobs: list[dict[str, Any]], singles: int) -> dict[str, Any]:
    """Measures the first jobs, each in its process; their means count for all."""
    figures = [measured([job]) for job in jobs[:singles]]
    means = {name: mean(figure[name] for figure in figures) for name in figures[0]}
    count = len(jobs)
    totals = {
        name: count * means[name]
        for name in ("step_seconds", "steps", "seconds_to_last_adapter", "peak_memory_bytes")
    }
    return {**means, **totals, "measured": len(figures)}


def cell(args: argparse.Namespace, rows: list[Path]) -> dict[str, Any]:
    jobs = [settings(args, rows, seed=seed) for seed in range(args.jobs)]
    alone = one_after_another(jobs, args.singles)
    joint = measured(jobs)
    figures = {"together": joint, "one after another": alone, **ratios(alone, joint)}
    if args.batch > 1:  # rows of one job share their prompts
        return figures
    bound = measured([settings(args, rows, batch=args.jobs, share_prompt=False)])
    return {
        **figures,
        "one large batch": bound,
        "bound of times faster steps": ratio(bound, alone, "examples_per_second"),
    }


def sweep(args: argparse.Namespace, rows: list[Path]) -> dict[str, Any]:
    jobs = [
        settings(
            args, rows, learning_rate=rate, method={"name": "lora", "rank": rank, "alpha": 2 * rank}
        )
        for rate, rank in SWEEP
    ]
    alone, joint = one_after_another(jobs, args.singles), measured(jobs)
    halved = measured(jobs, halving=True)
    return {
        "together": joint,
        "together with halving": halved,
        "one after another": alone,
        **ratios(alone, joint),
        "with halving": ratios(alone, halved),
    }


def ratios(alone: dict[str, Any], joint: dict[str, Any]) -> dict[str, float]:
    """Returns times and memory of jobs one after another, divided by those together."""
    start_seconds = [f["seconds_to_last_adapter"] - f["step_seconds"] for f in (alone, joint)]
    return {
        "times faster to the last adapter": ratio(alone, joint, "seconds_to_last_adapter"),
        "times faster steps": ratio(alone, joint, "step_seconds"),
        "seconds of start-up saved": round(start_seconds[0] - start_seconds[1], 1),
        "share of the memory of k processes": round(
            1 / ratio(alone, joint, "peak_memory_bytes"), 3
        ),
    }


def ratio(alone: dict[str, Any], joint: dict[str, Any], name: str) -> float:
    return round(float(alone[name] / joint[name]), 3)


def main() -> None:
    if sys.argv[1:] == ["--child"]:
        print(json.dumps(train(json.load(sys.stdin))))
        return
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--task", choices=list(TASKS), default="viggo_text")
    p.add_argument("--base", default="smollm2-135m")
    p.add_argument("--quantize", choices=FORMATS)
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--jobs", type=int, default=8, help="k, the number of jobs")
    p.add_argument("--steps", type=int, default=12)
    p.add_argument("--singles", type=int, default=2, help="jobs measured alone")
    p.add_argument("--sweep", action="store_true", help="twelve jobs, also with halving")
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--train", type=int, default=400, help="rows to train on")
    p.add_argument("--validation", type=int, default=16, help="held-out rows")
    p.add_argument("--test", type=int, default=1)
    args = p.parse_args()
    named = {"task": args.task, "base": args.base, "quantize": args.quantize, "batch": args.batch}
    named |= {"jobs": len(SWEEP) if args.sweep else args.jobs, "steps": args.steps}
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(args.task, args, Path(folder))
        for _ in range(args.rounds):
            figures = (sweep if args.sweep else cell)(args, rows)
            print(json.dumps({**named, **figures}), flush=True)


if __name__ == "__main__":
    main()
