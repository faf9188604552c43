"""What training makes a model forget, what replay saves of it, and what a second stage keeps of the
first.

    python benchmarks/forgetting.py --data DATA --out forgetting    (90 minutes; restartable)
    python benchmarks/forgetting.py --data DATA --out forgetting --steps 4 --train 64 --test 8 \\
        --replies 12    (a trial)
    python benchmarks/forgetting.py --data DATA --out forgetting --steps 31 --batch 4 --shares \\
        --weights 1 --replies 40 --reply-tokens 64 --losses    (the KL on replay rows, losses alone)

replay   each of four data sets (results.py), LoRA, once as it is and once with a share of rows that
         the base drew before (`veneer data replay`), so that they teach nothing new; both see as
         many rows of the task. Its own measure on held-out rows, and forgetting: nats per token of
         general text that no run saw, after - before.
weights  the same, with KL(base, adapter) on plain texts beside the task's rows, half as many a
         step (`replay` in a run file)
stages   text to JSON first, then ViGGO from that adapter, with a share of the first set's rows and
         without: both measures after each stage.

Quality alone: nothing here is timed, so the machine may be busy. Writes OUT/forgetting.json as
results come.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from results import TASKS, intent, write_rows

from veneer import api
from veneer.base import Base
from veneer.data.files.writing import write_records
from veneer.decoding.replay import draw_replay
from veneer.training.config import RunConfig
from veneer.training.output.screen import QuietScreen

PRIMARY = {
    "e2e_json": "field_f1",
    "viggo_text": "bleu",
    "banking77": "accuracy",
    "wikisql": "exact_match",
}
STAGES = ("e2e_json", "viggo_text")


def measure(
    base: Base, task: str, args: argparse.Namespace, predictions: Path, against: Path | None
) -> dict[str, Any]:
    """Returns the task's measure and loss on its test rows, and the loss on general text.

    against: predictions of the run without replay, from which differences are taken
    """
    labels, names = [], [] if args.losses else [PRIMARY[task]]
    if task == "banking77" and names:
        categories = (args.data / "banking77" / "categories.json").read_text(encoding="utf-8")
        labels = [intent(name) for name in json.loads(categories)]
    result = api.evaluate(
        base,
        args.out / "rows" / task / "test.jsonl",
        metrics=names,
        labels=labels,
        max_new_tokens=TASKS[task][2],
        batch=16,
        general="built-in",
        predictions=predictions,
        against=against,
    )
    general = result["general"]
    figures = {name: result[name] for name in (*names, "loss")}
    figures["general_loss"] = general["loss"]
    if "forgetting" in general:
        figures["forgetting"] = general["forgetting"]
        figures["interval"] = general["forgetting_interval"]
    if against is not None:
        figures["minus_alone"] = {name: result["against"][name] for name in (*names, "loss")}
    return figures


def train(name: str, data: Any, args: argparse.Namespace, steps: int, **settings: Any) -> Path:
    """Trains a run, or continues it, and returns its folder."""
    out: Path = args.out / "runs" / name
    if not (out / "summary.json").is_file():
        is_started = (out / "run.yaml").is_file()
        rate = {"learning_rate": args.rate} if args.rate else {}
        config = (
            api.resume_config(out)
            if is_started
            else RunConfig.of(
                {
                    "base": args.base,
                    "data": {"train": data, "validation_share": 0.0},
                    "out": str(out),
                    "batch": args.batch,
                    "steps": steps,
                    "method": "lora",
                    "seed": args.seed,
                    **rate,
                    **settings,
                }
            )
        )
        api.train_run(config, resume=is_started, screen=QuietScreen())
    return out


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, default=Path("forgetting"))
    p.add_argument("--base", default="smollm2-135m")
    p.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    p.add_argument("--shares", type=float, nargs="*", default=[0.1, 0.25])
    p.add_argument("--weights", type=float, nargs="*", default=[], help="of the KL on replay rows")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--losses", action="store_true", help="generate no answers")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rate", type=float, help="learning rate; default: the method's own")
    p.add_argument("--train", type=int, default=1600)
    p.add_argument("--validation", type=int, default=64)
    p.add_argument("--test", type=int, default=200)
    p.add_argument("--replies", type=int, default=240, help="generated rows of each kind")
    p.add_argument("--reply-tokens", type=int, default=128, help="most tokens of a generated row")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "forgetting.json"
    results: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    rows = {task: str(write_rows(task, args, args.out / "rows" / task)[0]) for task in args.tasks}
    base = api.load(args.base)
    replay = [args.out / "rows" / f"{name}.jsonl" for name in ("answers", "texts")]
    if not all(path.is_file() for path in replay):
        drawn = draw_replay(base, 2 * args.replies, max_new_tokens=args.reply_tokens)
        for path, some_rows in zip(replay, drawn.values(), strict=True):
            write_records(path, some_rows)

    def keep(name: str, task: str, run: Path | None, against: str | None = None) -> None:
        key = f"{name}: {task}"
        if key in results:
            return
        predictions = args.out / "predictions"
        predictions.mkdir(exist_ok=True)
        files = predictions / f"{key}.jsonl", against and predictions / f"{against}: {task}.jsonl"
        if run is None:
            results[key] = measure(base, task, args, *files)
        else:
            adapter = base.load_adapter(run)
            with base.using(adapter):
                results[key] = measure(base, task, args, *files)
            base.detach(adapter)
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(key, json.dumps(results[key]), flush=True)

    for task in args.tasks:
        if not args.losses:
            keep("base", task, None)
        keep("alone", task, train(f"{task}-alone", rows[task], args, args.steps))
        for share in args.shares:
            mixed: list[dict[str, Any]] = [{"path": rows[task]}]
            mixed += [
                {"path": str(path), "share": share / len(replay), "name": path.stem}
                for path in replay
            ]
            steps = round(args.steps / (1 - share))
            keep(f"replay {share}", task, train(f"{task}-{share}", mixed, args, steps), "alone")
        for weight in args.weights:
            kl = {"rows": str(replay[1]), "weight": weight, "batch": args.batch // 2}
            run = train(f"{task}-kl-{weight}", rows[task], args, args.steps, replay=kl)
            keep(f"replay, weight {weight:g}", task, run, "alone")
    if set(STAGES) <= set(args.tasks):
        first, second = STAGES
        start = args.out / "runs" / f"{first}-alone"
        keep("stage one", second, start)
        for share in (0.0, *args.shares):
            data: list[dict[str, Any]] = [{"path": rows[second]}]
            if share:
                data.append({"path": rows[first], "share": share, "name": "replay"})
            steps = round(args.steps / (1 - share))
            run = train(f"stages-{share}", data, args, steps, from_adapter=[str(start)])
            for task in STAGES:
                keep(f"stage two, {share} of stage one's rows", task, run)


if __name__ == "__main__":
    main()
