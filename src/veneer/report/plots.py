"""Line charts as inline SVG: axes with units, labels legible on a phone, colours from CSS.

Each chart is drawn for a wide and for a narrow page, and CSS shows the one that fits: scaling one
drawing down would scale its letters, too. Knows nothing of what is plotted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDE = (760, 300)
NARROW = (360, 250)
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 26, 40  # room for the labels of the axes, px
LEAST_SPAN = 0.1  # of an axis, of its larger end
MAX_POINTS = 500  # of a line: more than a screen's columns only makes the file large

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """Describes a line. A point without y (a loss that was not finite) leaves a gap.

    colour   CSS classes of the page: a, b or quiet, and pale beside one of them; comparison/page.py
             has one for each method
    marks    also draw each point, with its value as a tooltip
    group    lines of a group share one entry of the legend, which names the group
    """

    name: str
    points: Sequence[Point]
    colour: str
    marks: bool = False
    group: str = ""


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, small: bool = False
) -> str:
    """Returns HTML of a figure: a legend (or, for one line, the title) and both drawings.

    Returns an empty string if no series has a point.
    """
    series = [line for line in series if any(y is not None for _, y in line.points)]
    if not series:
        return ""
    keys = dict.fromkeys((line.group or line.name, line.colour) for line in series)
    legend = "".join(f'<span class="key {colour}">{escape(name)}</span>' for name, colour in keys)
    wide = (WIDE[0] // 2, 200) if small else WIDE
    narrow = (NARROW[0], 190) if small else NARROW
    drawings = "".join(
        _svg(series, width, height, kind, title=title, x_label=x_label, y_label=y_label)
        for kind, (width, height) in (("wide", wide), ("narrow", narrow))
    )
    caption = f"<figcaption>{legend if len(series) > 1 else escape(title)}</figcaption>"
    return f"<figure>{caption}{drawings}</figure>"


def smooth(values: Sequence[float | None], reach: int, *, every: int = 1) -> list[float | None]:
    """Returns the mean over `reach` values to each side, fewer near the ends: no lag, no bias
    there. every: at every so-many-th value
    """
    smoothed: list[float | None] = []
    for i in range(0, len(values), every):
        near = min(reach, i, len(values) - 1 - i)
        values_near = [y for y in values[i - near : i + near + 1] if y is not None]
        smoothed.append(sum(values_near) / len(values_near) if values_near else None)
    return smoothed


def ticks(low: float, high: float, count: int) -> list[float]:
    """Returns about `count` round numbers (1, 2 or 5 times a power of ten) between low and high."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = min(
        (power * m for m in (1, 2, 5, 10)), key=lambda step: abs((high - low) / step - count)
    )
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """Returns about `most` points: the lowest and highest of each stretch, so that no spike is
    lost.
    """
    if len(points) <= most:
        return list(points)
    chosen: list[Point] = []
    size = math.ceil(2 * len(points) / most)
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        with_value = [(y, x) for x, y in stretch if y is not None]
        if len(with_value) < len(stretch):
            chosen.append(next((x, y) for x, y in stretch if y is None))
        if with_value:
            chosen += [(x, y) for y, x in {min(with_value), max(with_value)}]
    return sorted(chosen, key=lambda point: point[0])


def _svg(
    series: Sequence[Series],
    width: int,
    height: int,
    kind: str,
    *,
    title: str,
    x_label: str,
    y_label: str,
) -> str:
    xs = [x for line_series in series for x, _ in line_series.points]
    ys = [y for line_series in series for _, y in line_series.points if y is not None]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = _range(ys)

    def at(x: float, y: float) -> str:
        px = LEFT + (x - x_low) / (x_high - x_low) * (width - LEFT - RIGHT)
        py = TOP + (y_high - y) / (y_high - y_low) * (height - TOP - BOTTOM)
        return f"{px:.1f},{py:.1f}"

    parts = [
        (
            f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img"'
            f' aria-label="{escape(title)}">'
        ),
        f'<text x="0" y="12">{escape(y_label)}</text>',
        f'<text x="{width - RIGHT}" y="{height - 4}" text-anchor="end">{escape(x_label)}</text>',
    ]
    for y in ticks(y_low, y_high, 4):
        left, py = at(x_low, y).split(",")
        parts.append(f'<line class="grid" x1="{left}" y1="{py}" x2="{width - RIGHT}" y2="{py}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{float(py) + 4:.1f}" text-anchor="end">{label(y)}</text>'
        )
    for x in ticks(x_low, x_high, max(width // 110, 3)):
        px = at(x, y_low).split(",")[0]
        parts.append(
            f'<text x="{px}" y="{height - BOTTOM + 18}" text-anchor="middle">{label(x)}</text>'
        )
    for line_series in series:
        for run in _unbroken(thin(line_series.points)):
            if len(run) > 1:
                line = " ".join(at(*point) for point in run)
                parts.append(f'<polyline class="line {line_series.colour}" points="{line}"/>')
            if line_series.marks or len(run) == 1:
                for x, y in run:
                    px, py = at(x, y).split(",")
                    tip = f"{escape(line_series.name)}, {label(x)}: {y:.4g}"
                    parts.append(
                        f'<circle class="{line_series.colour}" cx="{px}" cy="{py}"'
                        f' r="4"><title>{tip}</title></circle>'
                    )
    return "".join(parts) + "</svg>"


def _range(ys: Sequence[float]) -> tuple[float, float]:
    """Returns a range slightly larger than the values, down to 0 if they come near it."""
    low, high = not_blown_up(min(ys), max(ys))
    if 0 <= low < 0.35 * high:
        low = 0.0
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if low == 0.0 else low - room), high + room


def not_blown_up(low: float, high: float) -> tuple[float, float]:
    """Returns an axis of at least LEAST_SPAN of its larger end, so that noise does not look
    large.
    """
    missing = LEAST_SPAN * max(abs(low), abs(high)) - (high - low)
    if missing <= 0:
        return low, high
    below = missing / 2 if low < 0 else min(missing / 2, low)
    return low - below, high + missing - below


def _unbroken(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def label(value: float) -> str:
    """Formats a number as short as possible: 2.5, 1,200, 2e-4."""
    if value and abs(value) < 1e-2:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.0f}" if value == round(value) else f"{value:.4g}"


def spans(rows: Sequence[tuple[str, float, float, float, str, str]], least: float) -> str:
    """Draws bars from a common zero to either side, with a line over the interval.

    rows: name, value, its two ends, label, class. least: smallest range of the scale.
    """
    if not rows:
        return ""
    low = min(0.0, *(a for _, _, a, _, _, _ in rows))
    high = max(least, *(b for _, _, _, b, _, _ in rows))

    def at(value: float) -> float:
        return 100 * (value - low) / (high - low)

    def between(a: float, b: float) -> str:
        return f"left:{at(min(a, b)):.1f}%;width:{abs(at(a) - at(b)):.1f}%"

    lines = (
        f"<div><dt>{escape(name)}</dt><dd><span class=track><b style=left:{at(0.0):.1f}%></b>"
        f'<i class={colour} style="{between(0.0, value)}"></i><u'
        f' style="{between(a, b)}"></u></span>'
        f"<span>{escape(text)}</span></dd></div>"
        for name, value, a, b, text, colour in rows
    )
    return f'<dl class="bars spans">{"".join(lines)}</dl>'


def bars(rows: Sequence[tuple[str, float, str, str]]) -> str:
    """Draws horizontal bars: name, length, label, class. Negative values have no bar."""
    most = max((value for _, value, _, _ in rows), default=0)
    lines = (
        f"<div><dt>{escape(name)}</dt><dd><i class={colour} "
        f"style=width:{70 * max(value, 0) / most if most > 0 else 0:.1f}%></i>"
        f"{escape(text)}</dd></div>"
        for name, value, text, colour in rows
    )
    return f"<dl class=bars>{''.join(lines)}</dl>" if rows else ""
