"""What a metric is: a line of counts for each row, and a figure from their sums.

    exact match   [1 or 0, 1]                    sum / sum
    field F1      [matched, expected + given]    2 matched / (expected + given)
    BLEU          lengths and n-gram matches     the corpus formula

So the figure of one row, of all rows and of all rows but one are the same function of different
sums.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from veneer.evaluation.intervals import Counts

Judge = Callable[[str, Sequence[str]], Sequence[float]]
"""(answer, references) -> the counts of one row. There is at least one reference."""


@dataclass(frozen=True)
class Metric:
    """needs     answers: what the model writes; label: the likeliest of given labels
    judge        the counts of a row
    of_totals    the figure from sums of counts
    unit         share (0 to 1, shown in percent) or points (shown as it is)
    refuses      why a row's references cannot be judged; None: they can. Asked before anything is
                 generated
    """

    name: str
    judge: Judge
    of_totals: Callable[[Counts], float]
    unit: Literal["share", "points"] = "share"
    needs: Literal["answers", "label"] = "answers"
    refuses: Callable[[Sequence[str]], str | None] = lambda references: None

    def counts(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Counts:
        """(N, K)."""
        lines = [
            self.judge(answer, right) for answer, right in zip(answers, references, strict=True)
        ]
        return np.asarray(lines, dtype=np.float64)


def ratio(totals: Counts) -> float:
    """Returns the first sum by the second: a mean, where the second counts rows; 0 of nothing."""
    return float(totals[0] / totals[1]) if totals[1] else 0.0


def mean_of(
    name: str,
    judge: Callable[[str, Sequence[str]], float],
    *,
    unit: Literal["share", "points"] = "share",
    needs: Literal["answers", "label"] = "answers",
) -> Metric:
    """Returns a metric that is the mean of a value of each row."""
    return Metric(
        name, lambda answer, references: (float(judge(answer, references)), 1.0), ratio, unit, needs
    )
