"""Suggests what to do next when `veneer` is called alone, from the files in this folder and the
library.

It reads only file names and the first lines of .yaml files, and loads nothing.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path

from veneer.child import typed_command
from veneer.wording import shown

MOST = 3
"""Items of one kind that are shown."""
ROWS = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
BASE = "smollm2-135m"


def next_steps(folder: Path, library: Path) -> list[tuple[str, list[str]]]:
    """Finds what is here and the commands for it, the most advanced first."""
    found = []
    runs = list(_runs(folder))
    done = [run for run in runs if (run / "summary.json").is_file()]
    for run in [run for run in runs if run not in done and (run / "checkpoints").is_dir()][:MOST]:
        found.append((f"an unfinished run: {run}", [f"veneer train --resume {_named(run)}"]))
    for run in done[:MOST]:
        whole = (run / "model").is_dir()
        named = f"--base {_named(run / 'model')}" if whole else f"--adapter {_named(run)}"
        commands = [f"veneer chat {named}", f"veneer evaluate {named} --data HELD_OUT.jsonl"]
        commands += [] if whole else [f"veneer adapters add {_named(run)}"]
        found.append((f"a finished run: {run}", commands))
    for file in [file for file in _files(folder, (".yaml", ".yml")) if _is_run_file(file)][:MOST]:
        found.append(
            (f"a run file: {file}", [f"veneer plan {_named(file)}", f"veneer train {_named(file)}"])
        )
    for file in _files(folder, ROWS)[:MOST]:
        out = _named(
            _free(folder, Path("runs") / re.sub(r"\.(jsonl|csv|parquet|gz)", "", file.name))
        )
        found.append(
            (
                f"rows: {file}",
                [
                    f"veneer data check {_named(file)} --base {BASE}",
                    f"veneer train --base {BASE} --data {_named(file)} --out {out}",
                ],
            )
        )
    names = sorted(each.stem for each in _listed(library / "names") if each.suffix == ".json")
    if names:
        some = ", ".join(names[:MOST]) + (", …" if len(names) > MOST else "")
        commands = ["veneer adapters ls", f"veneer chat --adapter {shlex.quote(names[0])}"]
        found.append((f"{len(names):,} adapters in the library: {some}", commands))
    if not found:
        found.append(("no runs, rows or adapters here yet", ["veneer demo", "veneer train --help"]))
    return found


def told(folder: Path, library: Path) -> str:
    """Formats the next steps as text."""
    lines = []
    for what, commands in next_steps(folder, library):
        lines += [shown(what), *(f"  {shown(_here(command))}" for command in commands)]
    return "\n".join([*lines, "", f"{_here('veneer --help')} lists all commands."])


def _here(command: str) -> str:
    """Replaces `veneer` by the name that works in this shell."""
    return typed_command() + command.removeprefix("veneer")


def _free(folder: Path, out: Path) -> Path:
    """Finds a folder name that is free: runs/rows, runs/rows-2, ..."""
    numbered = (out.with_name(f"{out.name}-{number}") for number in count(2))
    return next(each for each in chain([out], numbered) if not (folder / each).exists())


def _runs(folder: Path) -> Iterator[Path]:
    """Finds folders of runs here and in runs/, the newest first."""
    near = [
        *_listed(folder),
        *_listed(folder / "runs"),
        *(each / "run" for each in _listed(folder / "runs")),
    ]
    runs = [each for each in near if (each / "run.yaml").is_file()]
    yield from (each.relative_to(folder) for each in sorted(runs, key=_changed, reverse=True))


def _files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    files = [each for each in _listed(folder) if each.name.endswith(endings) and each.is_file()]
    return [each.relative_to(folder) for each in sorted(files)]


def _listed(folder: Path) -> list[Path]:
    try:
        return [each for each in folder.iterdir() if not each.name.startswith(".")]
    except OSError:
        return []


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _is_run_file(file: Path) -> bool:
    try:
        with file.open(encoding="utf-8", errors="replace") as text:
            head = text.read(4000)
    except OSError:
        return False
    return all(re.search(rf"^{key}\s*:", head, re.MULTILINE) for key in ("base", "data"))


def _named(path: Path) -> str:
    return shlex.quote(str(path))
