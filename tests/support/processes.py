"""States of processes on Linux."""

from pathlib import Path


def is_suspended(pid: int) -> bool:
    """Whether SIGSTOP has stopped the process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
