"""Lists the runs of one folder for the page, with their state and their records so far.

A folder with a metrics.jsonl is a run. Paths, samples and recipes are not shown.
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
"""Bytes that the list reads at the beginning and at the end of a file."""
PART_BYTES = 2**20
SHOWN = (
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
    """Lists runs. folder: None shows no runs. ConfigError: it is not a folder."""

    def __init__(self, folder: Path | None) -> None:
        if folder is not None and not folder.is_dir():
            raise ConfigError(
                f"{folder} is not a folder",
                [],
                "Give --runs a folder that contains the folders of runs.",
            )
        self.folder = folder

    def cards(self) -> list[dict[str, Any]]:
        """Lists the runs, the last written first."""
        return [self._card(folder) for folder in self._folders()[:MOST_RUNS]]

    def records(self, name: str, after: int) -> dict[str, Any]:
        """Returns the records from a byte on. Refusal: 404."""
        folder = next((run for run in self._folders() if run.name == name), None)
        if folder is None:
            raise Refusal(404, f"There is no run `{name[:80]}`.", "name", "run_not_found")
        file = folder / RECORDS
        records, start, next_byte = records_after(
            file, after, most_bytes=PART_BYTES, shown=f"{name}/{RECORDS}"
        )
        public_records = [{key: legible(r[key]) for key in SHOWN if key in r} for r in records]
        card = self._card(folder)
        more = card.get("bytes", 0) - start > PART_BYTES
        return {**card, "records": public_records, "start": start, "next": next_byte, "more": more}

    def _folders(self) -> list[Path]:
        if self.folder is None:
            return []
        runs = []
        with explained(self.folder.name, reading=True):
            folders = list(self.folder.iterdir())
        for folder in folders:
            with suppress(OSError):  # it was removed meanwhile, or may not be read
                if not folder.name.startswith(".") and (folder / RECORDS).is_file():
                    runs.append(((folder / RECORDS).stat().st_mtime, folder))
        return [folder for _, folder in sorted(runs, reverse=True)]

    def _card(self, folder: Path) -> dict[str, Any]:
        """Describes a run in text that JSON can hold, whatever its records say."""
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
        start: Record = next((r for r in ends if r["kind"] == "start"), {})
        steps = [record for record in ends if record["kind"] == "step"]
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
    """Returns the last records, enough to have a step among them. An evaluation's line is long."""
    records: list[Record] = []
    size, back = file.stat().st_size, END_BYTES
    while not any(record["kind"] == "step" for record in records) and back <= 2 * PART_BYTES:
        start = max(size - back, 0)
        if start:
            with file.open("rb") as stream:
                stream.seek(start)
                start += len(stream.readline())
        records = records_after(file, start, most_bytes=2 * back, shown=f"{name}/{RECORDS}")[0]
        if start == 0:
            break
        back *= 4
    return records


def _public(base: Any) -> str | None:
    """Returns a base's name; of a path the last part."""
    if not isinstance(base, str):
        return None
    return Path(base).name if base.startswith(("/", "~", ".")) else base
