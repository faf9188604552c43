"""What the system tells of its memory."""

from __future__ import annotations

from pathlib import Path


def memory() -> dict[str, int]:
    """Name -> bytes, as /proc/meminfo has them (`MemTotal`, `MemAvailable`); empty where there is
    none."""
    file = Path("/proc/meminfo")
    rows = (line.split() for line in file.read_text().splitlines()) if file.is_file() else ()
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3}


def container_bytes() -> int | None:
    """What the container that this process runs in may hold; None: as much as the machine."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return int(text) if text.isdigit() else None
