"""A regular expression as a metric: for answers that hold the result somewhere in free text.

Without a group, an answer is right if the pattern occurs in it: `regex:^SELECT `. With a group, it
is right if the group's last match is the same in the answer and in a reference:
`regex:####\\s*(-?[\\d.]+)`.
"""

import re
from collections.abc import Sequence

from veneer.errors import ConfigError
from veneer.evaluation.metrics.metric import Metric, mean_of

PREFIX = "regex:"


def regex_metric(name: str) -> Metric:
    """Makes a metric from PREFIX and a pattern. Raises ConfigError."""
    source = name.removeprefix(PREFIX)
    try:
        pattern = re.compile(source)
    except re.error as fault:
        raise ConfigError(f"{source!r} is not a regular expression: {fault}") from None
    if pattern.groups > 1:
        raise ConfigError(
            f"{source!r} has {pattern.groups} groups: it is not clear which one counts",
            next_step="Keep one pair of brackets; write (?:...) for the others.",
        )
    if not pattern.groups:
        return mean_of(name, lambda answer, references: pattern.search(answer) is not None)

    def agrees(answer: str, references: Sequence[str]) -> bool:
        answer_match = _last(pattern, answer)
        return answer_match is not None and any(
            answer_match == _last(pattern, reference) for reference in references
        )

    return mean_of(name, agrees)


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    """Returns the group's last match, without white space around it."""
    value = None
    for match in pattern.finditer(text):
        value = match[1] if match[1] is not None else value
    return None if value is None else value.strip()
