"""Lists the runs of one folder for the page, with their state and their records so far.

A folder with a metrics.jsonl is a run. Paths, samples and recipes are not shown.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError
from veneer.files.strict_json import legible
from veneer.files.system_errors import explained
from veneer.jobs.run_facts import RECORDS, run_facts
from veneer.serve.refusals import Refusal
from veneer.training.output.records import follow_records

MOST_RUNS = 200
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
        """Returns the records from a position on. Refusal: 404."""
        folder = next((run for run in self._folders() if run.name == name), None)
        if folder is None:
            raise Refusal(404, f"There is no run `{name[:80]}`.", "name", "run_not_found")
        file = folder / RECORDS
        part = follow_records(file, after, most_bytes=PART_BYTES, shown=f"{name}/{RECORDS}")
        shown = [{key: legible(r[key]) for key in SHOWN if key in r} for r in part.records]
        place = {"start": part.start, "next": part.next, "more": part.more}
        return {**self._card(folder), **place, "records": shown}

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
        card: dict[str, Any] = legible(run_facts(folder))
        return card
