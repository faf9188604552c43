"""Trains the rows of a draft as a job, and follows the job's records."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, UnknownNameError, hide_path
from veneer.files.strict_json import legible, read_json
from veneer.jobs.record import ENDED, OPEN, RESUMABLE, TrainingJob
from veneer.jobs.store import JobStore
from veneer.serve.refusals import without_folders
from veneer.serve.studio.drafts import Draft
from veneer.serve.studio.events import Look, Update
from veneer.training.output.records import follow_records

PART_BYTES = 2**20
SHOWN = (
    "kind",
    "step",
    "steps",
    "loss",
    "gradient_norm",
    "learning_rate",
    "tokens",
    "seconds",
    "memory_bytes",
    "reason",
    "best",
    "sample",
    "train_rows",
    "validation_rows",
    "planned_memory_bytes",
    "trainable_parameters",
    "time",
)
"""Fields of records that the page shows."""
SUMMARY = (
    "reason",
    "steps",
    "total_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "validation_loss",
    "held_out",
    "best_step",
    "adapter_bytes",
    "preference",
)
"""Fields of a run's summary that the page shows."""


def start_job(
    store: JobStore, draft: Draft, rows: Path, settings: dict[str, Any], owner: str
) -> TrainingJob:
    """Queues the run of a draft. ConfigError: its job has not ended, or a setting is wrong."""
    if draft.job is not None:
        with suppress(UnknownNameError):  # the job was deleted
            if (job := store.get(draft.job)).state not in ENDED:
                raise ConfigError(
                    f"these rows are being trained on: the job is {job.state}",
                    next_step="Stop it or resume it, or drop the file again for another run.",
                )
    data = {name: value for name, value in settings["data"].items() if name != "train"}
    return store.create(
        {**settings, "data": data},
        rows={"train": rows},
        owner=owner,
        details={
            "draft": draft.id,
            "rows": draft.name,
            "base": draft.method.get("base", ""),
            "document": None if draft.document is None else draft.document.file,
        },
    )


def base_name_of(job: TrainingJob) -> str:
    """Returns the name of the base that a job trains on, for people."""
    return str(job.record.details.get("base") or job.record.base)


def job_card(job: TrainingJob) -> dict[str, Any]:
    """Describes a job for the page, with the summary of its run once there is one."""
    card: dict[str, Any] = {
        "id": job.id,
        "state": job.state,
        "error": None if job.error is None else without_folders(job.error),
        "open": job.state in OPEN,
        "resumable": job.state in RESUMABLE,
        "summary": None,
    }
    summary = job.run_folder / "summary.json"
    if summary.is_file():
        whole = read_json(summary)
        card["summary"] = {name: whole.get(name) for name in SUMMARY}
    return dict(legible(card))


def job_records_after(job: TrainingJob, after: int) -> dict[str, Any]:
    """Returns a job's records from a position on. `start` is 0 if they are those from the
    beginning, because the file was rewritten."""
    file = job.records_file
    if not file.is_file():
        return {"records": [], "start": 0, "next": 0, "more": False}
    with hide_path(job.run_folder, "the run"):
        part = follow_records(file, after, most_bytes=PART_BYTES, shown="the run's records")
    shown = [{name: legible(r[name]) for name in SHOWN if name in r} for r in part.records]
    return {"records": shown, "start": part.start, "next": part.next, "more": part.more}


def job_look(progress: Callable[[int], Awaitable[dict[str, Any]]], after: int) -> Look:
    """Returns a look at a job, whose events have the records since the last look.

    `next` of an event is the position from which a reader goes on after the connection was lost.
    """
    last_card = None

    async def look() -> Update:
        nonlocal after, last_card
        update = await progress(after)
        is_news = bool(update["records"]) or update["job"] != last_card
        after, last_card = update["next"], update["job"]
        return Update(update, update["job"]["open"], is_news, has_more=update["more"])

    return look
