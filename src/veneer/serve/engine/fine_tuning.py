"""Fine-tuning through the server: uploaded files and jobs, by their ids.

Only a server that was started with `--train` has a FineTuning. Its methods read and write files,
so the routes (http/fine_tuning.py) call them beside the event loop.
"""

import asyncio
import logging
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from veneer.adapters.method_config import RateBasis
from veneer.bounds import PART, check_numbers
from veneer.data.examples import Problem, RowKind
from veneer.data.files.sources import iterate_rows
from veneer.errors import UnknownNameError, VeneerError
from veneer.jobs.job_settings import RowPart
from veneer.jobs.limits import JobLimits
from veneer.jobs.record import TrainingJob, num_jobs_together
from veneer.jobs.result_file import RESULT
from veneer.jobs.store import TRAIN_SHARE, JobStore
from veneer.jobs.uploads import UploadStore
from veneer.library.library import Library
from veneer.serve.engine.names import ModelNames
from veneer.serve.limits import JOB_LIMITS, MOST_TRAINING_ROWS
from veneer.serve.protocols.fine_tuning import (
    CreateJobBody,
    file_object,
    job_object,
    job_of_result,
    result_file_object,
)
from veneer.serve.refusals import MOST_SHOWN, Refusal, refusing, without_folders
from veneer.training.config import RunConfig
from veneer.training.state.parents import with_parent_settings

log = logging.getLogger("veneer.serve")
TICK_SECONDS = 30.0
"""Time between looks at the queue. A worker that ends starts the next job by itself."""
MOST_FAULTS = 10
"""Rows whose faults an error names."""
MOST_SLUG = 40
PARAMS: dict[RowPart, str] = {"train": "training_file", "validation": "validation_file"}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of `veneer serve --train`.

    folder  of the jobs; None: the user's own
    share   part of the threads that a trainer uses, and of the time that it is not suspended
    run     settings of every run: base, dtype, device, quantize
    """

    run: Mapping[str, Any]
    folder: Path | None = None
    share: float = TRAIN_SHARE
    limits: JobLimits = JOB_LIMITS

    def __post_init__(self) -> None:
        check_numbers(share=(PART, self.share))


class FineTuning:
    """Uploads files and makes jobs of them. base: what is served. length: most tokens of a row,
    None for a run's default"""

    def __init__(
        self,
        settings: TrainSettings,
        library: Library,
        names: ModelNames,
        *,
        base: RateBasis,
        length: int | None,
    ) -> None:
        self.store = JobStore(
            settings.folder,
            library=library.folder,
            train_share=settings.share,
            limits=settings.limits,
        )
        library.make()
        self.uploads = UploadStore(self.store.folder, settings.limits)
        self._library, self._names, self.run = library, names, settings.run
        self._base = base
        self._length = length or RunConfig.model_fields["length"].default

    async def start_jobs(self) -> None:
        """Starts jobs that a crash left in the queue, now and then until it is cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.store.start_next)
            except (VeneerError, OSError) as fault:
                log.warning("no job was started: %s", without_folders(str(fault)))
            await asyncio.sleep(TICK_SECONDS)

    # files

    def upload(self, source: BinaryIO, name: str, owner: str) -> dict[str, Any]:
        with refusing("file"):
            return file_object(self.uploads.add(source, name=name, owner=owner))

    def files(self) -> list[dict[str, Any]]:
        """Lists uploaded files and results, the newest first."""
        results = []
        for job in self.store.jobs():
            if job.state == "done":
                with suppress(VeneerError):  # removed meanwhile
                    results.append(result_file_object(job))
        uploaded = [file_object(file) for file in self.uploads.files()]
        return sorted([*uploaded, *results], key=lambda file: file["created_at"], reverse=True)

    def file(self, file_id: str) -> dict[str, Any]:
        job = self._result_job(file_id)
        with _refusing_unknown(file_id, "file", "file_id"):
            return (
                file_object(self.uploads.get(file_id)) if job is None else result_file_object(job)
            )

    def content(self, file_id: str) -> BinaryIO:
        """Opens an uploaded file or a result file. A deletion does not change what is open."""
        job = self._result_job(file_id)
        path = self._uploaded_path(file_id) if job is None else job.folder / RESULT
        try:
            return path.open("rb")
        except FileNotFoundError:  # deleted meanwhile
            raise unknown(file_id, "file", "file_id") from None

    def delete_file(self, file_id: str) -> dict[str, Any]:
        if self._result_job(file_id) is not None:
            raise Refusal(400, "A result file is deleted with its job.", "file_id")
        with _refusing_unknown(file_id, "file", "file_id"):
            self.uploads.delete(file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    def _uploaded_path(self, file_id: str, param: str = "file_id") -> Path:
        with _refusing_unknown(file_id, "file", param):
            return self.uploads.content_path(file_id)

    def _result_job(self, file_id: str) -> TrainingJob | None:
        """Returns the finished job whose result file this is."""
        job_id = job_of_result(file_id)
        if job_id is None:
            return None
        with _refusing_unknown(file_id, "file", "file_id"):
            job = self.store.get(job_id)
        if job.state != "done":
            raise unknown(file_id, "file", "file_id")
        return job

    # jobs

    def create(self, body: CreateJobBody, owner: str) -> dict[str, Any]:
        """Queues a job. A file with wrong rows makes a failed job, as at OpenAI."""
        file_ids: dict[RowPart, str] = {"train": body.training_file}
        if body.validation_file is not None:
            file_ids["validation"] = body.validation_file
        rows: dict[RowPart, Path] = {
            part: self._uploaded_path(file_id, PARAMS[part]) for part, file_id in file_ids.items()
        }
        settings = self._settings(body)
        row_kind = _run_config(settings).objective.rows
        faults = [
            fault
            for part, path in rows.items()
            for fault in row_faults(path, row_kind, PARAMS[part])
        ]
        job = self.store.create(
            settings,
            rows=rows,
            publish_as=_model_name(body.suffix),
            owner=owner,
            details=body.details(),
            error="\n".join(faults[:MOST_FAULTS]) or None,
        )
        return self.describe(job)

    def _settings(self, body: CreateJobBody) -> dict[str, Any]:
        """Returns the settings of a run. All rows are trained, and longer ones than the model has
        positions are cut, as at OpenAI."""
        settings = {
            **self.run,
            **body.run_settings(),
            "length": self._length,
            "data": {"long_rows": "cut", "validation_share": 0.0},
        }
        if body.model != self._names.base_name:
            entry = self._names.entry(body.model)
            settings["from_adapter"] = str(self._library.path(entry.reference))
        if (factor := body.chosen.learning_rate_multiplier) != "auto":
            config = with_parent_settings(_run_config(settings))
            method = config.method.for_learning_rate(config.learning_rate)
            settings["method"] = method.model_dump(mode="json")
            settings["quantize"] = config.quantize  # which `qlora` gave
            settings["learning_rate"] = factor * config.peak_learning_rate(self._base)
        return settings

    def job(self, job_id: str) -> TrainingJob:
        """Returns a job. Raises Refusal 404 for an unknown one."""
        with _refusing_unknown(job_id, "job", "fine_tuning_job_id"):
            return self.store.get(job_id)

    def change(self, job_id: str, change: Callable[[str], TrainingJob]) -> dict[str, Any]:
        """Changes a job's state: store.pause, resume or cancel. Refusal: 400, 404."""
        with _refusing_unknown(job_id, "job", "fine_tuning_job_id"):
            return self.describe(change(job_id))

    def describe(self, job: TrainingJob) -> dict[str, Any]:
        """Returns the object of a job."""
        return job_object(job, others=self.store.num_together(job))

    def describe_all(self) -> list[dict[str, Any]]:
        """Returns the objects of all jobs, the newest first."""
        jobs = self.store.jobs()
        return [job_object(job, others=num_jobs_together(job, jobs)) for job in jobs]


def _run_config(settings: Mapping[str, Any]) -> RunConfig:
    """Reads the settings of a run whose files are chosen later."""
    return RunConfig.of({**settings, "data": "rows.jsonl", "out": "out"})


def row_faults(path: Path, kind: RowKind, param: str) -> list[str]:
    """Describes the first wrong rows of a file, a line each. Needs no tokenizer."""
    faults: list[str] = []
    count = 0
    try:
        for count, row in enumerate(iterate_rows(path, kind=kind), 1):
            if isinstance(row, Problem) and row.fatal:
                faults.append(f"{param}: {row}")
            if len(faults) >= MOST_FAULTS:
                break
            if count > MOST_TRAINING_ROWS:
                faults.append(
                    f"{param}: it has more than {MOST_TRAINING_ROWS:,} rows, which is the limit"
                )
                break
    except VeneerError as fault:
        faults.append(f"{param}: {without_folders(str(fault))}")
    return faults


def unknown(name: str, noun: str, param: str) -> Refusal:
    return Refusal(404, f"There is no {noun} `{name[:MOST_SHOWN]}`.", param, f"{noun}_not_found")


@contextmanager
def _refusing_unknown(name: str, noun: str, param: str) -> Iterator[None]:
    """Turns an UnknownNameError of the block into a Refusal: 404."""
    try:
        yield
    except UnknownNameError:
        raise unknown(name, noun, param) from None


def _model_name(suffix: str | None) -> str:
    """Returns a new name for an adapter, with the suffix in the letters that names may have."""
    slug = re.sub(r"[^a-z0-9]+", "-", (suffix or "").lower())[:MOST_SLUG].strip("-")
    return "-".join(["ft", *([slug] if slug else []), secrets.token_hex(3)])


def page_of(objects: Sequence[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """Returns a page of a list: up to `limit` objects behind the one with the id `after`."""
    start = 0
    if after is not None:
        places = [place for place, item in enumerate(objects) if item["id"] == after]
        if not places:
            raise Refusal(400, f"after: there is no object `{after[:MOST_SHOWN]}`.", "after")
        start = places[0] + 1
    page = list(objects[start : start + limit])
    return {
        "object": "list",
        "data": page,
        "has_more": start + limit < len(objects),
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
    }
