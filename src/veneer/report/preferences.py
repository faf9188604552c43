"""The section of a run's page on preferences: scores of good and bad answers, and the accuracy."""

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.report.plots import Series, line_chart
from veneer.wording import percent

Record = Mapping[str, Any]


def loss_label(start: Record) -> str:
    """Returns the unit of a run's loss, by its start record."""
    objective = start.get("objective", "answers")
    return "nats per trained token" if objective == "answers" else f"{objective} loss"


def preference_section(steps: Sequence[Record], evaluations: Sequence[Record]) -> str:
    """Draws scores of good and bad answers, and the accuracy; empty for other objectives."""
    if not any("preference" in record for record in (*steps, *evaluations)):
        return ""
    scores = line_chart(
        [
            *(
                Series(name, _points(steps, name), f"{colour} pale")
                for name, colour in (("chosen", "a"), ("rejected", "b"))
            ),
            *(
                Series(f"held-out {name}", _points(evaluations, name), colour, marks=True)
                for name, colour in (("chosen", "a"), ("rejected", "b"))
            ),
        ],
        title="Scores",
        x_label="step",
        y_label="log-probability against the reference",
    )
    note = "".join(f"<p>{line}</p>" for line in _lines(evaluations))
    return f"{scores}{note}"


def _points(records: Sequence[Record], name: str) -> list[tuple[float, float]]:
    return [
        (record["step"], record["preference"][name])
        for record in records
        if name in record.get("preference", {})
    ]


def _lines(evaluations: Sequence[Record]) -> list[str]:
    """Returns sentences on the accuracy on held-out rows, with its interval, and on lengths."""
    last = next((r for r in reversed(evaluations) if "preference" in r), None)
    if last is None:
        return []
    figures = last["preference"]
    accuracy = figures["accuracy"]
    low, high = accuracy["low"], accuracy["high"]
    ends = "" if low is None else f", 95% interval {percent(low, 1)} to {percent(high, 1)}"
    lines = [
        f"Held-out answers in the right order at the end: {percent(accuracy['value'], 1)}{ends}."
    ]
    lengths = [
        f"{figures[f'{name}_tokens']:.0f} tokens {name}"
        for name in ("chosen", "rejected")
        if f"{name}_tokens" in figures
    ]
    return [*lines, f"Mean lengths: {', '.join(lengths)}."]
