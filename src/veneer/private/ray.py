"""Private parts of Ray. Tried with Ray 2.59."""

from typing import Any


def silence_workers(ray: Any) -> None:
    """Stops Ray from writing what workers print to stdout, in the middle of JSON."""
    ray._private.worker._worker_logs_enabled = False
