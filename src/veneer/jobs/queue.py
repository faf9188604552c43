"""The queue of a store of jobs: whose turn it is, how jobs start, and why none does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from veneer.errors import VeneerError
from veneer.files.lock import locked
from veneer.jobs.events import add_event, read_events
from veneer.jobs.launch import start_worker
from veneer.jobs.outcome import OUTCOME
from veneer.jobs.record import (
    LOCK,
    LOCK_SECONDS,
    REQUEST,
    TrainingJob,
    read_record,
    together_words,
    write_record,
)

WAITS_FOR_DISK = "The job waits: jobs and files take all of their disk space. Delete some."


def jobs_in_turn(jobs: Sequence[TrainingJob]) -> list[TrainingJob]:
    """Returns the queued jobs, the next to start first. Owners take turns, beginning with the one
    whose last start is longest ago; of an owner's jobs the longest waiting is first."""
    last_start: dict[str, float] = {}
    for job in jobs:
        started = job.record.started or 0.0
        last_start[job.record.owner] = max(started, last_start.get(job.record.owner, 0.0))
    queued, order = [job for job in jobs if job.state == "queued"], list[TrainingJob]()
    turn = max(last_start.values(), default=0.0)
    while queued:
        first = min(queued, key=lambda j: (last_start[j.record.owner], j.record.queued, j.id))
        queued.remove(first)
        order.append(first)
        turn += 1
        last_start[first.record.owner] = turn
    return order


def start_first(store_folder: Path, jobs: Sequence[TrainingJob]) -> str | None:
    """Starts the first of these queued jobs, with the others that its trainer can compute too.
    Returns the id of a job that was started; None if none is queued any more."""
    for place in range(len(jobs)):
        if ids := start_together(store_folder, _sharing(jobs[place:])):
            return ids[0]
    return None


def _sharing(jobs: Sequence[TrainingJob]) -> Sequence[TrainingJob]:
    if len(jobs) == 1:
        return jobs
    from veneer.jobs.group import share_first  # loads torch

    return share_first(jobs)


def start_together(store_folder: Path, jobs: Sequence[TrainingJob]) -> list[str]:
    """Starts one worker for those of the jobs that are still queued; returns their ids."""
    started: dict[str, int] = {}
    try:
        with ExitStack() as locks:
            for job in jobs:
                if (descriptor := _lock_queued(job.folder, locks)) is not None:
                    started[job.id] = descriptor
            now, together = time.time(), together_words(len(started) - 1)
            for job in jobs:
                if job.id in started:
                    for name in (REQUEST, OUTCOME):
                        (job.folder / name).unlink(missing_ok=True)
                    record = read_record(job.folder)
                    write_record(job.folder, record, state="running", started=now, error=None)
                    add_event(job.folder, f"Fine-tuning job started{together}")
            if started:
                start_worker(store_folder, started, store_folder / "jobs" / next(iter(started)))
    except VeneerError as fault:
        for job in jobs:
            mark_failed(job.folder, str(fault))
        return []
    return list(started)


def _lock_queued(folder: Path, locks: ExitStack) -> int | None:
    """Locks a job; returns the descriptor of its lock, None if it is not queued any more."""
    if not (folder / "job.json").is_file():  # removed meanwhile
        return None
    with suppress(VeneerError):
        descriptor = locks.enter_context(locked(folder / LOCK, wait_seconds=LOCK_SECONDS))
        if read_record(folder).state == "queued":
            return descriptor
    return None


def mark_failed(folder: Path, error: str) -> None:
    """Marks a job as failed whose record says `running` although it has no worker."""
    with suppress(VeneerError), locked(folder / LOCK, wait_seconds=LOCK_SECONDS):
        if (record := read_record(folder)).state == "running":  # neither removed nor resumed
            add_event(folder, error, "error")
            write_record(folder, record, state="failed", error=error, ended=time.time())


def note_waiting(jobs: Sequence[TrainingJob]) -> None:
    """Adds an event to queued jobs that says why none starts, unless it is their last one."""
    for job in jobs:
        events = read_events(job.folder) if job.state == "queued" else []
        if not events or events[-1]["message"] == WAITS_FOR_DISK:
            continue
        with suppress(VeneerError), locked(job.folder / LOCK, wait_seconds=LOCK_SECONDS):
            add_event(job.folder, WAITS_FOR_DISK, "warn")
