"""A plan as one HTML page: table, bars, and how it was computed. No network, no script; all text
escaped.
"""

from collections.abc import Sequence
from html import escape

from veneer.plan.table import PlanRow
from veneer.report.html import html_page, section, table
from veneer.wording import clock, millions, number, percent, size

COLOURS = (
    "#2456d6",
    "#c2580a",
    "#0f7b5a",
    "#8a3ffc",
    "#b9c3da",
    "#d6a419",
    "#5b6472",
    "#e0749a",
    "#3aa6b9",
    "#7d5a3c",
)
OWN = """
main { max-width: 1000px; }
.stack { display: flex; height: 18px; border-radius: 4px; overflow: hidden;
  background: var(--tint); }
.stack i { display: block; height: 100%; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 10px 0 0; font-size: 14px;
  color: var(--soft); }
.legend span::before { content: ""; display: inline-block; width: 10px; height: 10px;
  border-radius: 2px;
margin-right: 7px;
  background: var(--c); }
.wide td:first-child { width: auto; color: var(--ink); }
.wide td, .wide th { white-space: nowrap; padding-right: 14px; }
.wide td:last-child { white-space: normal; min-width: 180px; }
.scroll { overflow-x: auto; }
.row { margin-top: 22px; } .row p { margin: 0 0 6px; }
"""


def plan_page(
    title: str, rows: Sequence[PlanRow], *, memory_bytes: int | None, notes: Sequence[str]
) -> str:
    """Returns the HTML text. notes: sentences on where the figures come from."""
    labels = list(dict.fromkeys(part for row in rows for part in row.estimate.parts))
    colours = {label: COLOURS[n % len(COLOURS)] for n, label in enumerate(labels)}
    most: dict[str, int] = {}
    for row in rows:  # each base has its own scale, so that a small one stays visible
        most[row.base] = max(most.get(row.base, 0), row.estimate.needed_bytes)
    memory = f"<p>{escape(size(memory_bytes))} of memory</p>" if memory_bytes else ""
    stacks = "".join(_stack(row, most[row.base], colours) for row in rows)
    body = (
        f"<header><h1>{escape(title)}</h1>{memory}</header>"
        + section("What fits", _table(rows))
        + section("What the peak is made of", stacks + _legend(colours))
        + section("Where the figures come from", "".join(f"<p>{escape(n)}</p>" for n in notes))
    )
    return html_page(title, body, OWN)


def verdict(row: PlanRow) -> str:
    """Says that it fits, or what to change and what that costs in time."""
    if row.fits is None:
        return ""
    if row.fits:
        if row.largest_batch is None:
            return "fits"
        rows = f"{row.largest_batch:,} row{'' if row.largest_batch == 1 else 's'}"
        return f"fits, up to {rows} of {row.choice.length:,} tokens at once"
    if row.remedy is None:
        if row.nearest is None:  # not looked for
            return "does not fit"
        if row.nearest.changes:
            return f"does not fit, whatever is changed: {row.nearest}"
        return "does not fit, and nothing can be changed"
    changes = " + ".join(change.says for change in row.remedy.changes)
    return f"no: {changes} ({size(row.remedy.needed_bytes)}, time ×{row.remedy.time_ratio:.2f})"


def spread_lines(row: PlanRow) -> list[str]:
    """Says what each process sends, and how long a step takes by part."""
    many, sent, time = row.choice.processes, row.sent, row.time
    if many == 1:
        return []
    layers = f", {size(sent.layers)} of layers" if sent.layers else ""
    lines = [f"each of {many:,} processes sends {size(sent.gradient)} of gradient{layers} a step"]
    parts = [f"compute {number(time.compute)}", f"wait {number(time.wait)}"]
    if row.efficiency is None:
        return [
            *lines,
            f"computed: a step {number(time.seconds)} s without what they send: {', '.join(parts)}",
        ]
    parts += [
        f"sum {number(time.reduce)}",
        *([f"gather {number(time.gather)}"] if sent.layers else []),
    ]
    time_line = (
        f"computed: a step {number(time.seconds)} s: {', '.join(parts)} · efficiency"
        f" {percent(row.efficiency, 1)}"
    )
    return [*lines, time_line]


def _table(rows: Sequence[PlanRow]) -> str:
    head = ("base", "method", "trained", "file", "memory", "peak in", "tokens/s", "run", "verdict")
    cells = [
        (
            row.base,
            row.choice.label,
            millions(row.run.trainable_parameters),
            size(row.run.file_bytes),
            size(row.estimate.needed_bytes),
            row.estimate.phase,
            number(row.tokens_per_second),
            "–" if row.run_seconds is None else clock(row.run_seconds),
            verdict(row) or "–",
        )
        for row in rows
    ]
    return table(head, cells, "wide")


def _stack(row: PlanRow, most: int, colours: dict[str, str]) -> str:
    parts = "".join(
        f'<i style="width:{100 * size_ / most:.2f}%;background:{colours[label]}"'
        f' title="{escape(label)} {size(size_)}"></i>'
        for label, size_ in row.estimate.parts.items()
    )
    peak = f"{size(row.estimate.peak_bytes)}, in {row.estimate.phase}"
    name = f"{row.base} · {row.choice.label} · {peak}"
    process_lines = "".join(f"<p>{escape(line)}</p>" for line in spread_lines(row))
    return (
        f"<div class=row><p>{escape(name)}</p><div class=stack>{parts}</div>{process_lines}</div>"
    )


def _legend(colours: dict[str, str]) -> str:
    keys = "".join(
        f'<span style="--c:{colour}">{escape(label)}</span>' for label, colour in colours.items()
    )
    return f"<div class=legend>{keys}</div>"
