"""Files of a result for other programs, made by `veneer export`.

A draft keeps one export at a time, in its folder `export`, so that whole models do not fill the
disk.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from veneer.errors import SourceError
from veneer.files.atomic import write_text
from veneer.files.partial import remove
from veneer.files.strict_json import json_text, legible, read_json
from veneer.serve.refusals import without_folders
from veneer.serve.studio.bodies import ExportBody, ExportKind

REPORT = "export.json"


@dataclass(frozen=True)
class Export:
    """A kind of export. suffix: of its file. flags: of the command. whole: base and adapter.
    copies: as many times its size is on the disk before it is packed"""

    suffix: str
    flags: tuple[str, ...]
    whole: bool = True
    copies: int = 1


EXPORTS: dict[ExportKind, Export] = {
    "llamacpp_adapter": Export(".gguf", ("--to", "llamacpp"), whole=False),
    "llamacpp": Export(".gguf", ("--to", "llamacpp", "--merged")),
    "ollama": Export("", ("--to", "ollama"), copies=2),
}


def export_arguments(
    folder: Path, adapter: Path, body: ExportBody, *, base: str, name: str
) -> list[str]:
    """Returns the arguments of the command that makes an export in the folder."""
    kind = EXPORTS[body.to]
    out = folder / f"{name}{kind.suffix}"
    arguments = ["export", str(adapter), *kind.flags, "--base", base, "--out", str(out)]
    return [*arguments, "--json", *(["--type", body.type] if kind.whole else [])]


def finish_export(folder: Path, body: ExportBody, result: dict[str, Any]) -> None:
    """Packs a folder into one file, and notes what was made. Its file marks the end."""
    out = Path(result["out"])
    file = out
    if out.is_dir():
        file = out.with_name(f"{out.name}.zip")
        write_zip(out, file)
        remove(out)
    report = {
        "to": body.to,
        "type": body.type if EXPORTS[body.to].whole else None,
        "file": file.name,
        "bytes": file.stat().st_size,
        "notes": [without_folders(note) for note in result["notes"]],
        "commands": [
            without_folders(command.replace(f"{folder}/", "")) for command in result["serve"]
        ],
    }
    write_text(folder / REPORT, json_text(legible(report)), replace=True)


def export_report(folder: Path) -> dict[str, Any] | None:
    """Describes the finished export of a folder."""
    try:
        return read_json(folder / REPORT)
    except SourceError as fault:
        if isinstance(fault.__cause__, FileNotFoundError):
            return None
        raise


def write_zip(folder: Path, file: Path | IO[bytes]) -> None:
    """Writes the files of a folder into a zip archive. They are not compressed: tensors are random
    bytes. Raises FileNotFoundError if the folder is removed meanwhile."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in paths:
            archive.write(path, f"{folder.name}/{path.relative_to(folder).as_posix()}")
    folder.stat()
