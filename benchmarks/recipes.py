"""Recipes for LoRA beside full fine-tuning: held-out loss, and quality on test rows.

    python benchmarks/recipes.py --data DATA --out recipes                      (hours)
    python benchmarks/recipes.py --data DATA --out recipes --tasks e2e_json \\
        --recipes "rate x1" "full at 4e-4, linear"
    python benchmarks/recipes.py --data DATA --out trial --steps 2 --train 64 --held-out 8

    python benchmarks/recipes.py --data DATA --out recipes --tasks e2e_json --judge \\
        --recipes "full at 4e-4, linear" "rate x1" "rate x2, linear"

DATA holds the data sets of results.py. A recipe trains on training rows except the last --held-out,
which measure it. LoRA's recipes train together, full fine-tuning alone. A recipe with a smaller
batch takes more steps, so all see equally many rows.

--judge evaluates the recipes on test rows, once all choices are made. Each is compared, row by row,
with the first of --recipes. Without --judge no test row is evaluated.

Finished runs and evaluations are not repeated. A change of seed, steps or rows needs another --out.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from results import TASKS, intent, write_rows
from torch import nn

import veneer
from veneer.cli.main import main as veneer_command
from veneer.evaluation.intervals import Counts, paired_difference
from veneer.evaluation.metrics.metric import ratio
from veneer.evaluation.metrics.registry import find_metrics
from veneer.evaluation.predictions import differences, read_predictions
from veneer.models.left_out import reached_weights
from veneer.trained import TrainedRun
from veneer.training import coordination

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PREDICTIONS = "test_predictions.jsonl"
LATE_LAYERS = list(range(10, 30))
WIDE = {"rank": 64, "alpha": 64, "rslora": True}


def lora(learning_rate: float, schedule: str, **method: Any) -> dict[str, Any]:
    return {
        "learning_rate": learning_rate,
        "schedule": schedule,
        "method": {"name": "lora", "rank": 16, "alpha": 32, **method},
    }


def full(learning_rate: float, schedule: str) -> dict[str, Any]:
    return {"learning_rate": learning_rate, "schedule": schedule, "method": "full"}


RECIPES: dict[str, dict[str, Any]] = {
    "default": {"method": "lora"},
    "rate x1": lora(1.3e-3, "cosine"),
    "rate x2": lora(2.6e-3, "cosine"),
    "rate x3.5": lora(4.5e-3, "cosine"),
    "rate x2, linear": lora(2.6e-3, "linear"),
    "rate x3.8, linear": lora(5e-3, "linear"),
    "A x0.5, B x2, linear": lora(6.5e-4, "linear", lr_ratio=4),
    "A x0.25, B x1, linear": lora(3e-4, "linear", lr_ratio=4),
    "A x0.25, B x4": lora(3.3e-4, "cosine", lr_ratio=16),
    "A x0.5, B x8": lora(6.5e-4, "cosine", lr_ratio=16),
    "B x4": lora(1.3e-3, "cosine", lr_ratio=4),
    "B x8": lora(1.3e-3, "cosine", lr_ratio=8),
    "A x2, B x8": lora(2.6e-3, "cosine", lr_ratio=4),
    "B x4, warm-up of 15%": {**lora(1.3e-3, "cosine", lr_ratio=4), "warmup": 0.15},
    "B x4, constant": lora(1.3e-3, "constant", lr_ratio=4),
    "B x4, linear": lora(1.3e-3, "linear", lr_ratio=4),
    "A x1.5, B x6, linear": lora(2e-3, "linear", lr_ratio=4),
    "A x2.3, B x9, linear": lora(3e-3, "linear", lr_ratio=4),
    "A x2, B x4, linear": lora(2.6e-3, "linear", lr_ratio=2),
    "A x2.7, B x5.4, linear": lora(3.5e-3, "linear", lr_ratio=2),
    "B x4, norms": lora(
        1.3e-3,
        "cosine",
        lr_ratio=4,
        train_modules=["input_layernorm", "post_attention_layernorm", "norm"],
    ),
    "B x4, head": lora(1.3e-3, "cosine", lr_ratio=4, targets=[*LAYERS, "lm_head"]),
    "B x6, embeddings, linear": lora(2e-3, "linear", lr_ratio=4, targets=[*LAYERS, "embed_tokens"]),
    "B x6, embeddings and head, linear": lora(
        2e-3, "linear", lr_ratio=4, targets=[*LAYERS, "embed_tokens", "lm_head"]
    ),
    "MLP of rank 25, linear": lora(
        2e-3, "linear", lr_ratio=4, rank=25, alpha=50, targets=LAYERS[4:]
    ),
    "last 20 layers of rank 24, linear": lora(
        2e-3, "linear", lr_ratio=4, rank=24, alpha=48, layers=LATE_LAYERS
    ),
    "batch 4": {**lora(1.3e-3, "cosine"), "batch": 4},
    "batch 2": {**lora(1.3e-3, "cosine"), "batch": 2},
    "batch 2, B x3, linear": {**lora(1e-3, "linear", lr_ratio=4), "batch": 2},
    "rank 32, linear": lora(1e-3, "linear", rank=32, alpha=256),
    "rank 64": lora(6.5e-4, "cosine", **WIDE),
    "rank 64, linear": lora(6.5e-4, "linear", **WIDE),
    "rank 64, higher rate, linear": lora(1e-3, "linear", **WIDE),
    "full at 1.5e-4": full(1.5e-4, "cosine"),
    "full at 3e-4": full(3e-4, "cosine"),
    "full at 6e-4": full(6e-4, "cosine"),
    "full at 1e-4, linear": full(1e-4, "linear"),
    "full at 2e-4, linear": full(2e-4, "linear"),
    "full at 4e-4, linear": full(4e-4, "linear"),
    "full at 6e-4, linear": full(6e-4, "linear"),
    "batch 2, full at 3e-4, linear": {**full(3e-4, "linear"), "batch": 2},
    "full without embeddings at 6e-4, linear": full(6e-4, "linear"),
}
"""Settings by name. `rate`, A and B are the learning rate, as a multiple of 1.3e-3. On SmolLM2-135M
`default` is `B x4, linear`; until December 2026 it was `rate x1`."""


@contextmanager
def frozen_embeddings() -> Iterator[None]:
    """Within the block full fine-tuning leaves the table of embeddings, and a head tied to it, as
    they are."""

    def without_embeddings(model: nn.Module, left_out: Any) -> dict[str, nn.Parameter]:
        weights = reached_weights(model, left_out)
        return {path: weight for path, weight in weights.items() if "embed_tokens" not in path}

    coordination.reached_weights = without_embeddings
    try:
        yield
    finally:
        coordination.reached_weights = reached_weights


def folder_name(recipe: str) -> str:
    return recipe.replace(", ", "_").replace(" ", "-").replace("%", "")


def train(settings: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(settings) + "\n", encoding="utf-8")  # JSON is YAML
    if code := veneer_command(["train", str(file)]):
        raise SystemExit(code)


def row_files(task: str, args: argparse.Namespace) -> dict[str, Path]:
    """Writes the rows to train on, the rows held out of them, and the test rows."""
    folder = args.out / task / "rows"
    train_file, _, test_file = write_rows(task, args, folder)
    rows = train_file.read_text(encoding="utf-8").splitlines(keepends=True)
    files = {"train": folder / "searched.jsonl", "held_out": folder / "held_out.jsonl"}
    files["train"].write_text("".join(rows[: -args.held_out]), encoding="utf-8")
    files["held_out"].write_text("".join(rows[-args.held_out :]), encoding="utf-8")
    return {**files, "test": test_file}


def train_recipes(task: str, files: dict[str, Path], args: argparse.Namespace) -> None:
    out = args.out / task
    common = {
        "base": args.base,
        "data": {"train": str(files["train"]), "validation": str(files["held_out"])},
        "seed": args.seed,
        "keep": 1,
        "show_answers": False,
    }
    jobs = []
    for name in args.recipes:
        if (out / folder_name(name) / "summary.json").is_file():
            continue
        recipe = RECIPES[name]
        batch = recipe.get("batch", args.batch)
        steps = args.steps * args.batch // batch
        job = {**recipe, "batch": batch, "steps": steps, "evaluate_every": steps}
        job["out"] = str(out / folder_name(name))
        if job["method"] != "full":
            jobs.append(job)
        elif "without embeddings" in name:
            with frozen_embeddings():
                train({**common, **job}, out / "full.json")
        else:
            train({**common, **job}, out / "full.json")
    if jobs:
        train({**common, "jobs": jobs}, out / "jobs.json")


def evaluate(task: str, name: str, test_file: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates a recipe on test rows, once: later calls read the result. Returns what
    veneer.evaluate does."""
    run = args.out / task / folder_name(name)
    result_file = run / "test.json"
    if result_file.is_file():
        figures: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
        return figures
    _, metrics, new_tokens = TASKS[task]
    labels: list[str] = []
    if task == "banking77":
        categories = (args.data / "banking77" / "categories.json").read_text(encoding="utf-8")
        labels = [intent(category) for category in json.loads(categories)]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    figures = veneer.evaluate(
        TrainedRun(run, summary).base,
        test_file,
        metrics=metrics.split(","),
        labels=labels,
        max_new_tokens=new_tokens,
        predictions=run / PREDICTIONS,
    )
    result_file.write_text(json.dumps(figures) + "\n", encoding="utf-8")
    return figures


def test_lines(task: str, test_file: Path, args: argparse.Namespace) -> list[str]:
    """Returns a line of the table for each recipe and figure of the test rows."""
    figures = [evaluate(task, name, test_file, args) for name in args.recipes]
    predictions = [
        read_predictions(args.out / task / folder_name(name) / PREDICTIONS) for name in args.recipes
    ]
    rows = test_file.read_text(encoding="utf-8").splitlines()
    numbers: dict[str, int] = {}
    prompts = [numbers.setdefault(json.loads(row)["prompt"], len(numbers)) for row in rows]
    metrics = find_metrics(TASKS[task][1].split(","))
    lines = []
    for name, of_recipe, ours in zip(args.recipes, figures, predictions, strict=True):
        for measure, compared in differences(ours, predictions[0], metrics, prompts).items():
            difference = with_interval(compared["difference"], compared["interval"])
            lines.append(row_of([task, "test", name, measure, of_recipe[measure], difference]))
    return lines


def held_out_counts(run: Path) -> Counts:
    """Returns (N, 2): the nats of each held-out row at the end of a run, and the mean number of
    tokens of these rows."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    step = summary["steps"]
    (state,) = (run / "checkpoints").glob(f"*{step}/state.json")
    nats = json.loads(state.read_text(encoding="utf-8"))["progress"]["nats"][str(step)]
    tokens = summary["held_out"]["tokens"] / len(nats)
    return np.array([[row_nats, tokens] for row_nats in nats], dtype=np.float64)


def held_out_lines(task: str, args: argparse.Namespace) -> list[str]:
    """Returns a line of the table for each recipe's loss on the held-out rows."""
    counts = [held_out_counts(args.out / task / folder_name(name)) for name in args.recipes]
    lines = []
    for name, ours in zip(args.recipes, counts, strict=True):
        difference = with_interval(*paired_difference(ours, counts[0], ratio))
        lines.append(row_of([task, "held out", name, "loss", ratio(ours.sum(axis=0)), difference]))
    return lines


def with_interval(difference: float, ends: Sequence[float] | None) -> str:
    interval = " to ".join(f"{end:+.4f}" for end in ends or [])
    return f"{difference:+.4f} ({interval or 'no interval'})"


def row_of(columns: Sequence[str | float]) -> str:
    """Returns a row of a Markdown table, numbers with four decimals."""
    texts = [text if isinstance(text, str) else f"{text:.4f}" for text in columns]
    return f"| {' | '.join(texts)} |"


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, default=Path("recipes"))
    p.add_argument("--base", default="smollm2-135m")
    p.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    p.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    p.add_argument("--judge", action="store_true", help="evaluate on test rows too")
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--train", type=int, default=1600, help="rows to train on, with the held-out")
    p.add_argument("--validation", type=int, default=40, help="rows that results.py holds out")
    p.add_argument("--test", type=int, default=96, help="test rows; no prompt of theirs is trained")
    p.add_argument("--held-out", type=int, default=128, help="rows that measure a recipe")
    args = p.parse_args()
    lines = []
    for task in args.tasks:
        files = row_files(task, args)
        train_recipes(task, files, args)
        lines += held_out_lines(task, args)
        if args.judge:
            lines += test_lines(task, files["test"], args)
    print(row_of(["data", "rows", "recipe", "measure", "value", f"minus {args.recipes[0]}"]))
    print("\n".join(["|---|---|---|---|---|---|", *lines]))


if __name__ == "__main__":
    main()
