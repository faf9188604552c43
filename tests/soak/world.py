"""A small world that every command can work in: a base, a tuned model, adapters, rows, a run, two
libraries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.support.helpers import fill
from tests.support.tiny import save_tiny
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.cli.main import main
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.library.library import Library
from veneer.models.load import load_base

READING = {
    "ls": "adapters ls --library {w}/library",
    "show": "adapters show x --library {w}/library",
    "diff": "adapters diff x@1 x@2 --library {w}/library",
    "verify": "adapters verify --library {w}/library",
    "gc, told": "adapters gc --library {w}/library",
    "generate": (
        "generate --base {w}/base --adapter x --library {w}/library --max-new-tokens 3 hello"
    ),
    "evaluate": (
        "evaluate --base {w}/base --adapter x --library {w}/library --data {w}/rows.jsonl --json"
    ),
    "lint": "lint x@1 --for peft --base {w}/base --library {w}/library",
}
FROM_LIBRARY = {
    "export": "export x@1 --to vllm --base {w}/base --out {o}/result --library {w}/library",
    "merge": (
        "merge --base {w}/base --adapter x@1 --dtype fp32 --out {o}/result --library {w}/library"
    ),
    "push": "adapters push x@1 {o}/elsewhere --library {w}/library",
    "pull": "adapters pull {w}/library x@1 --name pulled --library {o}/elsewhere",
}


def make_world(folder: Path) -> Path:
    """Everything below `folder`; about a megabyte."""
    base_folder = save_tiny(folder / "base")
    for name, rank in (("a", 2), ("b", 3), ("c", 4)):
        base = load_base(str(base_folder), dtype="float32", device="cpu")
        head = base.model.get_output_embeddings()
        made = attach(
            base.model, LoRA(rank=rank, alpha=5), name=name, routing=base.routing, head=head
        )
        fill(made.parameters().values(), seed=rank, scale=0.05)
        write_adapter(folder / name, made, manifest_for(base, method="lora"), model=base.model)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{n}?"},
                {"role": "assistant", "content": f"it is {n}"},
            ]
        }
        for n in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, adapters in (("library", "abc"), ("elsewhere", "b")):
        library = Library(folder / name)
        for number, adapter in enumerate(adapters):
            library.add(folder / adapter, name="x" if number < 2 else "y", tags=[f"t{number}"])
    Library(folder / "library").remove("y")  # something for gc
    assert (
        run(f"merge --base {folder}/base --adapter {folder}/a --dtype fp32 --out {folder}/tuned")
        == 0
    )
    assert run(train(folder, folder / "run")) == 0
    return folder


def train(world: Path, out: Path) -> str:
    return (
        f"train --base {world}/base --data {world}/rows.jsonl --validation {world}/rows.jsonl --out"
        f" {out} --quiet --steps 4 --batch 4 --set save_every=2 --set evaluate_every=2 --set"
        " method.rank=2 --set length=256 --set dtype=float32"
    )


def run(line: str) -> int:
    return main(line.split())


def copy_world(world: Path, into: Path) -> Path:
    return Path(shutil.copytree(world, into, symlinks=True))
