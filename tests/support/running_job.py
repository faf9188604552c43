"""Makes a job that runs without a trainer: its lock is held, so the store starts no other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from veneer.files.lock import locked
from veneer.jobs.record import JobRecord, new_id, write_record
from veneer.jobs.store import JobStore


@contextmanager
def running_job(store: JobStore) -> Iterator[None]:
    folder = store.job_folder(new_id())
    folder.mkdir(parents=True)
    record = JobRecord(
        id=folder.name,
        state="running",
        created=1,
        queued=1,
        threads=1,
        niceness=0,
        library=str(store.folder),
    )
    write_record(folder, record)
    with locked(folder / ".lock"):
        yield
    shutil.rmtree(folder)
