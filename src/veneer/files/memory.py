"""Reads the system's memory sizes, and returns free memory to it."""

import ctypes
import sys
from pathlib import Path


def memory() -> dict[str, int]:
    """Returns name -> bytes as in /proc/meminfo (`MemTotal`, `MemAvailable`); empty if it does not
    exist."""
    file = Path("/proc/meminfo")
    rows = (line.split() for line in file.read_text().splitlines()) if file.is_file() else ()
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3}


def container_bytes() -> int | None:
    """Returns the memory limit of this process's container; None if there is no limit."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return int(text) if text.isdigit() else None


def give_back() -> None:
    """Returns free heap pages to the system, if the C library is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
