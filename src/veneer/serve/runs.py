"""Runs of one folder, for those who watch: what each is doing, and its records as they are written.

A folder in it is a run where it has a metrics.jsonl. Paths, samples and recipes are not told.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, VeneerError
from veneer.files.strict_json import legible
from veneer.files.system_errors import explained
from veneer.serve.refusals import Refusal
from veneer.training.output.records import Record, records_after

RECORDS = "metrics.jsonl"
MOST_RUNS = 200
END_BYTES = 2**15
"""Read of the beginning and of the end of a file for the list."""
PART_BYTES = 2**20
TOLD = (
    "kind",
    "step",
    "loss",
    "gradient_norm",
    "learning_rate",
    "tokens",
    "seconds",
    "reason",
    "best",
)


class Runs:
    """folder: None: no runs are shown. ConfigError: it is none."""

    def __init__(self, folder: Path | None) -> None:
        if folder is not None and not folder.is_dir():
            raise ConfigError(
                f"{folder} is no folder of runs",
                [],
                "Give --runs the folder that holds runs' folders.",
            )
        self.folder = folder

    def cards(self) -> list[dict[str, Any]]:
        """The one that was written last first."""
        return [self._card(folder) for folder in self._found()[:MOST_RUNS]]

    def records(self, name: str, after: int) -> dict[str, Any]:
        """Records from a byte on. Refusal: 404."""
        folder = next((each for each in self._found() if each.name == name), None)
        if folder is None:
            raise Refusal(404, f"There is no run `{name[:80]}`.", "name", "run_not_found")
        file = folder / RECORDS
        found, start, next_byte = records_after(
            file, after, most_bytes=PART_BYTES, shown=f"{name}/{RECORDS}"
        )
        told = [{key: legible(each[key]) for key in TOLD if key in each} for each in found]
        card = self._card(folder)
        more = card.get("bytes", 0) - start > PART_BYTES
        return {**card, "records": told, "start": start, "next": next_byte, "more": more}

    def _found(self) -> list[Path]:
        if self.folder is None:
            return []
        there = []
        with explained(self.folder.name, reading=True):
            folders = list(self.folder.iterdir())
        for folder in folders:
            with suppress(OSError):  # it went while we looked, or is not for us to see
                if not folder.name.startswith(".") and (folder / RECORDS).is_file():
                    there.append(((folder / RECORDS).stat().st_mtime, folder))
        return [folder for _, folder in sorted(there, reverse=True)]

    def _card(self, folder: Path) -> dict[str, Any]:
        """Legible: whatever its records and its name say, JSON can."""
        card: dict[str, Any] = legible(self._facts(folder))
        return card

    def _facts(self, folder: Path) -> dict[str, Any]:
        file = folder / RECORDS
        about: dict[str, Any] = {"name": folder.name}
        try:
            with explained(folder.name, reading=True):
                now = file.stat()
                about |= {
                    "bytes": now.st_size,
                    "idle_seconds": round(max(time.time() - now.st_mtime, 0), 3),
                }
                ends = [*_first(file, folder.name), *_last(file, folder.name)]
        except VeneerError as fault:
            return {**about, "error": str(fault)}
        start: Record = next((each for each in ends if each["kind"] == "start"), {})
        steps = [each for each in ends if each["kind"] == "step"]
        end = ends[-1] if ends and ends[-1]["kind"] == "end" else {}
        return {
            **about,
            "base": _public(start.get("base")),
            "method": start.get("method"),
            "steps": start.get("steps"),
            "step": steps[-1]["step"] if steps else 0,
            "loss": steps[-1].get("loss") if steps else None,
            "reason": end.get("reason"),
            "error": None,
        }


def _first(file: Path, name: str) -> list[Record]:
    return records_after(file, 0, most_bytes=END_BYTES, shown=f"{name}/{RECORDS}")[0][:1]


def _last(file: Path, name: str) -> list[Record]:
    """Those at the end, from the beginning of a line on: as many as tell the step. An evaluation's
    line is long."""
    found: list[Record] = []
    size, back = file.stat().st_size, END_BYTES
    while not any(each["kind"] == "step" for each in found) and back <= 2 * PART_BYTES:
        start = max(size - back, 0)
        if start:
            with file.open("rb") as opened:
                opened.seek(start)
                start += len(opened.readline())
        found = records_after(file, start, most_bytes=2 * back, shown=f"{name}/{RECORDS}")[0]
        if start == 0:
            break
        back *= 4
    return found


def _public(base: Any) -> str | None:
    """What a base is called: of a path the last part."""
    if not isinstance(base, str):
        return None
    return Path(base).name if base.startswith(("/", "~", ".")) else base
