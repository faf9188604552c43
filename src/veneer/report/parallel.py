"""Parallel coordinates as inline SVG: a vertical axis for each setting, a line for each job.

Numbers whose largest is at least 8 times the smallest get a logarithmic axis; texts are spread
evenly. Drawn for a wide and for a narrow page, as the lines of plots.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from veneer.report.plots import label, ticks

WIDE, NARROW = (760, 320), (360, 260)
MARGIN, TOP, BOTTOM = 46, 34, 20
MOST_LABELS = 6
LONGEST_LABEL = 14
LABEL_HEIGHT = 14
LOGARITHMIC = 8.0


@dataclass(frozen=True)
class Line:
    """A job. values: one for each axis, None where it has none. colour: a CSS class."""

    name: str
    values: Sequence[Any]
    colour: str


class _Scale:
    """Places the values of an axis between 0, its lower end, and 1."""

    def __init__(self, values: Sequence[Any]) -> None:
        known = [value for value in values if value is not None]
        self._numbers = all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in known
        )
        self._texts = list(dict.fromkeys(map(str, known)))
        if self._numbers and known:
            low, high = min(known), max(known)
            self._log = low > 0 and high >= LOGARITHMIC * low
            self._low, self._high = self._at(low), self._at(high)
            distinct = sorted(set(known))
            few = len(distinct) <= MOST_LABELS
            self.marks = distinct if few else [low, *self._between(low, high), high]
        else:
            self.marks = self._texts[:MOST_LABELS]

    def _at(self, value: float) -> float:
        return math.log(value) if self._log else value

    def _between(self, low: float, high: float) -> list[float]:
        if self._log:
            return [math.exp((self._low + self._high) / 2)]
        room = 0.08 * (high - low)
        return [tick for tick in ticks(low, high, 4) if low + room < tick < high - room]

    def legible_marks(self, least: float) -> list[Any]:
        """Returns the marks without those that are nearer than `least` to one before them; the ends
        go before the others."""
        chosen: list[Any] = []
        for mark in [*self.marks[:1], *self.marks[:0:-1]]:
            if all(abs(self.place(mark) - self.place(other)) >= least for other in chosen):
                chosen.append(mark)
        return chosen

    def place(self, value: Any) -> float:
        if not self._numbers:
            return (self._texts.index(str(value)) + 0.5) / len(self._texts)
        if self._high == self._low:
            return 0.5
        return (self._at(value) - self._low) / (self._high - self._low)


def parallel_chart(axes: Sequence[str], lines: Sequence[Line], *, title: str) -> str:
    """Returns HTML of a figure; the last lines are drawn on top. Empty with fewer than two axes."""
    if len(axes) < 2 or not lines:
        return ""
    drawings = "".join(
        _svg(axes, lines, width, height, kind, title)
        for kind, (width, height) in (("wide", WIDE), ("narrow", NARROW))
    )
    return f"<figure>{drawings}</figure>"


def _svg(
    axes: Sequence[str], lines: Sequence[Line], width: int, height: int, kind: str, title: str
) -> str:
    scales = [_Scale([line.values[at] for line in lines]) for at in range(len(axes))]
    step = (width - 2 * MARGIN) / (len(axes) - 1)
    parts = [
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img"'
        f' aria-label="{escape(title)}">'
    ]

    def y_of(share: float) -> float:
        return TOP + (1 - share) * (height - TOP - BOTTOM)

    for line in lines:
        points = [
            (MARGIN + at * step, y_of(scale.place(value)))
            for at, (scale, value) in enumerate(zip(scales, line.values, strict=True))
            if value is not None
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline class="line {line.colour}" points="{path}">'
            f"<title>{escape(line.name)}</title></polyline>"
        )
    for at, (name, scale) in enumerate(zip(axes, scales, strict=True)):
        x = MARGIN + at * step
        anchor = "start" if at == 0 else "end" if at == len(axes) - 1 else "middle"
        name_x = 0 if at == 0 else width if at == len(axes) - 1 else x
        parts.append(
            f'<text x="{name_x:.1f}" y="14" text-anchor="{anchor}">{escape(name)}</text>'
            f'<line class="axis" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{height - BOTTOM}"/>'
        )
        for mark in scale.legible_marks(LABEL_HEIGHT / (height - TOP - BOTTOM)):
            text = label(mark) if isinstance(mark, int | float) else str(mark)[:LONGEST_LABEL]
            # Labels are left of the first axis, and right of the others.
            side, label_x = ("end", x - 7) if at == 0 else ("start", x + 7)
            y = y_of(scale.place(mark)) + 4
            parts.append(
                f'<text x="{label_x:.1f}" y="{y:.1f}" text-anchor="{side}">{escape(text)}</text>'
            )
    return "".join(parts) + "</svg>"
