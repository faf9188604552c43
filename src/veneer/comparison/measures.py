"""Measures the runs of a comparison on the test rows, from the predictions of its evaluations.

answers   each metric, then the loss in nats per trained token
pairs     accuracy and likelier (evaluation/preferences.py), relative to the base alone; and the
          loss of the objective, with the base as its reference, if all candidates share it
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from veneer.comparison.plan import Comparison
from veneer.evaluation.intervals import Counts, OfTotals
from veneer.evaluation.metrics.metric import ratio
from veneer.evaluation.predictions import Line, counts_of, loss_counts
from veneer.evaluation.preferences import objective_counts, preference_counts
from veneer.objectives.registry import make_objective


class Measure(NamedTuple):
    """Computes a figure from sums of counts.

    share: it is between 0 and 1. prompts: a number for each line, equal for rows with the same
    prompt.
    """

    of_totals: OfTotals
    share: bool
    prompts: Sequence[int]


@dataclass(frozen=True)
class TestMeasures:
    """Holds measures by name, the deciding one first.

    units   of each: share, points or nats
    counts  lines of an evaluation -> counts (N, K) of each
    """

    measures: dict[str, Measure]
    units: dict[str, str]
    counts: Callable[[Sequence[Line]], dict[str, Counts]]

    @property
    def primary(self) -> str:
        return next(iter(self.measures))


def test_measures(
    comparison: Comparison, base_lines: Sequence[Line], prompts: Sequence[int]
) -> TestMeasures:
    """Returns what is measured on these rows. base_lines: the base's. prompts: of each line"""
    if comparison.row_kind == "pairs":
        return _of_pairs(comparison, base_lines, prompts)
    metrics = comparison.found

    def counts(lines: Sequence[Line]) -> dict[str, Counts]:
        of_metrics = {metric.name: counts_of(lines, metric) for metric in metrics}
        return {**of_metrics, "loss": loss_counts(lines)}

    measures = {
        metric.name: Measure(metric.of_totals, metric.unit == "share", prompts)
        for metric in metrics
    }
    measures["loss"] = Measure(ratio, share=False, prompts=prompts)
    units: dict[str, str] = {metric.name: metric.unit for metric in metrics}
    return TestMeasures(measures, {**units, "loss": "nats"}, counts)


def _of_pairs(
    comparison: Comparison, base_lines: Sequence[Line], prompts: Sequence[int]
) -> TestMeasures:
    shared = comparison.shared_objective
    objective = None if shared is None else make_objective(shared)

    def counts(lines: Sequence[Line]) -> dict[str, Counts]:
        shares = preference_counts(lines, base_lines)
        if objective is None:
            return shares
        return {**shares, "loss": objective_counts(lines, base_lines, objective)}

    units = dict.fromkeys(comparison.candidates[0].config.objective.measures, "share")
    if objective is not None:
        units["loss"] = "nats"
    measures = {name: Measure(ratio, unit == "share", prompts) for name, unit in units.items()}
    return TestMeasures(measures, units, counts)
