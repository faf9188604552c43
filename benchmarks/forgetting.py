"""What training makes a model forget, what replay saves of it, and what a second stage keeps of the
first.

    python benchmarks/forgetting.py --data DATA --out forgetting    (90 minutes; restartable)
    python benchmarks/forgetting.py --data DATA --out forgetting --steps 4 --train 64 --test 8 \\
        --replies 12    (a trial)

replay   each of four data sets (results.py), LoRA, once as it is and once with a share of rows that
         the base drew before (`veneer data replay`), so that they teach nothing new; both see as
         many rows of the task. Its own measure on held-out rows, and forgetting: nats per token of
         general text that no run saw, after - before.
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


def measured(base: Base, task: str, args: argparse.Namespace) -> dict[str, float]:
    """The task's measure and loss on its test rows, and the loss on general text."""
    labels = []
    if task == "banking77":
        named = json.loads(
            (args.data / "banking77" / "categories.json").read_text(encoding="utf-8")
        )
        labels = [intent(name) for name in named]
    name, limit = PRIMARY[task], TASKS[task][2]
    test = args.out / "rows" / task / "test.jsonl"
    found = api.evaluate(
        base,
        test,
        metrics=[name],
        labels=labels,
        max_new_tokens=limit,
        batch=16,
        general="built-in",
    )
    general = found["general"]
    told = {name: found[name], "loss": found["loss"], "general_loss": general["loss"]}
    if "forgetting" in general:
        told["forgetting"], told["interval"] = general["forgetting"], general["forgetting_interval"]
    return told


def trained(
    name: str, data: Any, args: argparse.Namespace, start: Path | None = None, *, share: float = 0.0
) -> Path:
    """The folder of a finished run. share: of its rows, beside the task's: it takes as many steps
    more."""
    out = args.out / "runs" / name
    if not (out / "summary.json").is_file():
        settings: dict[str, Any] = {"base": args.base, "data": data, "out": str(out), "batch": 8}
        settings["steps"] = round(args.steps / (1 - share))
        more = {"learning_rate": args.rate} if args.rate else {}
        more |= {"from_adapter": [str(start)]} if start else {}
        begun = (out / "run.yaml").is_file()
        config = (
            api.resume_config(out)
            if begun
            else RunConfig.of({**settings, **more, "method": "lora", "seed": args.seed})
        )
        api.train_run(config, resume=begun, screen=QuietScreen())
    return out


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, default=Path("forgetting"))
    p.add_argument("--base", default="smollm2-135m")
    p.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    p.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.25])
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rate", type=float, help="learning rate; default: the method's own")
    p.add_argument("--train", type=int, default=1600)
    p.add_argument("--validation", type=int, default=64)
    p.add_argument("--test", type=int, default=200)
    p.add_argument("--replies", type=int, default=240, help="drawn rows of each kind")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "forgetting.json"
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    rows = {task: write_rows(task, args, args.out / "rows" / task)[0] for task in args.tasks}
    base = api.load(args.base)
    replay = [args.out / "rows" / f"{name}.jsonl" for name in ("answers", "texts")]
    if not all(each.is_file() for each in replay):
        for place, drawn in zip(replay, draw_replay(base, 2 * args.replies).values(), strict=True):
            write_records(place, drawn)

    def keep(name: str, task: str, run: Path | None) -> None:
        place = f"{name}: {task}"
        if place in found:
            return
        if run is None:
            found[place] = measured(base, task, args)
        else:
            acting = base.load_adapter(run)
            with base.using(acting):
                found[place] = measured(base, task, args)
            base.detach(acting)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(place, json.dumps(found[place]), flush=True)

    for task in args.tasks:
        keep("base", task, None)
        keep(
            "alone",
            task,
            trained(f"{task}-alone", {"train": str(rows[task]), "validation_share": 0.0}, args),
        )
        for share in args.shares:
            mixed: list[dict[str, Any]] = [{"path": str(rows[task])}]
            mixed += [
                {"path": str(each), "share": share / len(replay), "name": each.stem}
                for each in replay
            ]
            keep(
                f"replay {share}",
                task,
                trained(
                    f"{task}-{share}", {"train": mixed, "validation_share": 0.0}, args, share=share
                ),
            )
    if set(STAGES) <= set(args.tasks):
        first, second = STAGES
        start = args.out / "runs" / f"{first}-alone"
        keep("stage one", second, start)
        for share in (0.0, *args.shares):
            data: list[dict[str, Any]] = [{"path": str(rows[second])}]
            if share:
                data.append({"path": str(rows[first]), "share": share, "name": "replay"})
            run = trained(
                f"stages-{share}",
                {"train": data, "validation_share": 0.0},
                args,
                start,
                share=share,
            )
            for task in STAGES:
                keep(f"stage two, {share} of stage one's rows", task, run)


if __name__ == "__main__":
    main()
