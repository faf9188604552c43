"""Reads the labels that rows are classified into (evaluation/label_scores.py)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from veneer.errors import ConfigError
from veneer.files.nesting import is_text

MOST_LABELS = 200
"""Most distinct answers that are used as labels if none are given; more look like free text."""
AUTO = "auto"
"""In place of labels: the distinct answers of the rows."""
LONGEST_LABEL = 60
"""Most characters of an answer that is used as a label."""
M = TypeVar("M")


def read_labels(value: str) -> list[str]:
    """Reads labels from a file, one a line, or from text with commas. Raises ConfigError."""
    path = labels_file(value)
    if path is None:
        return checked_labels([label.strip() for label in value.split(",") if label.strip()])
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(
            f"{path} cannot be read: {fault}", [], "Give a UTF-8 text file."
        ) from None
    return checked_labels([line.strip() for line in text.splitlines() if line.strip()])


def with_accuracy(metrics: Sequence[M], labels: str | Sequence[str]) -> list[M | str]:
    """Adds accuracy to the metrics if labels are given, or AUTO."""
    return [*metrics, *(["accuracy"] if labels and "accuracy" not in metrics else [])]


def labels_file(value: str) -> Path | None:
    """Returns the file of this name; None if there is none, as for labels themselves."""
    try:
        return path if (path := Path(value)).is_file() else None
    except (OSError, ValueError):  # labels may be longer than any file name
        return None


def checked_labels(labels: Sequence[str]) -> list[str]:
    """Returns the distinct labels. Raises ConfigError for fewer than two, and for an empty one."""
    distinct = list(dict.fromkeys(labels))
    if invalid := [ascii(label[:40]) for label in distinct if not is_text(label)]:
        raise ConfigError("labels that are not UTF-8", invalid)
    if not all(label.strip() for label in distinct):
        raise ConfigError(
            "a label is empty", next_step="Name what it stands for, for instance 'none of these'."
        )
    if len(distinct) < 2:
        raise ConfigError(
            f"{len(distinct)} labels: there is nothing to choose from",
            next_step="Give --labels A,B,C or a file with one label a line.",
        )
    return distinct


def labels_of(references: Sequence[Sequence[str]]) -> list[str]:
    """Returns the distinct answers of the rows, sorted. Raises ConfigError if they look like free
    text: a choice among the rows' own answers then says little about what the model would write."""
    distinct = sorted({reference for row in references for reference in row})
    longest = max(map(len, distinct), default=0)
    if len(distinct) > 2 and (len(distinct) > MOST_LABELS or 2 * len(distinct) > len(references)):
        fault = "a label has to occur in two rows on average"
    elif longest > LONGEST_LABEL:
        fault = f"the longest has {longest:,} characters, at most {LONGEST_LABEL} are allowed"
    else:
        return checked_labels(distinct)
    raise ConfigError(
        "accuracy chooses among labels, and the rows' own answers look like free text",
        [f"{len(distinct):,} different answers of {len(references):,} rows", fault],
        "Name them: --labels A,B,C or a file; or ask for exact_match, which compares what the"
        " model writes.",
    )
