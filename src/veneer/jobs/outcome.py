"""How a job's training ended: outcome.json in the job's folder.

The trainer writes it as soon as the job has ended, while other jobs may train on. The worker reads
it and writes the job's state.
"""

from pathlib import Path
from typing import Literal

from veneer.errors import BudgetFullError, RunInterrupted, VeneerError
from veneer.files.atomic import write_text
from veneer.files.settings import StrictSettings
from veneer.files.strict_json import json_text
from veneer.jobs.stored import read_stored
from veneer.wording import shown

OUTCOME = "outcome.json"
MOST_ERROR = 4000
"""Characters of an error that are kept."""


class Outcome(StrictSettings):
    """The content of outcome.json.

    done         the run has its result
    interrupted  a checkpoint was saved, if the run had begun
    no_room      memory had no room for the job beside those that train
    failed       error says why
    crashed      the trainer ended, which another of its jobs may have caused; error says how
    """

    kind: Literal["done", "interrupted", "no_room", "failed", "crashed"]
    error: str = ""


def outcome_of(fault: VeneerError) -> Outcome:
    """Returns the outcome of a job that ended with this error."""
    if isinstance(fault, RunInterrupted):
        return Outcome(kind="interrupted")
    if isinstance(fault, BudgetFullError):
        return Outcome(kind="no_room")
    return Outcome(kind="failed", error=shown(fault)[:MOST_ERROR])


def write_outcome(folder: Path, outcome: Outcome) -> None:
    write_text(folder / OUTCOME, json_text(outcome.model_dump()), replace=True)


def read_outcome(folder: Path) -> Outcome | None:
    """Returns the outcome, None while the job trains."""
    path = folder / OUTCOME
    return read_stored(Outcome, path, "training's end") if path.is_file() else None
