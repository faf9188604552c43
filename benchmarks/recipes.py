"""Held-out loss of recipes for LoRA beside full fine-tuning, after few steps.

    python benchmarks/recipes.py --data DATA --out recipes                      (hours)
    python benchmarks/recipes.py --data DATA --out recipes --tasks e2e_json \\
        --recipes "rate x1" "full at 4e-4, linear"
    python benchmarks/recipes.py --data DATA --out trial --steps 2 --train 64 --held-out 8

DATA holds the data sets of results.py. Its test rows are not read: a recipe trains on training rows
except the last --held-out, which measure it. LoRA's recipes train together, full fine-tuning alone.
Finished runs are not repeated. A change of seed, steps or rows needs another --out.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from results import TASKS, write_rows
from torch import nn

from veneer.cli.main import main as veneer
from veneer.models.left_out import reached_weights
from veneer.training import coordination

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
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
    "rate x1": lora(1.3e-3, "cosine"),
    "rate x2": lora(2.6e-3, "cosine"),
    "rate x3.5": lora(4.5e-3, "cosine"),
    "rate x2, linear": lora(2.6e-3, "linear"),
    "rate x3.8, linear": lora(5e-3, "linear"),
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
    "rank 32, linear": lora(1e-3, "linear", rank=32, alpha=256),
    "rank 64": lora(6.5e-4, "cosine", **WIDE),
    "rank 64, linear": lora(6.5e-4, "linear", **WIDE),
    "rank 64, higher rate, linear": lora(1e-3, "linear", **WIDE),
    "full at 1.5e-4": full(1.5e-4, "cosine"),
    "full at 3e-4": full(3e-4, "cosine"),
    "full at 6e-4": full(6e-4, "cosine"),
    "full at 2e-4, linear": full(2e-4, "linear"),
    "full at 4e-4, linear": full(4e-4, "linear"),
    "full at 6e-4, linear": full(6e-4, "linear"),
    "full without embeddings at 6e-4, linear": full(6e-4, "linear"),
}
"""Settings by name. `rate`, A and B are the learning rate, as a multiple of the default 1.3e-3."""


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
    if code := veneer(["train", str(file)]):
        raise SystemExit(code)


def run(task: str, args: argparse.Namespace) -> None:
    out = args.out / task
    train_file, *_ = write_rows(task, args, out / "rows")
    rows = train_file.read_text(encoding="utf-8").splitlines(keepends=True)
    files = {
        "train": (out / "rows" / "searched.jsonl", rows[: -args.held_out]),
        "validation": (out / "rows" / "held_out.jsonl", rows[-args.held_out :]),
    }
    for file, part in files.values():
        file.write_text("".join(part), encoding="utf-8")
    common = {
        "base": args.base,
        "data": {side: str(file) for side, (file, _) in files.items()},
        "steps": args.steps,
        "batch": args.batch,
        "seed": args.seed,
        "evaluate_every": args.steps,
        "keep": 1,
        "show_answers": False,
    }
    new = [
        name for name in args.recipes if not (out / folder_name(name) / "summary.json").is_file()
    ]
    jobs = []
    for name in new:
        job = {**RECIPES[name], "out": str(out / folder_name(name))}
        if job["method"] != "full":
            jobs.append(job)
        elif "without embeddings" in name:
            with frozen_embeddings():
                train({**common, **job}, out / "full.json")
        else:
            train({**common, **job}, out / "full.json")
    if jobs:
        train({**common, "jobs": jobs}, out / "jobs.json")


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, default=Path("recipes"))
    p.add_argument("--base", default="smollm2-135m")
    p.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    p.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--train", type=int, default=1600, help="rows to train on, with the held-out")
    p.add_argument("--validation", type=int, default=40, help="rows that results.py holds out")
    p.add_argument("--test", type=int, default=96, help="rows that results.py judges by")
    p.add_argument("--held-out", type=int, default=128, help="rows that measure a recipe")
    args = p.parse_args()
    lines = []
    for task in args.tasks:
        run(task, args)
        for name in args.recipes:
            file = args.out / task / folder_name(name) / "summary.json"
            loss = json.loads(file.read_text(encoding="utf-8"))["validation_loss"]
            lines.append(f"| {task} | {name} | {loss:.4f} |")
    print("\n".join(["| data | recipe | held-out loss |", "|---|---|---|", *lines]))


if __name__ == "__main__":
    main()
