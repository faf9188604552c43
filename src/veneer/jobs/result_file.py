"""Results of a job in the form of OpenAI's result file: a CSV with a line for each step."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

from veneer.errors import VeneerError
from veneer.jobs.record import TrainingJob
from veneer.jobs.run_facts import line_start
from veneer.training.output.records import Record, records_after

COLUMNS = ("step", "train_loss", "valid_loss", "learning_rate", "trained_tokens")
RESULT = "step_metrics.csv"
"""The result file in a job's folder; the worker writes it when the job is done."""
MOST_BYTES = 8 * 2**20
FIRST_BYTES = 2**16


def job_records(job: TrainingJob) -> list[Record]:
    """Returns the first record of the run, and the records in the last MOST_BYTES of its file.
    Empty before the first record, and if the file is damaged."""
    file, name = job.records_file, f"the run of {job.id}"
    try:
        start = line_start(file, file.stat().st_size - MOST_BYTES)
        records, start, _ = records_after(file, start, most_bytes=MOST_BYTES, shown=name)
        if start:
            first = records_after(file, 0, most_bytes=FIRST_BYTES, shown=name)[0][:1]
            return [*first, *records]
        return records
    except (OSError, VeneerError):
        return []


def metrics_csv(records: Iterable[Record]) -> str:
    """Returns the losses of every step. valid_loss is empty at steps without an evaluation."""
    rows: dict[int, dict[str, Any]] = {}
    for record in records:
        if record["kind"] == "step":
            columns = {
                "train_loss": record.get("loss"),
                "learning_rate": record.get("learning_rate"),
                "trained_tokens": record.get("trained_tokens"),
            }
        elif record["kind"] == "evaluation":
            columns = {"valid_loss": record.get("loss")}
        else:
            continue
        rows.setdefault(record["step"], {"step": record["step"]}).update(columns)
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[step] for step in sorted(rows))
    return out.getvalue()
