"""Results of a job in the form of OpenAI's result file: a CSV with a line for each step."""

from __future__ import annotations

import csv
import io
from typing import Any

from veneer.errors import VeneerError
from veneer.jobs.record import TrainingJob
from veneer.training.output.records import Record, read_records

COLUMNS = ("step", "train_loss", "valid_loss", "learning_rate", "trained_tokens")


def job_records(job: TrainingJob) -> list[Record]:
    """Returns the run's records; empty before the first, and if the file is damaged."""
    try:
        return read_records(job.records_file)
    except (OSError, VeneerError):
        return []


def metrics_csv(job: TrainingJob) -> str:
    """Returns the losses of every step. valid_loss is empty at steps without an evaluation."""
    rows: dict[int, dict[str, Any]] = {}
    for record in job_records(job):
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
