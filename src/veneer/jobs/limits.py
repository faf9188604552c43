"""Limits of a store of jobs: how many, how large, and how much disk they may take together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class JobLimits:
    """Bounds a store.

    jobs        jobs that are kept, ended ones included
    waiting     jobs in the queue
    disk_bytes  jobs, runs, uploaded files, exports and evaluations together; a run that goes
                beyond is stopped
    files       uploaded files
    file_bytes  one uploaded file
    """

    jobs: int = 200
    waiting: int = 20
    disk_bytes: int = 20 * 2**30
    files: int = 1000
    file_bytes: int = 512 * 2**20

    @property
    def results_bytes(self) -> int:
        """Bytes of the store up to which exports and evaluations may write. The last tenth of
        disk_bytes is left to jobs, because a run that cannot save its checkpoint is stopped."""
        return self.disk_bytes - self.disk_bytes // 10

    def disk_fault(self, used_bytes: int) -> str | None:
        """Says that the disk space is used up; None if it is not."""
        if used_bytes < self.disk_bytes:
            return None
        return f"jobs and files take {used_bytes:,} bytes, the limit is {self.disk_bytes:,}"


def folder_bytes(folder: Path) -> int:
    """Returns the bytes of all files below a folder; a file with several links counts once. Other
    processes may change the folder meanwhile."""
    size, linked = 0, set[tuple[int, int]]()
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                facts = (Path(place) / name).lstat()
            except OSError:  # removed meanwhile
                continue
            if facts.st_nlink > 1:
                if (key := (facts.st_dev, facts.st_ino)) in linked:
                    continue
                linked.add(key)
            size += facts.st_size
    return size
