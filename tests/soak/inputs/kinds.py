"""Inputs from seeds: files as strangers write them, and a command line that reads each.

A kind takes (random, folder, world), writes its files into the folder and gives the words behind
`veneer`. The same seed gives the same input.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.soak.inputs.adapters import adapters, run_folders
from tests.soak.inputs.odd import as_json, mutated, odd, spoken, times, torn, yaml_of
from tests.soak.inputs.packed import packed_folders
from tests.soak.inputs.rows import base_of, rows, templates

Kind = Callable[[Random, Path, Path], list[str]]


RUN: dict[str, Any] = {
    "base": "BASE",
    "data": {
        "train": "ROWS",
        "validation_share": 0.2,
        "format": "auto",
        "train_on": "assistant",
        "long_rows": "refuse",
    },
    "method": {
        "name": "lora",
        "rank": 2,
        "alpha": 4.0,
        "dropout": 0.0,
        "targets": "all-linear",
        "exclude": [],
        "rank_pattern": {"q_proj": 1},
        "train_modules": [],
    },
    "dtype": "float32",
    "device": "cpu",
    "steps": 1,
    "batch": 2,
    "micro_batch": 1,
    "length": 64,
    "order": "file",
    "learning_rate": 0.001,
    "schedule": "cosine",
    "warmup": 0.0,
    "weight_decay": 0.0,
    "clip": 1.0,
    "checkpointing": False,
    "evaluate_every": 1,
    "save_every": 1,
    "keep": 1,
    "seed": 1,
    "log": [],
    "out": "OUT",
}
METHODS: list[Any] = [
    "lora",
    "full",
    "dora",
    "prefix",
    "bottleneck",
    "qlora",
    {"name": "prefix", "tokens": 2, "start": "random"},
    {"name": "bottleneck", "size": 2, "houlsby": True},
    {"name": "dora", "rank": 1},
    {"name": "lora", "rank": 1, "init": "pissa"},
    {"name": "full"},
    RUN["method"],
]
RUN_WORDS = [
    *RUN,
    *RUN["method"],
    *RUN["data"],
    *["epochs", "tokens", "size", "prompt", "start", "layers", "nf4", "gguf", "lora", "full"],
]
CAPS = [
    f"--set={each}"
    for each in ("steps=1", "epochs=null", "batch=2", "length=64", "device=cpu", "log=[]")
]
SETS = ["[", "{a: ", "*x", "&x 1", "2024-13-45", "!!python/object:os.system x"]


def run_files(random: Random, folder: Path, world: Path) -> list[str]:
    """Mostly over a base that is not there: then the settings alone are read. Else a step is
    trained, bounded by CAPS."""
    trains = random.random() < 0.25
    values: Any = {**RUN, "method": random.choice(METHODS)}
    values = {
        key: value
        for key, value in values.items()
        if key in ("base", "data", "out") or random.random() < 0.7
    }
    for _ in range(times(random)):
        values = mutated(random, values, RUN_WORDS)
    if isinstance(values, dict) and trains:
        values = {**values, "base": base_of(random, world), "out": str(folder / "out")}
        if not isinstance(values.get("data"), dict) or random.random() < 0.5:
            values["data"] = str(world / "few.jsonl")
        else:
            values["data"] = {**values["data"], "train": str(world / "few.jsonl")}
    file = folder / "run.yaml"
    if random.random() < 0.7:
        data = yaml_of(values)
    else:
        data = as_json(random, values)
    file.write_bytes(torn(random, data) if random.random() < 0.15 else data)
    if not trains:
        return ["train", str(file), "--base", str(folder / "missing"), *odd_sets(random)]
    return [
        *f"train {file} --base {base_of(random, world)} --out {folder}/out --quiet".split(),
        *CAPS,
    ]


def odd_sets(random: Random) -> list[str]:
    if random.random() < 0.6:
        return []
    path = ".".join(random.choice(RUN_WORDS) for _ in range(random.choice([1, 1, 2, 2, 3])))
    value = random.choice([json.dumps(odd(random)), str(odd(random)), *SETS])
    return ["--set", spoken(f"{path}={value}")]


# --- labels, metrics, predictions, general text ---

VALUES = """
1 | 'x' | None | float('nan') | 10 ** 400 | 1 / 0 | answer | [1] | True | f(answer, references) |
exit(3) |
exit('no') | [][0]
"""
CODE = [f"def f(answer, references):\n    return {value.strip()}\n" for value in VALUES.split("|")]
CODE += [
    "f = 1",
    "f = print",
    "import nothing_of_this_name",
    "def f(",
    "exit(0)",
    "raise KeyboardInterrupt",
    "\x00",
]
CODE += ["def f(): return 1", "f = lambda a, r: 1 + 0j", "raise SystemExit(2 ** 40)"]
LABELS = "it is 0\nit is 1\nit is 2\nétiquette\n".encode()
PATTERNS = ["regex:(a", "regex:()*", "regex:(?P<x>a)"]


def files_beside(random: Random, folder: Path, world: Path) -> list[str]:
    """What `evaluate` reads beside rows."""
    line = f"evaluate --base {world}/base --data {world}/few.jsonl --max-new-tokens 2".split()
    what = random.choice(["labels", "named labels", "code", "general", "against", "metrics"])
    file = folder / what
    if what == "labels":
        file.write_bytes(torn(random, LABELS) * random.choice([1, 1, 100]))
        return [*line, "--metrics=accuracy", "--labels", str(file)]
    if what == "named labels":
        labels = ",".join(spoken(str(odd(random))) for _ in range(random.choice([1, 2, 5])))
        labels = random.choice([labels, f"it is 0,it is 1,it is 2,{labels}"])
        return [*line, "--metrics=accuracy", f"--labels={labels}"]
    if what == "code":
        file = folder / "score.py"
        code = random.choice(CODE).encode()
        file.write_bytes(
            torn(random, code) if random.random() < 0.2 and b"exit" not in code else code
        )
        return [*line, "--metric", f"{file}:{random.choice(['f', 'f', 'f', 'g', '__name__', ''])}"]
    if what == "general":
        whole = random.random() < 0.2
        file.write_bytes(
            b"---\n\n---" if whole else torn(random, b"Some text.\n---\nAnother text.\n")
        )
        return [*line, "--general", str(random.choice([file, file, folder, folder / "missing"]))]
    if what == "against":
        lines = [
            json.loads(line) for line in (world / "predictions.jsonl").read_text().splitlines()
        ]
        lines[0] = mutated(random, lines[0], list(lines[1]))
        file.write_bytes(b"\n".join(as_json(random, line) for line in lines))
        more = ["--metrics=exact_match"] if random.random() < 0.5 else []
        return [*line, "--against", str(file), *more]
    pattern = random.choice(
        ["regex:" + spoken(str(odd(random))), spoken(str(odd(random))), *PATTERNS]
    )
    return [*line, random.choice(["--metric", "--metrics"]) + "=" + pattern]


# --- flags ---


def flags(random: Random, folder: Path, world: Path) -> list[str]:
    """A line that is right, with words taken out, added or exchanged for odd ones."""
    w, out, library = str(world), str(folder / "out"), str(folder / "library")
    lines = [
        f"data check {w}/rows.jsonl --base {w}/base --length 64",
        f"evaluate --base {w}/base --data {w}/few.jsonl --max-new-tokens 2 --batch 2",
        f"generate --base {w}/base --max-new-tokens 2 --temperature 0.5 hello",
        f"plan --base {w}/base --data {w}/few.jsonl --batch 1 --length 16 --gpu H100",
        f"adapters ls --library {w}/library",
        f"adapters show x@1 --library {w}/library",
        f"adapters tag x best --note n --library {library}",
        f"adapters rm x@2 --library {library}",
        f"adapters rename x z --library {library}",
        f"adapters gc --library {library}",
        f"adapters verify --library {w}/library",
        f"adapters add {w}/a --name n --tag t --library {library}",
        f"adapters diff x@1 x@2 --library {w}/library",
        f"lint {w}/a --for peft --base {w}/base",
        f"export {w}/a --to vllm --base {w}/base --out {out}",
        f"merge --base {w}/base --adapter {w}/a --weight 0.5 --out {out}",
        f"combine --adapter {w}/a --adapter {w}/b --base {w}/base --out {out}",
        f"extract --base {w}/base --model {w}/tuned --rank 2 --out {out}",
        f"train --resume {w}/run --quiet",
        (
            f"train --base {w}/missing --data {w}/few.jsonl --out {out} --steps 1 --rank 2 --alpha"
            " 4 --set warmup=0"
        ),
        "doctor --json",
        (
            f"compare --base {w}/missing --data {w}/rows.jsonl --methods lora,full --out {out}"
            " --steps 1 --seeds 1 --rates 1 --metrics exact_match"
        ),
        f"quantize {w}/base --out {out}",
    ]
    words = random.choice(lines).split()
    known = ["--json", "--base", "--library", f"{w}/rows.jsonl", w, "--set", "--help"]
    for _ in range(times(random)):
        at = random.randrange(min(1, len(words) - 1), len(words)) if random.random() < 0.8 else 0
        what = random.random()
        new = random.choice([str(odd(random)), json.dumps(odd(random)), random.choice(known)])
        if what < 0.15 and len(words) > 1:
            words = words[:at] + words[at + 1 :]
        elif what < 0.4:
            words = [*words[:at], new, *words[at:]]
        else:
            words = [*words[:at], new, *words[at + 1 :]]
    return [spoken(word) for word in words]


KINDS: dict[str, Kind] = {
    "rows": rows,
    "templates": templates,
    "run files": run_files,
    "adapters": adapters,
    "run folders": run_folders,
    "files beside": files_beside,
    "flags": flags,
    "packed folders": packed_folders,
}
