"""The state file of a training job, and a job as readers see it.

    jobs/<id>/job.json      JobRecord; written by the process that holds jobs/<id>/.lock
    jobs/<id>/request       "pause" or "cancel", written by others while a worker holds the lock
    jobs/<id>/outcome.json  how the training ended, written by the trainer for the worker
    runs/<id>/              the run's folder, written by the trainer

A record says `running` until its worker has written something else. If the record says so and
nobody holds the lock, the worker is dead, and readers see a failed job.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, JsonValue

from veneer.errors import UnknownNameError
from veneer.files.atomic import write_text
from veneer.files.settings import StrictSettings
from veneer.files.strict_json import json_text
from veneer.jobs.run_facts import RECORDS, run_facts
from veneer.jobs.stored import read_stored

StoredState = Literal["queued", "running", "paused", "done", "failed", "cancelled"]
State = Literal["queued", "running", "stopping", "paused", "done", "failed", "cancelled"]
StopRequest = Literal["pause", "cancel"]
OPEN: tuple[State, ...] = ("queued", "running", "stopping")
"""States of jobs that will go on by themselves."""
RESUMABLE: tuple[State, ...] = ("paused", "failed")
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")
AT_WORK: tuple[State, ...] = ("running", "stopping")
"""States of jobs that a worker holds. All of them have the same worker."""
DIED = (
    "The trainer's process ended without a result: the machine went down, or it was killed."
    " Resume the job to continue from its last checkpoint."
)
LOCK, REQUEST = ".lock", "request"
LOCK_SECONDS = 5.0
"""Time to wait for a job's lock, which readers hold for microseconds."""
ID_PREFIX = "ftjob-"
_ID = re.compile(rf"{ID_PREFIX}[0-9a-f]{{12}}")


class JobRecord(StrictSettings):
    """The content of job.json. Times are seconds since 1970."""

    format_version: Literal[1] = 1
    id: str
    state: StoredState = "queued"
    created: float
    queued: float
    """When it entered the queue last."""
    started: float | None = None
    """When a trainer was started last."""
    ended: float | None = None
    """When it was done, failed, cancelled or paused last."""
    owner: str = ""
    """Whose job it is: the name of an API key. The queue takes turns between owners."""
    base: str = ""
    """Public name of the base."""
    threads: int
    """Processor threads of the trainer. A resumed run keeps them, and so its bits."""
    niceness: int
    """How much lower the trainer's priority is than the worker's."""
    share: float = 1.0
    """Part of the time that the trainer runs although requests wait for answers (suspension.py)."""
    disk_bytes: int | None = None
    """Bytes of the whole store beyond which the run is stopped; None: no limit, of earlier
    versions."""
    publish_as: str | None = None
    """Name that the adapter gets in the library; None: it is not added."""
    library: str
    """Folder of the library that the adapter is added to."""
    adapter: str | None = None
    """Reference of the added adapter, such as tickets@2."""
    error: str | None = None
    has_failed: bool = False
    """It was resumed after it failed. From then on it shares a trainer only with jobs of its owner,
    because what made it fail may end the trainer."""
    alone: bool = False
    """It shares no trainer, because the one that it shared with other jobs crashed."""
    details: dict[str, JsonValue] = Field(default_factory=dict)
    """Values that the creator of the job keeps with it; not read here."""


@dataclass(frozen=True)
class TrainingJob:
    """A job as it is now. error: why it failed."""

    record: JobRecord
    state: State
    error: str | None
    folder: Path
    run_folder: Path

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def records_file(self) -> Path:
        """Returns the path of the run's metrics.jsonl.

        It does not exist before the run starts. Read it with
        training.output.records.read_records or follow_records.
        """
        return self.run_folder / RECORDS

    @property
    def run_file(self) -> Path:
        """The settings that the trainer was given."""
        return self.folder / "run.yaml"

    def facts(self) -> dict[str, Any]:
        """Returns base, method, steps, step, loss and reason from the run's records; empty before
        the first record. A damaged file gives only an `error`."""
        return run_facts(self.run_folder) if self.records_file.is_file() else {}


def num_jobs_together(job: TrainingJob, jobs: Sequence[TrainingJob]) -> int:
    """Counts the jobs of a store that train together with this one."""
    return sum(other.state in AT_WORK for other in jobs) - 1 if job.state in AT_WORK else 0


def together_words(others: int) -> str:
    """Returns the end of a sentence that says with how many others a job trains."""
    if others < 1:
        return ""
    return ", together with " + ("1 other" if others == 1 else f"{others} others")


def new_id() -> str:
    return ID_PREFIX + secrets.token_hex(6)


def check_id(job_id: str) -> str:
    """Returns the id. Raises UnknownNameError if it does not look like one: it may be a path."""
    if _ID.fullmatch(job_id) is None:
        raise unknown_job(job_id)
    return job_id


def unknown_job(job_id: str) -> UnknownNameError:
    return UnknownNameError(f"there is no job {job_id[:80]!r}", [], "See: veneer runs")


def read_record(folder: Path) -> JobRecord:
    """Reads a job's record. Raises UnknownNameError, SourceError, or CorruptFileError."""
    return read_stored(JobRecord, folder / "job.json", "job", missing=unknown_job(folder.name))


def write_record(folder: Path, record: JobRecord, **changes: Any) -> JobRecord:
    """Writes a changed record and returns it. The caller holds the job's lock."""
    changed = record.model_copy(update=changes)
    write_text(folder / "job.json", json_text(changed.model_dump(mode="json")), replace=True)
    return changed
