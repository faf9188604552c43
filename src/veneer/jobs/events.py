"""Events of a job, one JSON object a line in events.jsonl: created, started, paused, failed.

Written by the process that holds the job's lock. Losses and rates are in the run's own records.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from veneer.errors import VeneerError
from veneer.files.strict_json import json_text
from veneer.files.system_errors import explained
from veneer.training.output.records import read_records

EVENTS = "events.jsonl"
MOST_MESSAGE = 2000
Level = Literal["info", "warn", "error"]


def add_event(folder: Path, message: str, level: Level = "info") -> None:
    """Appends an event to the job in `folder`."""
    event = {
        "kind": "event",
        "time": time.time(),
        "level": level,
        "message": message[:MOST_MESSAGE],
    }
    path = folder / EVENTS
    with explained(path), path.open("a", encoding="utf-8") as file:
        file.write(json_text(event, indent=None, sort_keys=False))


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Returns the events, oldest first: time (seconds since 1970), level and message. Empty if the
    file is missing or damaged."""
    try:
        return [
            {name: event.get(name) for name in ("time", "level", "message")}
            for event in read_records(folder / EVENTS)
        ]
    except (OSError, VeneerError):
        return []
