"""All metrics by name, and how a user's name becomes a metric."""

from collections.abc import Sequence
from difflib import get_close_matches

from veneer.errors import ConfigError
from veneer.evaluation.metrics.exact import ACCURACY, EXACT_MATCH
from veneer.evaluation.metrics.json_fields import FIELD_F1, JSON_VALIDITY
from veneer.evaluation.metrics.metric import Metric
from veneer.evaluation.metrics.overlap import BLEU, CHRF
from veneer.evaluation.metrics.pattern import PREFIX, regex_metric
from veneer.evaluation.metrics.rouge import ROUGE
from veneer.evaluation.metrics.user_function import UserFunction, user_metric

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (EXACT_MATCH, JSON_VALIDITY, FIELD_F1, ACCURACY, BLEU, CHRF, *ROUGE)
}


def find_metrics(requested: Sequence[str | UserFunction]) -> list[Metric]:
    """Returns a metric for each name, `regex:PATTERN` or function. ConfigError lists unknown
    names.
    """
    unknown = [
        name
        for name in requested
        if isinstance(name, str) and name not in METRICS and not name.startswith(PREFIX)
    ]
    if unknown:
        suggestions = [
            f"{name}: did you mean {matches[0]}?"
            for name in unknown
            if (matches := get_close_matches(name, METRICS, 1))
        ]
        raise ConfigError(
            f"unknown metrics: {', '.join(unknown)}",
            suggestions,
            f"There are: {', '.join(METRICS)}, {PREFIX}PATTERN and FILE.py:FUNCTION.",
        )
    metrics = [_metric(item) for item in dict.fromkeys(requested)]
    names = [item.name for item in metrics]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        step = "Give each function a name of its own: what comes back is by name."
        raise ConfigError(
            f"several metrics are called {', '.join(map(repr, duplicates))}", next_step=step
        )
    return metrics


def _metric(requested: str | UserFunction) -> Metric:
    if not isinstance(requested, str):
        return user_metric(getattr(requested, "__name__", "function"), requested)
    return METRICS[requested] if requested in METRICS else regex_metric(requested)
