"""Predicted against measured time of a step: ten runs on this machine, alone on it.

    python benchmarks/plan_time.py --base smollm2-135m

Rates are measured first (plan/machine.py), the step predicted from them and its dry run, then five
real steps timed. Prints predicted and measured tokens a second; the median of measured over
predicted speed is machine.py's STEP_SHARE.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import veneer
from veneer.adapters.config import METHODS
from veneer.bases.loading.from_config import blueprint
from veneer.plan.choice import Choice
from veneer.plan.machine import this_machine
from veneer.plan.planner import Planner

RUNS = (
    ("lora", 8, 128, False),
    ("lora", 8, 256, False),
    ("lora", 4, 512, False),
    ("lora", 2, 1024, False),
    ("lora", 8, 256, True),
    ("full", 8, 128, False),
    ("full", 4, 256, True),
    ("lora", 16, 64, False),
    ("lora", 1, 2048, False),
    ("full", 2, 512, False),
)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base", default="smollm2-135m")
    p.add_argument("--only", type=int, default=len(RUNS))
    p.add_argument("--steps", type=int, default=5)
    args = p.parse_args()
    found = blueprint(args.base)
    ratios = []
    for name, batch, length, kept in RUNS[: args.only]:
        method = METHODS[name]()
        choice = Choice(
            method=method, batch=batch, length=length, checkpointing=kept, share_prompt=False
        )
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            texts = (
                json.dumps({"text": f"{n % 10}" + " river" * (2 * length)})
                for n in range(batch * (args.steps + 1))
            )
            rows.write_text("\n".join(texts))
            data = {"train": str(rows), "long_rows": "cut", "validation_share": 0.0}
            settings = {
                "method": method,
                "batch": batch,
                "length": length,
                "checkpointing": kept,
                "steps": args.steps + 1,
            }
            summary = veneer.train(
                args.base,
                data,
                out=Path(folder) / "run",
                share_prompt=False,
                quiet=True,
                **settings,
            )
        planner = Planner(found)
        machine = this_machine(planner.step_run(choice).work, planner.dtype(choice))
        predicted = batch * length / planner.step_time(choice, machine).seconds
        measured = summary["tokens_per_second"]
        ratios.append(measured / predicted)
        label = f"{name} {batch} x {length}{' checkpointing' if kept else ''}"
        print(
            f"{label:<32} predicted {predicted:8.0f}  measured {measured:8.0f} tokens/s "
            f" {ratios[-1] - 1:+.0%}",
            flush=True,
        )
    print(
        f"median measured / predicted {statistics.median(ratios):.2f}; worst"
        f" {max(abs(r - 1) for r in ratios):.0%} off"
    )


if __name__ == "__main__":
    main()
