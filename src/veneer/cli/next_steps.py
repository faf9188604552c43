"""Suggests what to do next when `veneer` is called alone, from the files in this folder and the
library.

It reads only file names and the first lines of .yaml files, and loads nothing.
"""

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


def find_next_steps(folder: Path, library: Path) -> list[tuple[str, list[str]]]:
    """Finds what is here and the commands for it, the most advanced first."""
    steps = []
    runs = list(_find_runs(folder))
    done = [run for run in runs if (run / "summary.json").is_file()]
    for run in [run for run in runs if run not in done and (run / "checkpoints").is_dir()][:MOST]:
        steps.append((f"an unfinished run: {run}", [f"veneer train --resume {_quote(run)}"]))
    for run in done[:MOST]:
        has_model = (run / "model").is_dir()
        flag = f"--base {_quote(run / 'model')}" if has_model else f"--adapter {_quote(run)}"
        commands = [f"veneer chat {flag}", f"veneer evaluate {flag} --data HELD_OUT.jsonl"]
        commands += [] if has_model else [f"veneer adapters add {_quote(run)}"]
        steps.append((f"a finished run: {run}", commands))
    for file in [file for file in _find_files(folder, (".yaml", ".yml")) if _is_run_file(file)][
        :MOST
    ]:
        steps.append(
            (f"a run file: {file}", [f"veneer plan {_quote(file)}", f"veneer train {_quote(file)}"])
        )
    for file in _find_files(folder, ROWS)[:MOST]:
        out = _quote(
            _find_free_folder(
                folder, Path("runs") / re.sub(r"\.(jsonl|csv|parquet|gz)", "", file.name)
            )
        )
        steps.append(
            (
                f"rows: {file}",
                [
                    f"veneer data check {_quote(file)} --base {BASE}",
                    f"veneer train --base {BASE} --data {_quote(file)} --out {out}",
                ],
            )
        )
    names = sorted(path.stem for path in _list_folder(library / "names") if path.suffix == ".json")
    if names:
        first_names = ", ".join(names[:MOST]) + (", …" if len(names) > MOST else "")
        commands = ["veneer adapters ls", f"veneer chat --adapter {shlex.quote(names[0])}"]
        steps.append((f"{len(names):,} adapters in the library: {first_names}", commands))
    if not steps:
        steps.append(("no runs, rows or adapters here yet", ["veneer demo", "veneer train --help"]))
    return steps


def format_next_steps(folder: Path, library: Path) -> str:
    """Formats the next steps as text."""
    lines = []
    for what, commands in find_next_steps(folder, library):
        lines += [shown(what), *(f"  {shown(_command_here(command))}" for command in commands)]
    return "\n".join([*lines, "", f"{_command_here('veneer --help')} lists all commands."])


def _command_here(command: str) -> str:
    """Replaces `veneer` by the name that works in this shell."""
    return typed_command() + command.removeprefix("veneer")


def _find_free_folder(folder: Path, out: Path) -> Path:
    """Finds a folder name that is free: runs/rows, runs/rows-2, ..."""
    numbered = (out.with_name(f"{out.name}-{number}") for number in count(2))
    return next(path for path in chain([out], numbered) if not (folder / path).exists())


def _find_runs(folder: Path) -> Iterator[Path]:
    """Finds folders of runs here and in runs/, the newest first."""
    candidates = [
        *_list_folder(folder),
        *_list_folder(folder / "runs"),
        *(path / "run" for path in _list_folder(folder / "runs")),
    ]
    runs = [path for path in candidates if (path / "run.yaml").is_file()]
    yield from (path.relative_to(folder) for path in sorted(runs, key=_modified_time, reverse=True))


def _find_files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    files = [
        path for path in _list_folder(folder) if path.name.endswith(endings) and path.is_file()
    ]
    return [path.relative_to(folder) for path in sorted(files)]


def _list_folder(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:
        return []


def _modified_time(path: Path) -> float:
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


def _quote(path: Path) -> str:
    return shlex.quote(str(path))
