"""The queue of a store of jobs: whose turn it is, and why no job starts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from veneer.errors import VeneerError
from veneer.files.lock import locked
from veneer.jobs.events import add_event, read_events
from veneer.jobs.record import LOCK, LOCK_SECONDS, TrainingJob

WAITS_FOR_DISK = "The job waits: jobs and files take all of their disk space. Delete some."


def next_in_turn(jobs: Sequence[TrainingJob]) -> str | None:
    """Returns the id of the queued job to start: the longest waiting one of the owner whose last
    start is longest ago."""
    last_start: dict[str, float] = {}
    for job in jobs:
        started = job.record.started or 0.0
        last_start[job.record.owner] = max(started, last_start.get(job.record.owner, 0.0))
    queued = [job.record for job in jobs if job.state == "queued"]
    first = min(queued, key=lambda r: (last_start[r.owner], r.queued, r.id), default=None)
    return None if first is None else first.id


def note_waiting(jobs: Sequence[TrainingJob]) -> None:
    """Adds an event to queued jobs that says why none starts, unless it is their last one."""
    for job in jobs:
        events = read_events(job.folder) if job.state == "queued" else []
        if not events or events[-1]["message"] == WAITS_FOR_DISK:
            continue
        with suppress(VeneerError), locked(job.folder / LOCK, wait_seconds=LOCK_SECONDS):
            add_event(job.folder, WAITS_FOR_DISK, "warn")
