"""The worker: runs the trainer of one job, publishes the adapter and writes the job's state.

    python -m veneer.jobs.worker STORE ID DESCRIPTOR

It owns job.json until it ends (record.py). `veneer train` runs as its child, at lower priority, and
is suspended while requests wait for their first token (suspension.py). A request to pause or
cancel, or SIGTERM, asks the trainer to save a checkpoint and end; so does a store whose disk space
is used up, and then the job fails. At its end the worker starts the next job of the queue.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

from veneer.child import end_with_parent
from veneer.errors import RunInterrupted, VeneerError
from veneer.files.atomic import write_text
from veneer.jobs.events import add_event
from veneer.jobs.launch import LOG, lower_priority, trainer_command, trainer_environment
from veneer.jobs.published import note_published
from veneer.jobs.record import JobRecord, StopRequest, read_record, write_record
from veneer.jobs.results import RESULT, metrics_csv
from veneer.jobs.run_facts import RECORDS
from veneer.jobs.store import JobStore
from veneer.jobs.suspension import Suspension
from veneer.library.library import Library
from veneer.training.output.records import read_records

POLL_SECONDS = 0.2
DISK_SECONDS = 2.0
"""Time between two looks at the disk space that the store takes."""
MOST_ERROR = 4000
"""Bytes of the trainer's last messages that become the job's error."""


class Worker:
    """Runs one job to its end. The caller holds the job's lock."""

    def __init__(self, store: JobStore, job_id: str, descriptor: int) -> None:
        self.store, self.descriptor = store, descriptor
        self.folder, self.run_folder = store.job_folder(job_id), store.run_folder(job_id)
        self.record: JobRecord = read_record(self.folder)
        self._signalled = False
        self._next_look = 0.0
        self._disk_fault: str | None = None
        """Why the trainer is stopped, if the disk space is used up."""

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note_signal)
        try:
            if (self.run_folder / "summary.json").is_file() or self._train():
                self._publish()
        except Exception as fault:
            self._fail(f"{type(fault).__name__}: {fault}"[:MOST_ERROR])

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def _request(self) -> StopRequest | None:
        return self.store.request(self.record.id) or ("pause" if self._signalled else None)

    def _disk_is_full(self) -> bool:
        """Looks now and then whether the store takes more disk space than it may."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + DISK_SECONDS
            self._disk_fault = self.store.limits.disk_fault(self.store.used_bytes())
        return self._disk_fault is not None

    def _train(self) -> bool:
        """Runs the trainer. Returns True if it has finished the run; otherwise writes the job's
        state."""
        log = self.folder / LOG
        start = log.stat().st_size
        with log.open("ab") as output:
            trainer = subprocess.Popen(
                trainer_command(self.folder / "run.yaml", self.run_folder),
                env=trainer_environment(os.environ, self.record.threads),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=output,
                pass_fds=(self.descriptor,),
                process_group=0,
                preexec_fn=self._begin_trainer,
            )
        is_ending = False
        with Suspension(trainer.pid, self.store.folder, self.record.share) as suspension:
            while trainer.poll() is None:
                if not is_ending and (self._request() is not None or self._disk_is_full()):
                    suspension.end()
                    trainer.terminate()
                    is_ending = True
                suspension.wait(POLL_SECONDS)
        request, code = self._request(), trainer.returncode
        if request == "cancel":
            self._end("cancelled", "The job was cancelled")
        elif code == 0:
            return True
        elif self._disk_fault is not None:
            self._fail(
                f"The run was stopped: {self._disk_fault}. Delete jobs or files, then resume the"
                " job to continue from its last checkpoint."
            )
        elif code in (RunInterrupted.exit_code, -signal.SIGTERM):
            self._end("paused", "The job was paused")
        elif code < 0:
            self._fail(
                f"The trainer was killed by {signal.Signals(-code).name}; if nobody killed it, the"
                " machine was out of memory. Resume the job to continue from its last checkpoint."
            )
        else:
            self._fail(_last_text(log, start) or f"The trainer ended with exit code {code}.")
        return False

    def _begin_trainer(self) -> None:
        """Lowers the trainer's priority, and ends it with its worker. Runs in the new process."""
        end_with_parent()
        lower_priority(self.record.niceness)

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
                self._fail(f"The adapter was trained, but not added to the library. {fault}")
                return
            add_event(self.folder, f"New fine-tuned model created: {name}")
        records = read_records(self.run_folder / RECORDS)
        write_text(self.folder / RESULT, metrics_csv(records), replace=True)
        self._end("done", "The job has successfully completed", adapter=adapter)

    def _end(self, state: str, message: str, **changes: str | None) -> None:
        add_event(self.folder, message)
        self._write(state=state, **changes)

    def _fail(self, message: str) -> None:
        add_event(self.folder, message, "error")
        self._write(state="failed", error=message)

    def _write(self, **changes: str | None) -> None:
        self.store.drop_request(self.record.id)
        self.record = write_record(self.folder, self.record, ended=time.time(), **changes)


def _last_text(log: Path, start: int) -> str:
    """Returns the end of the log's text, at most MOST_ERROR bytes and none before `start`."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - MOST_ERROR))
        return file.read().decode("utf-8", "replace").strip()


def main(folder: str, job_id: str, descriptor: str) -> None:
    store = JobStore(folder)
    if (disk_bytes := read_record(store.job_folder(job_id)).disk_bytes) is not None:
        store.limits = replace(store.limits, disk_bytes=disk_bytes)
    Worker(store, job_id, int(descriptor)).run()
    os.close(int(descriptor))
    store.start_next()


if __name__ == "__main__":
    main(*sys.argv[1:])
