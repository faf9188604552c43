"""The full comparison on four public data sets: `veneer compare` on each, and docs/results.md from
its figures.

    python benchmarks/results.py --data DATA --out results    (hours; restartable)
    python benchmarks/results.py --data DATA --out results --steps 4 --seeds 1 --train 16 --test 8
        (a trial)

DATA holds e2e/, viggo/, banking77/ and wikisql_mlx/ as their authors publish them: e2e_json     E2E
    cleaned: a sentence about a restaurant -> its details as JSON              field F1 viggo_text
    ViGGO: a meaning representation -> a sentence; several references               BLEU banking77
    a bank customer's question -> one of 77 intents, chosen by likelihood           accuracy wikisql
    a table's columns and a question -> SQL                                         exact match

Finished runs are found again, also after Ctrl-C. Quality may be computed on a busy machine; what a
step costs is timed by method_cost.py on the same rows and wants a quiet one (--only quality, --only
cost). docs/results.md is written from the JSON of whatever is finished and what OUT/about.md says
of machine and commit. --only write runs nothing: `--data . --out docs/results --only write` writes
the page anew. Rows are drawn with one seed, never two times, and no prompt stands on two sides.
"""

import argparse
import csv
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer.comparison.conclusion import conclude, quantity, signed

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
KEYS = "name, eatType, food, priceRange, customer rating, area, familyFriendly, near"
ASK_JSON = (
    f"Extract the restaurant's details from the text as JSON with the keys {KEYS}. "
    "Leave out keys that are not mentioned.\n\nText: "
)
ASK_TEXT = "Describe the game: "
ASK_INTENT = "Name the intent of this bank customer's question.\n\nQuestion: "
ASK_SQL = "Write the SQL query that answers the question.\n\n"


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def pair(prompt: str, answer: str) -> Row:
    return {"prompt": prompt, "completion": answer}


def e2e_json(data: Path) -> tuple[list[Row], list[Row]]:
    def rows(name: str) -> list[Row]:
        found = []
        for row in read_csv(data / "e2e" / name):
            slots = {k.strip(): v for k, v in re.findall(r"([A-Za-z ]+)\[([^\]]*)\]", row["mr"])}
            found.append(pair(ASK_JSON + row["ref"], json.dumps(slots, ensure_ascii=False)))
        return found

    return rows("devel-fixed.no-ol.csv"), rows("test-fixed.csv")


def viggo_text(data: Path) -> tuple[list[Row], list[Row]]:
    def rows(name: str) -> list[Row]:
        return [pair(ASK_TEXT + row["mr"], row["ref"]) for row in read_csv(data / "viggo" / name)]

    together: dict[str, list[str]] = {}
    for row in rows("test.csv"):
        together.setdefault(row["prompt"], []).append(row["completion"])
    tested = [
        {**pair(prompt, refs[0]), "references": refs[1:]} for prompt, refs in together.items()
    ]
    return rows("train.csv"), tested


def intent(category: str) -> str:
    return category.replace("_", " ").strip()


def banking77(data: Path) -> tuple[list[Row], list[Row]]:
    def rows(name: str) -> list[Row]:
        found = read_csv(data / "banking77" / name)
        return [pair(ASK_INTENT + row["text"].strip(), intent(row["category"])) for row in found]

    return rows("train.csv"), rows("test.csv")


def wikisql(data: Path) -> tuple[list[Row], list[Row]]:
    def rows(*names: str) -> list[Row]:
        found = []
        for name in names:
            for line in (data / "wikisql_mlx" / name).read_text(encoding="utf-8").splitlines():
                question, _, query = json.loads(line)["text"].rpartition("\nA:")
                found.append(pair(ASK_SQL + question.strip(), query.strip()))
        return found

    return rows("train.jsonl"), rows("test.jsonl", "valid.jsonl")


CANDIDATES: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "qlora": {"method": "lora", "quantize": "nf4"},
    "qlora_loftq": {"method": {"name": "lora", "init": "loftq"}, "quantize": "nf4"},
    "lora_gguf": {"method": "lora", "quantize": "gguf"},
    "dora": {"method": "dora"},
    "prefix": {"method": "prefix"},
    "bottleneck": {"method": "bottleneck"},
}
"""Run files by name; lora_gguf needs a base that is a .gguf file."""

TASKS: dict[str, tuple[Callable[[Path], tuple[list[Row], list[Row]]], str, int]] = {
    "e2e_json": (e2e_json, "field_f1,json_validity,exact_match", 96),
    "viggo_text": (viggo_text, "bleu,chrf,rougeL", 96),
    "banking77": (banking77, "accuracy", 16),
    "wikisql": (wikisql, "exact_match,chrf", 96),
}


def write_rows(task: str, args: argparse.Namespace, folder: Path) -> list[Path]:
    """train, validation and test files; the same rows whenever the sizes are the same."""
    train, tested = TASKS[task][0](args.data)
    draw = random.Random(0)
    draw.shuffle(train)
    draw.shuffle(tested)
    tested = tested[: args.test]
    taken = {row["prompt"] for row in tested}
    unique = list({row["prompt"]: row for row in train if row["prompt"] not in taken}.values())
    sides = {
        "validation": unique[: args.validation],
        "train": unique[args.validation :][: args.train],
        "test": tested,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sides.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return [folder / f"{name}.jsonl" for name in ("train", "validation", "test")]


def run(task: str, args: argparse.Namespace) -> None:
    from veneer.cli.main import main as veneer

    out = args.out / task
    train, validation, test = write_rows(task, args, out / "rows")
    _, metrics, tokens = TASKS[task]
    files = []
    for name in args.methods.split(","):
        files.append(out / "rows" / f"{name}.json")  # JSON is YAML
        common = {"base": args.base, "batch": args.batch, "evaluate_every": max(1, args.steps // 2)}
        files[-1].write_text(json.dumps({**common, **CANDIDATES[name]}) + "\n", "utf-8")
    command = [
        "compare",
        *map(str, files),
        "--data",
        str(train),
        "--validation",
        str(validation),
        "--test",
        str(test),
        "--steps",
        str(args.steps),
        "--seeds",
        str(args.seeds),
        "--rates",
        args.rates,
        "--extend",
        str(args.extend),
        "--metrics",
        metrics,
        "--max-new-tokens",
        str(tokens),
        "--out",
        str(out),
    ]
    if task == "banking77":
        labels = out / "rows" / "labels.txt"
        named = json.loads(
            (args.data / "banking77" / "categories.json").read_text(encoding="utf-8")
        )
        labels.write_text("\n".join(intent(name) for name in named) + "\n", encoding="utf-8")
        command += ["--labels", str(labels)]
    start = time.monotonic()
    print(f"== {task}: veneer {' '.join(command)}", flush=True)
    if code := veneer(command):
        sys.exit(code)
    print(f"== {task}: {(time.monotonic() - start) / 60:.0f} min", flush=True)


COSTS = {
    "lora": "lora",
    "full": "full",
    "qlora": "qlora",
    "dora": "dora",
    "prefix": "prefix",
    "bottleneck": "parallel",
}
"""Candidate -> its name in method_cost.py."""


def cost(task: str, args: argparse.Namespace) -> None:
    """out/task/cost.json: seconds a step on this task's rows, every method in turn."""
    train, *_ = write_rows(task, args, args.out / task / "rows")
    named = [COSTS[name] for name in args.methods.split(",") if name in COSTS]
    script = Path(__file__).with_name("method_cost.py")
    command = [
        sys.executable,
        str(script),
        "--base",
        args.base,
        "--rows",
        str(train),
        "--out",
        str(args.out / task / "cost.json"),
        "--batch",
        str(args.batch),
        "--repeats",
        "3",
        "--steps",
        "6",
        "--methods",
        *named,
    ]
    if subprocess.run(command).returncode:
        sys.exit(f"{task}: method_cost.py failed")


def ranged(value: dict[str, Any], unit: str) -> str:
    return (
        f"{quantity(value['value'], unit)}"
        f" ({' to '.join(quantity(x, unit) for x in value['interval'])})"
    )


def rows(head: list[str], *lines: list[str]) -> list[str]:
    """A table of markdown."""
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)]


def quality(figures: dict[str, Any]) -> list[str]:
    units = figures["units"]
    lines = [
        [
            "base, untrained",
            *(quantity(figures["untuned"][name]["value"], unit) for name, unit in units.items()),
        ]
    ]
    for m in figures["methods"]:
        told = [m["failure"] if n == 0 else "" for n in range(len(units))]
        if not m["failure"]:
            told = [ranged(m["quality"][name], unit) for name, unit in units.items()]
        lines.append([m["name"], *told])
    return rows(["method", *units], *lines)


def prices(figures: dict[str, Any], costs: dict[str, Any]) -> list[str]:
    lines = []
    for m in figures["methods"]:
        if m["failure"]:
            continue
        step, forgot = costs.get(COSTS.get(m["name"], "")), m["forgetting"]
        lines.append(
            [
                m["name"],
                f"{m['trainable_parameters']:,}",
                f"{m['adapter_bytes'] / 1e6:.2f}",
                f"{m['peak_memory_bytes'] / 1e9:.2f}",
                f"{1000 * step['step_seconds']:.0f}" if step else "–",
                f"{forgot['value']:+.3f}" if forgot else "–",
                f"{m['learning_rate']:g}",
            ]
        )
    head = [
        "method",
        "trained",
        "file, MB",
        "peak memory, GB",
        "ms a step",
        "forgetting, nats",
        "rate",
    ]
    return rows(head, *lines)


def searches(figures: dict[str, Any]) -> list[str]:
    """Held-out loss of seed 0 by learning rate: what each method's rate was chosen by."""
    lines = ["Held-out loss, nats per token, by learning rate (seed 0; the lowest was taken):", ""]
    for m in figures["methods"]:
        tried = [
            f"{each['learning_rate']:g}:"
            f" {'diverged' if each['loss'] is None else format(each['loss'], '.3f')}"
            for each in m["search"]
        ]
        lines.append(f"- {m['name']}: {', '.join(tried)}")
    return lines


def glance(found: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    """What people say of LoRA, as measured here against full fine-tuning: a row a task."""
    lines = []
    for task, (figures, costs) in found.items():
        methods = {m["name"]: m for m in figures["methods"] if m["quality"]}
        if not {"full", "lora"} <= set(methods):
            continue
        full, lora = methods["full"], methods["lora"]
        primary = figures["primary"]
        unit = figures["units"][primary]
        gap = lora["to_full"][primary]
        difference, low, high = (signed(x, unit) for x in (gap["difference"], *gap["interval"]))
        memory = [m["peak_memory_bytes"] / 1e9 for m in (lora, full)]
        speed = [costs[name]["step_seconds"] for name in ("lora", "full")] if costs else []
        lines.append(
            [
                f"[{task}](#{task})",
                primary,
                *(quantity(m["quality"][primary]["value"], unit) for m in (lora, full)),
                f"{difference} ({low} to {high})",
                "{:.2f} beside {:.2f} GB".format(*memory),
                "{:.2f} beside {:.2f} s".format(*speed) if speed else "–",
            ]
        )
    head = ["data", "measure", "LoRA", "full", "LoRA minus full", "peak memory", "a step"]
    return rows(head, *lines) if lines else []


def load(file: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return loaded


def write(args: argparse.Namespace) -> None:
    found = {}
    for task in TASKS:
        folder = args.out / task
        if (folder / "comparison.json").is_file():
            timed = folder / "cost.json"
            costs = load(timed)["methods"] if timed.is_file() else {}
            found[task] = (load(folder / "comparison.json"), costs)
    about = args.out / "about.md"
    parts = [
        "# Methods compared",
        "",
        (
            "Written by `python benchmarks/results.py`; every figure comes from the"
            " `comparison.json` of a `veneer compare`."
        ),
        "",
        *([about.read_text(encoding="utf-8").strip(), ""] if about.is_file() else []),
        "## LoRA beside full fine-tuning",
        "",
        *glance(found),
    ]
    for task, (figures, costs) in found.items():
        # Its time rests on how busy the machine was; the steps are timed beside it.
        untimed = [
            {key: value for key, value in m.items() if key != "seconds"} for m in figures["methods"]
        ]
        said = [f"- {sentence}" for sentence in conclude({**figures, "methods": untimed})]
        steps, seeds, tested = figures["budget"]["steps"], figures["seeds"], figures["test_rows"]
        intro = f"{figures['base']}, {steps:,} steps, {seeds} seeds, {tested:,} test rows."
        parts += [
            "",
            f"## {task}",
            "",
            intro,
            "",
            *quality(figures),
            "",
            *prices(figures, costs),
            "",
        ]
        parts += [*searches(figures), "", "What follows:", "", "\n\n".join(said)]
    args.doc.write_text("\n".join(parts) + "\n", encoding="utf-8")
    print(args.doc)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, default=Path("results"))
    p.add_argument("--doc", type=Path, default=ROOT / "docs" / "results.md")
    p.add_argument("--base", default="smollm2-135m")
    p.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    p.add_argument("--methods", default="full,lora,qlora,dora,prefix,bottleneck")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--rates", default="1/3,1,3")
    p.add_argument("--extend", type=int, default=1)
    p.add_argument("--train", type=int, default=1600, help="rows to train on")
    p.add_argument("--validation", type=int, default=64, help="rows to choose learning rates by")
    p.add_argument("--test", type=int, default=200, help="rows to judge by")
    p.add_argument(
        "--only", choices=["quality", "cost", "write"], help="one part; default: all of them"
    )
    args = p.parse_args()
    for task in [] if args.only == "write" else args.tasks:
        if args.only != "cost":
            run(task, args)
        if args.only != "quality":
            cost(task, args)
        write(args)
    write(args)


if __name__ == "__main__":
    main()
