"""Answers that are right to the word, and labels that are chosen right."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.evaluation.metric import mean_of


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Equal to a reference but for white space: each run of it counts as one space, and at the ends
    as none."""
    return any(answer.split() == reference.split() for reference in references)


EXACT_MATCH = mean_of("exact_match", exact_match)
ACCURACY = mean_of("accuracy", exact_match, needs="label")
"""Share of rows whose likeliest label (likelihood.py) is the right one."""
