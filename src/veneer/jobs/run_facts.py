"""Reads what a run is and how far it has come from the ends of its metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.errors import VeneerError
from veneer.files.system_errors import explained
from veneer.training.output.records import Record, records_after

RECORDS = "metrics.jsonl"
END_BYTES = 2**15
"""Bytes that are read at the beginning and at the end of a file."""
MOST_END_BYTES = 2**21


def run_facts(folder: Path) -> dict[str, Any]:
    """Returns name, base, method, steps, step, loss, seconds_left, reason and error of the run in a
    folder. seconds_left: estimated at its last record, None before its first step."""
    file = folder / RECORDS
    about: dict[str, Any] = {"name": folder.name}
    try:
        with explained(folder.name, reading=True):
            now = file.stat()
            about |= {
                "bytes": now.st_size,
                "idle_seconds": round(max(time.time() - now.st_mtime, 0), 3),
            }
            ends = [*_first(file, folder.name), *_last(file, folder.name)]
    except VeneerError as fault:
        return {**about, "error": str(fault)}
    start: Record = next((r for r in ends if r["kind"] == "start"), {})
    steps = [record for record in ends if record["kind"] == "step"]
    end = ends[-1] if ends and ends[-1]["kind"] == "end" else {}
    return {
        **about,
        "base": _public(start.get("base")),
        "method": start.get("method"),
        "steps": start.get("steps"),
        "step": steps[-1]["step"] if steps else 0,
        "loss": steps[-1].get("loss") if steps else None,
        "seconds_left": _seconds_left(start.get("steps"), ends),
        "reason": end.get("reason"),
        "error": None,
    }


def _seconds_left(total: Any, records: Sequence[Record]) -> float | None:
    """Estimates the seconds to the end of `total` steps from the speed in these records."""
    steps = [record["step"] for record in records if record["kind"] == "step"]
    if not steps or type(total) is not int:
        return None
    times = [r.get("seconds") for r in records if r["kind"] in ("step", "evaluation")]
    seconds = sum(time for time in times if isinstance(time, float))
    return round(seconds / len(steps) * max(total - steps[-1], 0), 3)


def _first(file: Path, name: str) -> list[Record]:
    return records_after(file, 0, most_bytes=END_BYTES, shown=f"{name}/{RECORDS}")[0][:1]


def _last(file: Path, name: str) -> list[Record]:
    """Returns the last records, enough to have a step among them. An evaluation's line is long."""
    records: list[Record] = []
    size, back = file.stat().st_size, END_BYTES
    while not any(record["kind"] == "step" for record in records) and back <= MOST_END_BYTES:
        start = line_start(file, size - back)
        records = records_after(file, start, most_bytes=2 * back, shown=f"{name}/{RECORDS}")[0]
        if start == 0:
            break
        back *= 4
    return records


def line_start(file: Path, byte: int) -> int:
    """Returns the byte at which the first whole line behind `byte` begins; 0 at or before the
    file's beginning."""
    if byte <= 0:
        return 0
    with file.open("rb") as stream:
        stream.seek(byte)
        return byte + len(stream.readline())


def _public(base: Any) -> str | None:
    """Returns a base's name; of a path the last part."""
    if not isinstance(base, str):
        return None
    return Path(base).name if base.startswith(("/", "~", ".")) else base
