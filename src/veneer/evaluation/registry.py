"""Every metric by its name, and how a name that a user gives becomes a metric."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from veneer.errors import ConfigError
from veneer.evaluation.exact import ACCURACY, EXACT_MATCH
from veneer.evaluation.json_fields import FIELD_F1, JSON_VALIDITY
from veneer.evaluation.metric import Metric
from veneer.evaluation.overlap import BLEU, CHRF
from veneer.evaluation.pattern import PREFIX, regex_metric
from veneer.evaluation.rouge import ROUGE
from veneer.evaluation.user_function import UserFunction, user_metric

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (EXACT_MATCH, JSON_VALIDITY, FIELD_F1, ACCURACY, BLEU, CHRF, *ROUGE)
}


def find_metrics(asked: Sequence[str | UserFunction]) -> list[Metric]:
    """A metric for each name, `regex:PATTERN` or function. Raises ConfigError with every unknown
    name."""
    unknown = [
        name
        for name in asked
        if isinstance(name, str) and name not in METRICS and not name.startswith(PREFIX)
    ]
    if unknown:
        near = [
            f"{name}: did you mean {n[0]}?"
            for name in unknown
            if (n := get_close_matches(name, METRICS, 1))
        ]
        raise ConfigError(
            f"unknown metrics: {', '.join(unknown)}",
            near,
            f"There are: {', '.join(METRICS)}, {PREFIX}PATTERN and FILE.py:FUNCTION.",
        )
    metrics = [_metric(each) for each in dict.fromkeys(asked)]
    names = [each.name for each in metrics]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        step = "Give each function a name of its own: what comes back is by name."
        raise ConfigError(
            f"several metrics are called {', '.join(map(repr, twice))}", next_step=step
        )
    return metrics


def _metric(asked: str | UserFunction) -> Metric:
    if not isinstance(asked, str):
        return user_metric(getattr(asked, "__name__", "function"), asked)
    return METRICS[asked] if asked in METRICS else regex_metric(asked)
