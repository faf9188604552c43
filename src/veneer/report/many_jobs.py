"""Results of several jobs side by side: settings, held-out curves, and losses after equal tokens.

With the same number of steps a larger batch sees more rows. So jobs are also compared after the
tokens that the shortest complete job has seen.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.errors import VeneerError
from veneer.training.config import RunConfig
from veneer.training.output.loggers import flat
from veneer.training.output.records import read_records
from veneer.wording import number, shown

MOST_SETTINGS = 5
"""Most settings that are shown."""
ALIKE = 0.02
"""Numbers of tokens that differ by less than this share count as equal."""
_READ_BY = (
    *("objective.", "template.", "new_tokens"),
    *("data.format", "data.map", "data.train_on"),
)
"""Beginnings of the settings by which rows become tokens, and tokens a loss."""


@dataclass(frozen=True)
class CurvePoint:
    """A held-out loss after so many steps and tokens."""

    step: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class JobRecord:
    """One job of several.

    settings  by dotted name, without its folder
    tokens    of all steps
    reason    why it ended; `failed` if an error ended it
    loss      the lowest held-out loss; low, high: its 95% interval
    """

    folder: Path
    settings: Mapping[str, Any]
    reason: str
    steps: int | None = None
    tokens: int = 0
    last_loss: float | None = None
    loss: float | None = None
    low: float | None = None
    high: float | None = None
    curve: Sequence[CurvePoint] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return self.reason in ("done", "early_stop")

    def loss_after(self, tokens: int) -> float | None:
        """Returns the held-out loss after so many tokens, between two evaluations linearly; None if
        the job saw fewer."""
        for before, after in zip(self.curve, self.curve[1:], strict=False):
            if before.tokens <= tokens <= after.tokens:
                share = (tokens - before.tokens) / max(after.tokens - before.tokens, 1)
                return before.loss + share * (after.loss - before.loss)
        return None


def read_job(config: RunConfig, result: Mapping[str, Any] | VeneerError) -> JobRecord:
    """Reads the records of a job that has ended. result: its summary, or its error."""
    folder = Path(config.out)
    settings = flat(config.model_dump(mode="json", exclude={"out"}))
    curve, tokens = _curve(folder / "metrics.jsonl")
    if isinstance(result, VeneerError):
        return JobRecord(folder, settings, "failed", tokens=tokens, curve=curve)
    figures = (result.get("held_out") or {}).get("loss") or {}
    return JobRecord(
        folder,
        settings,
        result["reason"],
        result["steps"],
        tokens,
        result["last_loss"],
        result["validation_loss"],
        figures.get("low"),
        figures.get("high"),
        curve,
    )


def _curve(file: Path) -> tuple[list[CurvePoint], int]:
    """Returns the finite held-out losses of a run, and its tokens."""
    curve, tokens = list[CurvePoint](), 0
    for record in read_records(file) if file.is_file() else ():
        if record["kind"] == "step":
            tokens += record["tokens"]
        elif record["kind"] == "evaluation":
            loss = record["loss"]
            if loss is not None and math.isfinite(loss):
                curve.append(CurvePoint(record["step"], tokens, loss))
    return curve, tokens


def have_same_held_out(jobs: Sequence[JobRecord]) -> bool:
    """Returns whether the settings say that all jobs are measured on the same tokens of the same
    held-out rows, by the loss of the same objective."""
    return len({_measured_by(job.settings) for job in jobs}) == 1


def _measured_by(settings: Mapping[str, Any]) -> str:
    """Returns the settings that a held-out loss depends on, besides what was trained."""
    rows = settings.get("data.validation")
    if rows is None:
        rows = settings.get("data.train"), settings.get("data.validation_share")
    filled_in = {"objective.labels", "objective.content"}  # once a run has begun
    names = {name for name in settings if name.startswith(_READ_BY)} - filled_in
    if settings.get("data.long_rows") != "refuse":
        names |= {"data.long_rows", "length"}
    return repr((rows, [(name, settings.get(name)) for name in sorted(names)]))


def ranked(jobs: Sequence[JobRecord]) -> list[JobRecord]:
    """Sorts jobs by held-out loss, then jobs without one by training loss, then failed jobs.

    Losses over different rows or of different objectives do not compare; such jobs keep their
    order, with failed ones last.
    """
    compare = have_same_held_out(jobs)

    def place(job: JobRecord) -> tuple[bool, bool, float]:
        loss = job.last_loss if job.loss is None else job.loss
        has_failed = job.reason == "failed"
        if not compare:
            return has_failed, False, 0.0
        return has_failed, job.loss is None, math.inf if loss is None else loss

    return sorted(jobs, key=place)


def different_settings(jobs: Sequence[JobRecord]) -> list[str]:
    """Returns the names of settings that differ, MOST_SETTINGS at most."""
    names = dict.fromkeys(name for job in jobs for name in job.settings)
    different = [name for name in names if len({repr(job.settings.get(name)) for job in jobs}) > 1]
    return different[:MOST_SETTINGS]


def equal_tokens(jobs: Sequence[JobRecord]) -> int | None:
    """Returns the tokens of the shortest complete job; None if all saw about as many, or if their
    held-out rows differ."""
    tokens = [job.tokens for job in jobs if job.is_complete]
    if (
        not tokens
        or not have_same_held_out(jobs)
        or max(tokens) - min(tokens) <= ALIKE * max(tokens)
    ):
        return None
    return min(tokens)


def short_title(name: str, names: Sequence[str]) -> str:
    """Returns the last part of a dotted name if no other name ends with it: rank for
    method.rank."""
    last = name.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in names) == 1 else name


def setting_text(value: Any) -> str:
    return "" if value is None else shown(f"{value:g}" if isinstance(value, float) else value)


def steps_text(job: JobRecord) -> str:
    notes = {"early_stop": " (early)", "halving": " (halved)", "time": " (time)"}
    return "" if job.steps is None else f"{job.steps:,}{notes.get(job.reason, '')}"


def interval_text(job: JobRecord) -> str:
    if job.low is None or job.high is None:
        return ""
    return f"{number(job.low)} to {number(job.high)}"
