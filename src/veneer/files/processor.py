"""Reads the description of the first processor."""

from functools import cache
from pathlib import Path


@cache
def processor() -> dict[str, str]:
    """Returns name -> text as in /proc/cpuinfo (`model name`, `flags`); empty if it does not
    exist."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields
