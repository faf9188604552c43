"""Points with intervals as inline SVG: cost against quality. Drawn like the lines of plots.py."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from veneer.report.plots import BOTTOM, LEFT, RIGHT, TOP, label, not_blown_up, ticks

WIDE = (370, 260)
NARROW = (360, 250)
TOP_LABEL = 12


@dataclass(frozen=True)
class ScatterMark:
    """Places a point at (x, y), with an interval from low to high of y. tip: text under the
    pointer.
    """

    name: str
    x: float
    y: float
    low: float
    high: float
    colour: str
    tip: str


def scatter_chart(marks: Sequence[ScatterMark], *, title: str, x_label: str, y_label: str) -> str:
    """Returns the HTML of a figure: its title and the two drawings. The x axis counts in powers of
    ten where the values need it.

    y values are in the units of the axis: percent as 0 to 100. Empty without marks.
    """
    if not marks:
        return ""
    drawings = "".join(
        _svg(marks, width, height, kind, title=title, x_label=x_label, y_label=y_label)
        for kind, (width, height) in (("wide", WIDE), ("narrow", NARROW))
    )
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawings}</figure>"


def _svg(
    marks: Sequence[ScatterMark],
    width: int,
    height: int,
    kind: str,
    *,
    title: str,
    x_label: str,
    y_label: str,
) -> str:
    positive = [m.x for m in marks if m.x > 0]
    logarithmic = len(positive) == len(marks) and max(positive) > 8 * min(positive)
    xs = [math.log10(m.x) if logarithmic else m.x for m in marks]
    spread = (max(xs) - min(xs)) or abs(max(xs)) or 1.0
    x_low, x_high = min(xs) - 0.12 * spread, max(xs) + 0.12 * spread
    if not logarithmic:
        x_low, x_high = not_blown_up(x_low, x_high)
    if not logarithmic and min(xs) >= 0:
        x_low = max(x_low, 0.0)
    y_low, y_high = not_blown_up(min(m.low for m in marks), max(m.high for m in marks))
    room = (y_high - y_low) * 0.12 or abs(y_high) * 0.1 or 1.0
    y_low, y_high = y_low - room, y_high + room

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (width - LEFT - RIGHT)

    def py(y: float) -> float:
        return TOP + (y_high - y) / (y_high - y_low) * (height - TOP - BOTTOM)

    parts = [
        (
            f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img"'
            f' aria-label="{escape(title)}">'
        ),
        f'<text x="0" y="{TOP_LABEL}">{escape(y_label)}</text>',
        f'<text x="{width - RIGHT}" y="{height - 4}" text-anchor="end">{escape(x_label)}</text>',
    ]
    for y in ticks(y_low, y_high, 4):
        parts.append(
            f'<line class="grid" x1="{LEFT}" y1="{py(y):.1f}" x2="{width - RIGHT}"'
            f' y2="{py(y):.1f}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{label(y)}</text>'
        )
    for place, said in _x_ticks(x_low, x_high, logarithmic):
        parts.append(
            f'<text x="{px(place):.1f}" y="{height - BOTTOM + 18}"'
            f' text-anchor="middle">{said}</text>'
        )
    for m, x in zip(marks, xs, strict=True):
        at = f"{px(x):.1f}"
        parts.append(
            f'<g class="mark {escape(m.colour)}"><title>{escape(m.name)}: {escape(m.tip)}</title>'
        )
        parts.append(f'<line x1="{at}" y1="{py(m.low):.1f}" x2="{at}" y2="{py(m.high):.1f}"/>')
        parts.append(f'<circle class="{escape(m.colour)}" cx="{at}" cy="{py(m.y):.1f}" r="5"/></g>')
    return "".join(parts) + "</svg>"


def _x_ticks(low: float, high: float, logarithmic: bool) -> list[tuple[float, str]]:
    if not logarithmic:
        return [(x, label(x)) for x in ticks(low, high, 4)]
    powers = range(math.ceil(low), math.floor(high) + 1)
    if len(powers) >= 2:
        return [(float(p), short(10.0**p)) for p in powers]
    steps = [
        p + math.log10(m) for p in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)
    ]
    return [(x, short(10**x)) for x in steps if low <= x <= high]


def short(value: float) -> str:
    """Formats a number: 100 k, 5 M, 0.5."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit * 0.999:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"
