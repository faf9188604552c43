"""What the system tells of the first processor."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def processor() -> dict[str, str]:
    """Name -> text, as /proc/cpuinfo has them (`model name`, `flags`); empty where there is
    none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    found: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found
