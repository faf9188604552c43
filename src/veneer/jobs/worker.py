"""The worker: runs a trainer, publishes the adapters of its jobs and writes their states.

    python -m veneer.jobs.worker STORE ID:DESCRIPTOR...

It owns job.json of each job until that job has ended (record.py). The trainer (trainer.py) runs as
its child, at lower priority, is suspended while requests wait for their first token
(suspension.py), and lets single jobs go. If all of its jobs are asked to pause or to be cancelled,
at SIGTERM, and when the store's disk space is used up, the worker asks the trainer to save
checkpoints and end; in the last case the jobs fail. At its end the worker starts the next jobs of
the queue.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import FrameType

from veneer.child import end_with_parent, module_command
from veneer.errors import VeneerError
from veneer.files.atomic import write_text
from veneer.files.lock import unlock
from veneer.jobs.events import Level, add_event
from veneer.jobs.launch import LOG, lower_priority, trainer_environment
from veneer.jobs.outcome import Outcome, read_outcome
from veneer.jobs.published import note_published
from veneer.jobs.record import JobRecord, StoredState, read_record, write_record
from veneer.jobs.result_file import RESULT, metrics_csv
from veneer.jobs.run_facts import RECORDS
from veneer.jobs.store import JobStore
from veneer.jobs.suspension import Suspension
from veneer.library.library import Library
from veneer.training.output.records import read_records

POLL_SECONDS = 0.2
DISK_SECONDS = 2.0
"""Time between two looks at the disk space that the store takes."""
RESUME = "Resume the job to continue from its last checkpoint."
TRIED_ALONE = "Other jobs shared this trainer, so the job is tried once more, alone."
WAITS_FOR_MEMORY = "The job waits: the jobs that train now leave no memory for it."


class WorkerJob:
    """Writes the state of one job.

    descriptor: of the job's lock, which is held until it ends. is_shared: whether it shares the
    trainer with other jobs
    """

    def __init__(self, store: JobStore, job_id: str, descriptor: int, *, is_shared: bool) -> None:
        self.store, self.descriptor, self.is_shared = store, descriptor, is_shared
        self.folder, self.run_folder = store.job_folder(job_id), store.run_folder(job_id)
        self.record: JobRecord = read_record(self.folder)
        self.has_ended = False

    @property
    def is_asked_to_stop(self) -> bool:
        return self.store.request(self.record.id) is not None

    def end(self, outcome: Outcome, disk_fault: str | None = None) -> None:
        """Writes the state after the training. disk_fault: why the trainer was stopped"""
        request = self.store.request(self.record.id)
        if request == "cancel":
            self._write("cancelled", "The job was cancelled")
        elif outcome.kind == "done":
            self._publish()
        elif outcome.kind == "crashed" and self.is_shared and disk_fault is None:
            self._try_alone(outcome.error, is_asked_to_pause=request is not None)
        elif outcome.kind in ("failed", "crashed"):
            self.fail(outcome.error)
        elif disk_fault is not None:
            self.fail(
                f"The run was stopped: {disk_fault}. Delete jobs or files, then resume the job to"
                " continue from its last checkpoint."
            )
        elif outcome.kind == "no_room" and request is None:
            self._write("queued", WAITS_FOR_MEMORY, started=None, ended=None)
        else:
            self._write("paused", "The job was paused")

    def fail(self, error: str) -> None:
        self._write("failed", error, error=error)

    def _try_alone(self, error: str, *, is_asked_to_pause: bool) -> None:
        """Queues the job again, or pauses it. Another job may have ended the trainer."""
        message = f"{error} {TRIED_ALONE}"
        self._write("paused" if is_asked_to_pause else "queued", message, alone=True, level="warn")

    def _publish(self) -> None:
        """Adds the adapter to the library; the job is done."""
        name, adapter = self.record.publish_as, None
        if name is not None:
            try:
                library = Library(self.record.library)
                entry = library.add(self.run_folder, name=name)
                note_published(self.store.folder, entry)
                adapter = entry.reference
            except VeneerError as fault:
                self.fail(f"The adapter was trained, but not added to the library. {fault}")
                return
            add_event(self.folder, f"New fine-tuned model created: {name}")
        records = read_records(self.run_folder / RECORDS)
        write_text(self.folder / RESULT, metrics_csv(records), replace=True)
        self._write("done", "The job has successfully completed", adapter=adapter)

    def _write(
        self, state: StoredState, message: str, level: Level = "info", **changes: str | float | None
    ) -> None:
        """Writes the job's last state and event, and unlocks it."""
        add_event(self.folder, message, "error" if state == "failed" else level)
        self.store.drop_request(self.record.id)
        changes = {"state": state, "ended": time.time(), **changes}
        self.record = write_record(self.folder, self.record, **changes)
        unlock(self.descriptor)
        self.has_ended = True


class Worker:
    """Runs jobs of one trainer to their ends. The caller holds their locks."""

    def __init__(self, store: JobStore, jobs: Sequence[WorkerJob]) -> None:
        self.store, self.jobs = store, jobs
        self._signalled = False
        self._next_look = 0.0
        self._disk_fault: str | None = None
        """Why the trainer is stopped, if the disk space is used up."""

    @property
    def _open(self) -> list[WorkerJob]:
        return [job for job in self.jobs if not job.has_ended]

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note_signal)
        try:
            for job in self.jobs:
                if (job.run_folder / "summary.json").is_file():  # it was not published
                    self._end(job, Outcome(kind="done"))
            if self._open:
                self._train()
        except Exception as fault:
            for job in self._open:
                job.fail(self._log(fault))

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def _must_stop(self) -> bool:
        """Returns whether the trainer has to end before its jobs have ended."""
        asked = bool(self._open) and all(job.is_asked_to_stop for job in self._open)
        return asked or self._signalled or self._disk_is_full()

    def _disk_is_full(self) -> bool:
        """Looks now and then whether the store takes more disk space than it may."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + DISK_SECONDS
            self._disk_fault = self.store.limits.disk_fault(self.store.used_bytes())
        return self._disk_fault is not None

    def _train(self) -> None:
        """Runs the trainer until it ends. Ends each job as soon as it has an outcome."""
        first = self._open[0]
        with (first.folder / LOG).open("ab") as output:
            trainer = subprocess.Popen(
                [
                    *module_command("veneer.jobs.trainer"),
                    str(self.store.folder),
                    *(job.record.id for job in self._open),
                ],
                env=trainer_environment(os.environ, first.record.threads),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=output,
                pass_fds=[job.descriptor for job in self._open],
                process_group=0,
                preexec_fn=self._begin_trainer,
            )
        is_ending = False
        with Suspension(trainer.pid, self.store.folder, first.record.share) as suspension:
            while trainer.poll() is None:
                for job, outcome in self._outcomes():
                    suspension.release()  # publishing may wait for the library
                    self._end(job, outcome)
                if not is_ending and self._must_stop():
                    suspension.end()
                    trainer.terminate()
                    is_ending = True
                suspension.wait(POLL_SECONDS)
        for job, outcome in self._outcomes():
            self._end(job, outcome)
        for job in self._open:
            self._end(job, trainer_outcome(trainer.returncode, first))

    def _begin_trainer(self) -> None:
        """Lowers the trainer's priority, and ends it with its worker. Runs in the new process."""
        end_with_parent()
        lower_priority(self.jobs[0].record.niceness)

    def _outcomes(self) -> Iterator[tuple[WorkerJob, Outcome]]:
        """Yields the open jobs that have an outcome, with it."""
        for job in self._open:
            if (outcome := read_outcome(job.folder)) is not None:
                yield job, outcome

    def _end(self, job: WorkerJob, outcome: Outcome) -> None:
        try:
            job.end(outcome, self._disk_fault)
        except Exception as fault:
            job.fail(self._log(fault))

    def _log(self, fault: Exception) -> str:
        """Prints the traceback of an error of Veneer's into the log; returns what the user sees."""
        traceback.print_exception(fault)
        return f"An error in Veneer ended the job's worker. {_log_place(self.jobs[0])}"


def trainer_outcome(code: int, first: WorkerJob) -> Outcome:
    """Returns the outcome of jobs for which the trainer wrote none. The log is not quoted: it may
    hold rows of another owner. first: the job whose folder has the log"""
    if code == -signal.SIGTERM:
        return Outcome(kind="interrupted")
    if code == -signal.SIGKILL:
        reason = "The trainer was killed, probably by the system because memory ran out (SIGKILL)."
    elif code < 0:
        reason = f"The trainer crashed with signal {_signal_name(-code)}."
    else:
        reason = f"An error in Veneer ended the trainer (exit code {code})."
    if code != -signal.SIGKILL:
        reason += f" {_log_place(first)}"
    return Outcome(kind="crashed", error=reason if first.is_shared else f"{reason} {RESUME}")


def _log_place(first: WorkerJob) -> str:
    return f"The log is jobs/{first.record.id}/{LOG} in the folder of jobs."


def _signal_name(number: int) -> str:
    names = {one.value: one.name for one in signal.Signals}  # real-time signals have no name
    return names.get(number, str(number))


def main(folder: str, *jobs: str) -> None:
    store = JobStore(folder)
    pairs = [job.split(":") for job in jobs]
    worker_jobs = [
        WorkerJob(store, job_id, int(descriptor), is_shared=len(pairs) > 1)
        for job_id, descriptor in pairs
    ]
    if (disk_bytes := worker_jobs[0].record.disk_bytes) is not None:
        store.limits = replace(store.limits, disk_bytes=disk_bytes)
    Worker(store, worker_jobs).run()
    store.start_next()


if __name__ == "__main__":
    main(*sys.argv[1:])
