"""Makes the settings of a new job, with absolute paths, and copies its rows."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from veneer.bases.names.named import NAMED
from veneer.data.files.places import PACKED, kind_of
from veneer.data.files.sources import READABLE_KINDS
from veneer.data.files.writing import Record, write_records
from veneer.errors import ConfigError
from veneer.files.home import expanded

RowSource = Path | Iterable[Record]
RowPart = Literal["train", "validation"]


def with_places(
    settings: Mapping[str, Any], run_folder: Path, files: Mapping[RowPart, Path]
) -> dict[str, Any]:
    """Returns the settings with the run's folder and the files of rows, all paths absolute."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    base = plain.get("base")
    if isinstance(base, str) and base not in NAMED and expanded(base).exists():
        plain["base"] = str(expanded(base).absolute())
    data = plain.get("data", {})
    if not isinstance(data, dict) or {"train", "validation"} & data.keys() or "out" in plain:
        raise ConfigError(
            "the settings of a job name files or a folder, which the store chooses",
            next_step="Leave out `out`, `data.train` and `data.validation`; give rows.",
        )
    if "train" not in files:
        raise ConfigError("a job has no rows to train on", next_step="Give rows={'train': ...}.")
    paths = {part: str(path) for part, path in files.items()}
    return {**plain, "data": {**data, **paths}, "out": str(run_folder)}


def row_file_name(part: RowPart, source: RowSource) -> str:
    """Returns the name of a job's file of rows, with the ending that says how it is read."""
    return f"{part}{row_ending(source.name) if isinstance(source, Path) else '.jsonl'}"


def row_ending(name: str) -> str:
    """Returns the ending that says how a file of rows is read, such as .jsonl.gz. Raises
    ConfigError for another kind of file."""
    if not (kind := kind_of(name)):
        raise ConfigError(
            f"{name} is not a file of rows", next_step=f"Kinds of file: {READABLE_KINDS}."
        )
    packed = Path(name).suffix.lower()
    return f"{kind}{packed if packed in PACKED else ''}"


def copy_rows(source: RowSource, path: Path, store_folder: Path) -> None:
    """Writes rows to a job's file. Files of the store, which never change, are linked."""
    if not isinstance(source, Path):
        write_records(path, source)
        return
    if source.is_relative_to(store_folder):
        try:
            os.link(source, path)
            return
        except OSError:  # the file system has no links
            pass
    shutil.copyfile(source, path)
