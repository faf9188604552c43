"""Does it learn? The base, LoRA and full fine-tuning on held-out rows, over seeds.

    python benchmarks/quality.py json  --base smollm2-135m --train e2e.jsonl --test e2e_test.jsonl
                                       --steps 64
    python benchmarks/quality.py calls --base smollm2-135m
        (the demo's rows, settings and figures)

json: held-out loss (nats per trained token), answers that are JSON, field F1. calls: the share of
held-out questions whose answer parses, calls the right function, and has every argument accepted.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from veneer import api
from veneer.adapters.config import METHODS
from veneer.base import Base
from veneer.bases.names.packages import fetch_wheel
from veneer.data import bfcl
from veneer.data.examples import Row, RowRef
from veneer.demo import EPOCHS, MAX_NEW_TOKENS
from veneer.evaluation.answers import evaluate_answers
from veneer.training.config import DataConfig, RunConfig
from veneer.training.output.screen import QuietScreen

Measure = Callable[[Base], dict[str, float]]
RATES = {"json": {"lora": 5e-4, "full": 5e-5}, "calls": {"lora": 1e-3, "full": 1e-4}}


def json_measure(test: str) -> Measure:
    def measure(base: Base) -> dict[str, float]:
        found = api.evaluate(
            base, test, metrics=("json_validity", "field_f1"), max_new_tokens=96, batch=32
        )
        return {k: found[k] for k in ("loss", "json_validity", "field_f1")}

    return measure


def calls_measure(scratch: Path) -> tuple[str, Measure]:
    """The demo's training file, written to `scratch`, and its three figures on the held-out
    side."""
    trained, held_out = bfcl.split(bfcl.read_bfcl(fetch_wheel(bfcl.REQUIREMENT)))
    file = scratch / "train.jsonl"
    lines = [
        json.dumps({"messages": bfcl.to_messages(call)}, ensure_ascii=False) for call in trained
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [
        Row(RowRef("held_out", n), list(bfcl.to_messages(call)))
        for n, call in enumerate(held_out, 1)
    ]

    def measure(base: Base) -> dict[str, float]:
        answers = evaluate_answers(base, rows, max_new_tokens=MAX_NEW_TOKENS)
        scores = [bfcl.score(call, a.answer) for call, a in zip(held_out, answers, strict=True)]
        names = ("parses", "right_function", "arguments_accepted")
        return {name: statistics.mean(float(getattr(s, name)) for s in scores) for name in names}

    return str(file), measure


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("task", choices=["json", "calls"])
    p.add_argument("--base", required=True)
    p.add_argument("--train")
    p.add_argument("--test")
    p.add_argument("--methods", nargs="+", default=["lora", "full"], choices=sorted(METHODS))
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=64)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if args.task == "json":
            train, measure, budget = args.train, json_measure(args.test), {"steps": args.steps}
        else:
            (train, measure), budget = calls_measure(scratch), {"epochs": float(EPOCHS)}
        lines: list[dict[str, object]] = [
            {"method": "base", "seed": None, **measure(api.load(args.base))}
        ]
        print(json.dumps(lines[0]), flush=True)
        for seed in args.seeds:
            for method in args.methods:
                out = scratch / f"{method}-{seed}"
                config = RunConfig(
                    base=args.base,
                    data=DataConfig(train=train, validation_share=0.0),
                    out=str(out),
                    seed=seed,
                    method=METHODS[method](),
                    learning_rate=RATES[args.task][method],
                    keep=1,
                    **budget,
                )
                summary = api.train_run(config, resume=False, screen=QuietScreen())
                tuned = api.load(str(out / "model") if method == "full" else args.base)
                if method != "full":
                    tuned.use(tuned.load_adapter(out / "adapter", name="tuned"))
                line = {
                    "method": method,
                    "seed": seed,
                    **measure(tuned),
                    "file_bytes": summary["adapter_bytes"],
                }
                lines.append(line)
                print(json.dumps(line), flush=True)
        for method in args.methods:
            own = [line for line in lines if line["method"] == method]
            told = []
            for name in [k for k in own[0] if k not in ("method", "seed", "file_bytes")]:
                values = [float(line[name]) for line in own]  # type: ignore[arg-type]
                told.append(
                    f"{name} {statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"
                )
            print(f"{method}: {'  '.join(told)}")


if __name__ == "__main__":
    main()
