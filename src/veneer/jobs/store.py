"""A store of training jobs: runs that train in processes of their own and survive restarts.

    store = JobStore(folder, library="adapters")          # None, None: the user's own folders
    job = store.create(
        {"base": "smollm2-135m", "steps": 100},           # settings of a run file, without `out`
        rows={"train": Path("tickets.jsonl")},            # files, or records: [{"messages": ...}]
        publish_as="tickets",                             # the adapter's name in the library
    )
    store.get(job.id).state      # queued, running, stopping, paused, done, failed, cancelled
    store.get(job.id).facts()    # step, steps, loss; job.records_file has every record
    store.events(job.id)         # what happened, with times
    store.pause(job.id)          # saves a checkpoint; resume continues from it
    store.resume(job.id), store.cancel(job.id), store.delete(job.id)

`create` and `resume` queue a job; it starts at once if no other runs. One trainer runs at a time,
and owners of jobs take turns. A trainer computes the first job of the queue, together with those
that can share its forwards and fit into memory. A worker (worker.py) starts the next trainer when
it ends, so the queue needs no server; a server also calls `start_next` at its start and now and
then, for jobs that a crash left in the queue. Every method reads or writes files: a server calls it
beside its event loop. All methods may be called from many processes and threads at once.

    jobs/<id>/    job.json (record.py), run.yaml, rows, events.jsonl, trainer.log
    runs/<id>/    an ordinary run folder
    files/<id>/   uploaded files (uploads.py)
    published.json    names of adapters that jobs have published (published.py)
    .start.lock   held while the next job is started
    .waiting      pipe that servers open while requests wait (suspension.py)

Raises UnknownNameError for an id that is not a job's, ConfigError for a change that a job's state
does not allow, and QuotaError beyond the limits. Needs Linux or macOS.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from veneer.bases.names.named import refuse_unknown
from veneer.errors import ConfigError, QuotaError
from veneer.files.atomic import atomic_folder, write_text
from veneer.files.home import data_folder, expanded, name_of
from veneer.files.lock import BusyError, locked
from veneer.files.partial import sweep, unfinished
from veneer.files.strict_json import json_text
from veneer.jobs.events import add_event, read_events
from veneer.jobs.job_settings import RowPart, RowSource, copy_rows, row_file_name, with_places
from veneer.jobs.launch import share_of_machine
from veneer.jobs.limits import JobLimits, folder_bytes
from veneer.jobs.queue import jobs_in_turn, mark_failed, note_waiting, start_first
from veneer.jobs.record import (
    AT_WORK,
    DIED,
    ID_PREFIX,
    LOCK,
    LOCK_SECONDS,
    REQUEST,
    RESUMABLE,
    JobRecord,
    State,
    StopRequest,
    TrainingJob,
    check_id,
    new_id,
    num_jobs_together,
    read_record,
    write_record,
)
from veneer.jobs.stored import read_entries
from veneer.library.folder import LibraryFolder
from veneer.library.names import check_name
from veneer.training.config import RunConfig

TRAIN_SHARE = 0.5


class JobStore:
    """Jobs in a folder, which the first `create` makes. folder, library: None is the user's own.

    train_share: part of the processor's threads that a trainer uses, and of the time that it runs
    although requests wait for answers (launch.py, suspension.py)
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        library: str | Path | None = None,
        train_share: float = TRAIN_SHARE,
        limits: JobLimits | None = None,
    ) -> None:
        self.folder = data_folder() / "jobs" if folder is None else expanded(folder).absolute()
        self.library_folder = LibraryFolder(library).folder.absolute()
        self.train_share, self.limits = train_share, limits or JobLimits()
        self.jobs_folder, self.runs_folder = self.folder / "jobs", self.folder / "runs"

    def job_folder(self, job_id: str) -> Path:
        return self.jobs_folder / check_id(job_id)

    def run_folder(self, job_id: str) -> Path:
        return self.runs_folder / check_id(job_id)

    # reading

    def jobs(self) -> list[TrainingJob]:
        """Lists the jobs, the newest first. Leaves out a job whose files are damaged."""
        jobs = read_entries(self.jobs_folder, self.get)
        return sorted(jobs, key=lambda job: (job.record.created, job.id), reverse=True)

    def get(self, job_id: str) -> TrainingJob:
        folder = self.job_folder(job_id)
        record = read_record(folder)
        state: State = record.state
        error = record.error
        if state == "running":
            if self._is_locked(folder):
                state = "running" if self.request(job_id) is None else "stopping"
            else:
                record = read_record(folder)  # the worker may have ended meanwhile
                state = record.state if record.state != "running" else "failed"
                error = record.error if record.state != "running" else DIED
        return TrainingJob(record, state, error, folder, self.run_folder(job_id))

    def find(self, part: str) -> TrainingJob:
        """Finds the only job whose id contains `part`; the prefix of all ids does not count."""
        digits = part.removeprefix(ID_PREFIX)
        matches = [j for j in self.jobs() if digits and digits in j.id.removeprefix(ID_PREFIX)]
        if len(matches) > 1:
            raise ConfigError(
                f"{part!r} is part of {len(matches)} ids",
                [job.id for job in matches[:8]],
                "Write more of it.",
            )
        return matches[0] if matches else self.get(part)

    def events(self, job_id: str) -> list[dict[str, Any]]:
        """Returns the job's events, oldest first: time, level (info, error) and message."""
        return read_events(self.get(job_id).folder)

    def request(self, job_id: str) -> StopRequest | None:
        """Returns what the worker was asked to do and has not done yet."""
        try:
            text = (self.job_folder(job_id) / REQUEST).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return "cancel" if text == "cancel" else "pause"

    def num_together(self, job: TrainingJob) -> int:
        """Counts the jobs that train together with this one."""
        return num_jobs_together(job, self.jobs()) if job.state in AT_WORK else 0

    def used_bytes(self) -> int:
        """Returns the bytes of all jobs, runs and uploaded files."""
        return folder_bytes(self.folder)

    # changing

    def create(
        self,
        settings: Mapping[str, Any],
        *,
        rows: Mapping[RowPart, RowSource],
        publish_as: str | None = None,
        owner: str = "",
        details: Mapping[str, Any] = MappingProxyType({}),
        error: str | None = None,
    ) -> TrainingJob:
        """Queues a job, and starts it if no other runs.

        settings   of a run file, without `out` and without the files of rows
        rows       files or records of `train`, and of `validation` if there are any; copied
        publish_as the adapter's name in the library; a further version if the name exists
        owner      whose job it is; the queue takes turns between owners
        details    JSON values that are kept with the job
        error      why it cannot be trained: the job is kept as a failed one
        """
        _require_posix()
        self._check_room()
        job_id = new_id()
        folder, run_folder = self.job_folder(job_id), self.run_folder(job_id)
        files = {part: row_file_name(part, source) for part, source in rows.items()}
        run_settings = with_places(
            settings, run_folder, {part: folder / name for part, name in files.items()}
        )
        config = RunConfig.of(run_settings)
        refuse_unknown(config.base)
        if publish_as is not None:
            check_name(publish_as)
            if config.method.trains_base:
                raise ConfigError(
                    f"method {config.method.name} makes a model, and a library holds adapters",
                    next_step="Leave the name out, or take method lora.",
                )
        now = time.time()
        threads, niceness = share_of_machine(self.train_share)
        record = JobRecord(
            id=job_id,
            state="queued" if error is None else "failed",
            error=error,
            ended=None if error is None else now,
            created=now,
            queued=now,
            owner=owner,
            base=name_of(config.base),
            threads=threads,
            niceness=niceness,
            share=self.train_share,
            disk_bytes=self.limits.disk_bytes,
            publish_as=publish_as,
            library=str(self.library_folder),
            details=dict(details),
        )
        with atomic_folder(folder) as partial:
            for part, source in rows.items():
                copy_rows(source, partial / files[part], self.folder)
            text = yaml.safe_dump(run_settings, sort_keys=False, allow_unicode=True)
            (partial / "run.yaml").write_text(text, encoding="utf-8")
            record_text = json_text(record.model_dump(mode="json"))
            (partial / "job.json").write_text(record_text, encoding="utf-8")
            add_event(partial, f"Created fine-tuning job: {job_id}")
            if error is not None:
                add_event(partial, error, "error")
        self.start_next()
        return self.get(job_id)

    def start_next(self) -> TrainingJob | None:
        """Starts the next job of the queue unless one runs, and with it those that can share its
        forwards. Returns the first of them.

        Jobs whose worker died are marked as failed. While the disk space is used up, none starts.
        """
        if not self.jobs_folder.is_dir():
            return None
        with locked(self.folder / ".start.lock"):
            jobs = self.jobs()
            for job in jobs:
                if job.record.state == "running" and job.state == "failed":
                    mark_failed(job.folder, DIED)
            if any(job.state in AT_WORK for job in jobs):
                return None
            queue = jobs_in_turn(jobs)
            if queue and self.limits.disk_fault(self.used_bytes()):
                note_waiting(jobs)
                return None
            job_id = start_first(self.folder, queue)
        return None if job_id is None else self.get(job_id)

    def pause(self, job_id: str) -> TrainingJob:
        """Pauses a queued job, or asks the trainer to save a checkpoint and end."""
        return self._stop(job_id, "pause", ("queued",))

    def cancel(self, job_id: str) -> TrainingJob:
        """Cancels a job. Its checkpoints stay, but it cannot be resumed."""
        return self._stop(job_id, "cancel", ("queued", "paused"))

    def resume(self, job_id: str) -> TrainingJob:
        """Queues a paused or failed job again; it continues from its last checkpoint. Raises
        QuotaError if the disk space is used up."""
        _require_posix()
        self._check_disk()
        job = self.get(job_id)
        if job.state not in RESUMABLE:  # a worker holds the lock for as long as it trains
            raise _not_possible(job_id, job.state, "resumed", RESUMABLE)
        with locked(job.folder / LOCK, wait_seconds=LOCK_SECONDS):
            record = read_record(job.folder)
            if (state := _state_without_worker(record)) not in RESUMABLE:
                raise _not_possible(job_id, state, "resumed", RESUMABLE)
            self.drop_request(job_id)
            write_record(
                job.folder,
                record,
                state="queued",
                queued=time.time(),
                ended=None,
                error=None,
                has_failed=record.has_failed or state == "failed",
                disk_bytes=self.limits.disk_bytes,
            )
            add_event(job.folder, "The job was resumed")
        self.start_next()
        return self.get(job_id)

    def delete(self, job_id: str) -> None:
        """Removes a job with its run and checkpoints. An adapter in the library stays."""
        from veneer.training.state.folder import remove_run  # loads torch

        job = self.get(job_id)
        if job.state in AT_WORK:
            raise ConfigError(f"job {job_id} is {job.state}", next_step="Pause or cancel it first.")
        with locked(job.folder / LOCK, wait_seconds=LOCK_SECONDS):
            remove_run(job.run_folder)
            with unfinished(self.jobs_folder) as gone:
                job.folder.rename(gone)
        self.start_next()  # jobs may have waited for its disk space

    def drop_request(self, job_id: str) -> None:
        (self.job_folder(job_id) / REQUEST).unlink(missing_ok=True)

    # helpers

    def _is_locked(self, folder: Path) -> bool:
        """Returns whether a worker, or a process that changes the job, holds its lock."""
        try:
            with locked(folder / LOCK, shared=True, wait_seconds=0):
                return False
        except BusyError:
            return True

    def _stop(self, job_id: str, request: StopRequest, idle_states: Sequence[State]) -> TrainingJob:
        """Writes the state of an idle job, or a request to the worker of a running one."""
        job, ended = self.get(job_id), "paused" if request == "pause" else "cancelled"
        if job.state in idle_states:
            try:
                with locked(job.folder / LOCK, wait_seconds=LOCK_SECONDS):
                    record = read_record(job.folder)
                    if _state_without_worker(record) in idle_states:
                        write_record(job.folder, record, state=ended, ended=time.time())
                        add_event(job.folder, f"The job was {ended}")
                        return self.get(job_id)
            except BusyError:  # it was started meanwhile
                pass
            job = self.get(job_id)
        if job.state not in AT_WORK:
            raise _not_possible(job_id, job.state, ended, (*idle_states, "running"))
        write_text(job.folder / REQUEST, request, replace=True)
        return self.get(job_id)

    def _check_room(self) -> None:
        """Raises QuotaError if a further job is beyond the limits."""
        sweep(self.jobs_folder)
        sweep(self.runs_folder)
        jobs, limits = self.jobs(), self.limits
        waiting = sum(job.state == "queued" for job in jobs)
        for count, most, state in (
            (len(jobs), limits.jobs, "are kept"),
            (waiting, limits.waiting, "wait in the queue"),
        ):
            if count >= most:
                raise QuotaError(
                    f"{count:,} jobs {state}, which is the limit",
                    [],
                    "Delete or cancel some first.",
                )
        self._check_disk()

    def _check_disk(self) -> None:
        """Raises QuotaError if the disk space is used up."""
        if (fault := self.limits.disk_fault(self.used_bytes())) is not None:
            raise QuotaError(fault, [], "Delete jobs or files first.")


def _state_without_worker(record: JobRecord) -> State:
    """Returns the state of a job whose lock this process holds, so that no worker is alive."""
    return "failed" if record.state == "running" else record.state


def _not_possible(job_id: str, state: State, change: str, states: Sequence[State]) -> ConfigError:
    return ConfigError(
        f"job {job_id} is {state} and cannot be {change}",
        next_step=f"Only jobs that are {' or '.join(states)} can be {change}.",
    )


def _require_posix() -> None:
    if sys.platform == "win32":
        raise ConfigError("jobs need Linux or macOS", next_step="Use veneer train here.")
