"""Which learning rate each method wants: held-out loss over a small grid, on real rows.

    python benchmarks/sweep.py --base smollm2-135m --rows e2e_json=train.jsonl:test.jsonl \\
        viggo_text=... --out
    sweep.json

The grid of a method is its default rate times --factors, 1/4 to 4. Every run has the same rows,
steps, batch and seed. Runs that --out already holds are not repeated, so it goes on where it was
stopped; a run that diverges counts as infinite. The table shows the best rate of each method and
what the default gives up against it, in nats per token.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

from veneer import api
from veneer.adapters.config import Bottleneck, DoRA, Full, LoRA, MethodConfig, Prefix
from veneer.errors import DivergedError
from veneer.models.load import load_base
from veneer.training.config import DataConfig, RunConfig
from veneer.training.output.screen import QuietScreen

METHODS: dict[str, MethodConfig] = {
    "lora": LoRA(),
    "rslora": LoRA(rank=64, alpha=32.0, rslora=True),
    "lora+": LoRA(lr_ratio=16.0),
    "pissa": LoRA(init="pissa", svd_iterations=16),
    "olora": LoRA(init="olora"),
    "eva": LoRA(init="eva"),
    "dora": DoRA(),
    "houlsby": Bottleneck(placement="houlsby"),
    "pfeiffer": Bottleneck(placement="pfeiffer"),
    "parallel": Bottleneck(placement="parallel"),
    "prefix": Prefix(),
    "prefix, mlp": Prefix(projection=512),
    "full": Full(),
}
FACTORS = [0.25, 0.5, 1.0, 2.0, 4.0]


def held_out(args: argparse.Namespace, files: str, method: MethodConfig, rate: float) -> float:
    train, _, test = files.partition(":")
    with tempfile.TemporaryDirectory() as scratch:
        config = RunConfig(
            base=args.base,
            out=f"{scratch}/run",
            method=method,
            batch=args.batch,
            steps=args.steps,
            data=DataConfig(train=train, validation=test or None),
            learning_rate=rate,
            seed=args.seed,
            keep=1,
            evaluate_every=args.steps,
            save_every=args.steps,
        )
        try:
            loss = api.train_run(config, resume=False, screen=QuietScreen())["validation_loss"]
        except DivergedError:
            return math.inf
    if loss is None:
        raise SystemExit(f"{files}: no rows are held out: name a test file after the colon")
    return float(loss)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--base", required=True)
    p.add_argument("--rows", nargs="+", required=True, help="name=train.jsonl:test.jsonl")
    p.add_argument("--out", type=Path, default=Path("sweep.json"))
    p.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    p.add_argument("--factors", type=float, nargs="+", default=FACTORS, help="of the default rates")
    p.add_argument("--steps", type=int, default=150)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    base = load_base(args.base, device="cpu")
    methods = {name: METHODS[name].for_learning_rate(None) for name in args.methods}
    defaults = {name: method.default_learning_rate(base) for name, method in methods.items()}
    budget = {"base": args.base, "steps": args.steps, "batch": args.batch, "seed": args.seed}
    stored = (
        json.loads(args.out.read_text()) if args.out.exists() else {"budget": budget, "losses": {}}
    )
    if stored["budget"] != budget:
        raise SystemExit(f"{args.out} holds runs of another budget: {stored['budget']}")
    losses: dict[str, float | None] = stored["losses"]
    for entry in args.rows:
        task, _, files = entry.partition("=")
        for name in args.methods:
            for factor in args.factors:
                rate = defaults[name] * factor
                key = f"{task} {name} {rate:g}"
                if key not in losses:
                    loss = held_out(args, files, methods[name], rate)
                    losses[key] = loss if math.isfinite(loss) else None
                    args.out.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
                    print(f"{key}: {loss:.4f}", flush=True)
    print(
        "| rows | method | best rate | its loss | default rate | its loss"
        " |\n|---|---|---|---|---|---|"
    )
    for task in (entry.partition("=")[0] for entry in args.rows):
        for name in args.methods:
            default = defaults[name]
            rates = {
                factor: losses[f"{task} {name} {default * factor:g}"] for factor in args.factors
            }
            finite = {factor: loss for factor, loss in rates.items() if loss is not None}
            if not finite:
                print(f"| {task} | {name} | none | diverged at every rate | {default:g} | |")
                continue
            best = min(finite, key=lambda factor: finite[factor])
            own = (
                "not run"
                if 1.0 not in rates
                else "diverged"
                if rates[1.0] is None
                else f"{rates[1.0]:.4f}"
            )
            print(
                f"| {task} | {name} | {default * best:g} | {finite[best]:.4f} | {default:g} |"
                f" {own} |"
            )


if __name__ == "__main__":
    main()
