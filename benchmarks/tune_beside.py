"""`veneer tune` beside the defaults of `veneer train` and full fine-tuning, on rows that none saw.

    python benchmarks/tune_beside.py --data DATA --out beside --tasks banking77 --minutes 10

DATA holds the data sets of results.py. `tune` divides --rows rows itself. The default LoRA and full
fine-tuning then train on the same rows, for as many passes as tune's winner, with batches of 8, and
are judged on the same rows. Prints a table: loss, the metric that tune chose, minutes of training,
and differences row by row, tune's minus the other's, with 95% intervals. Wants a quiet machine.
Finished parts are not repeated.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from results import TASKS, write_rows

import veneer
from veneer import api
from veneer.data.files.sources import read_rows
from veneer.evaluation.metrics.fitting import longest_answer, metrics_for
from veneer.trained import TrainedRun
from veneer.training.config import RunConfig
from veneer.training.output.screen import QuietScreen

BATCH = 8


def tuned(task: str, args: argparse.Namespace) -> dict[str, Any]:
    folder = args.out / task / "tune"
    if not (folder / "tune.json").is_file():
        rows, *_ = write_rows(task, args, args.out / task / "rows")
        start = time.perf_counter()
        veneer.tune(args.base, rows, out=folder, minutes=args.minutes, say=print)
        minutes = (time.perf_counter() - start) / 60
        (folder / "minutes.json").write_text(json.dumps(minutes) + "\n", encoding="utf-8")
    result: dict[str, Any] = json.loads((folder / "tune.json").read_text(encoding="utf-8"))
    result["minutes"] = json.loads((folder / "minutes.json").read_text(encoding="utf-8"))
    return result


def beside(task: str, method: str, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains with the method's defaults; returns the figures on the rows to judge with."""
    data, run = args.out / task / "tune" / "data", args.out / task / method
    if not (run / "summary.json").is_file():
        fields = {
            "base": args.base,
            "data": {"train": str(data / "train.jsonl"), "validation_share": 0.0},
            "method": method,
            "batch": BATCH,
            "steps": steps,
            "out": str(run),
            "show_answers": False,
        }
        api.train_run(RunConfig.of(fields), resume=False, screen=QuietScreen())
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    rows = list(read_rows(str(data / "judge.jsonl")))
    base = TrainedRun(run, summary).base
    figures = veneer.evaluate(
        base,
        data / "judge.jsonl",
        metrics=metrics_for(rows),
        max_new_tokens=longest_answer(base.tokenizer, rows),
        against=args.out / task / "tune" / "judging" / "adapter.jsonl",
    )
    return {**figures, "minutes": summary["seconds"] / 60}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--train", type=int, default=600, help="rows, divided by tune")
    parser.add_argument("--validation", type=int, default=1)
    parser.add_argument("--test", type=int, default=1)
    args = parser.parse_args()
    for task in args.tasks:
        result = tuned(task, args)
        steps = max(1, round(result["run"]["epochs"] * result["rows"]["train"] / BATCH))
        figures = {method: beside(task, method, steps, args) for method in ("lora", "full")}
        print(json.dumps({"task": task, "steps": steps, "tune": result, **figures}), flush=True)


if __name__ == "__main__":
    main()
