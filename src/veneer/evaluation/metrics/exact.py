"""Metrics for answers that match exactly, and for labels."""

from collections.abc import Sequence

from veneer.evaluation.metrics.metric import mean_of


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Returns whether the answer equals a reference, except for white space."""
    return any(answer.split() == reference.split() for reference in references)


EXACT_MATCH = mean_of("exact_match", exact_match)
ACCURACY = mean_of("accuracy", exact_match, needs="label")
"""Share of rows whose likeliest label (label_scores.py) is the right one."""
