"""Shows a run in a notebook: figures and the curve of its loss, redrawn while it runs.

It is a Screen of training/output/screen.py: HTML that the notebook keeps, everything escaped, with
neither script nor widget.
"""

import sys
import time
from collections.abc import Callable
from html import escape
from typing import Any

from veneer.report.plots import Point, Series, line_chart
from veneer.training.output.screen import (
    Facts,
    Screen,
    StepFigures,
    end_lines,
    make_screen,
    sample_parts,
    start_lines,
)
from veneer.wording import between, html_table, number, shown

DRAWN_SECONDS = 0.5
"""Time between drawings: each goes through the notebook's connection."""
_STYLE = (
    "<style>.veneer svg{display:block;width:100%;max-width:760px}.veneer"
    " svg.narrow{display:none}.veneer svg text{font-size:12px;fill:#808590}.veneer"
    " .grid{stroke:#8884}.veneer .line{fill:none;stroke-width:2}.veneer"
    " .line.a{stroke:#4f7ae8}.veneer .line.b{stroke:#d0701f}.veneer circle.b{fill:#d0701f}.veneer"
    " .key{margin-right:16px}.veneer .key.a{color:#4f7ae8}.veneer .key.b{color:#d0701f}.veneer"
    " pre{white-space:pre-wrap;margin:4px 0}</style>"
)


class NotebookScreen(Screen):
    """Draws a run. show: replaces the HTML of this run's picture."""

    def __init__(
        self, show: Callable[[str], None], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._show, self._now = show, now
        self._lines: list[str] = []
        self._progress: StepFigures | None = None
        self._losses: list[Point] = []
        self._held_out: list[Point] = []
        self._sample: list[tuple[str, str]] = []
        self._drawn = float("-inf")

    def start(self, info: Facts) -> None:
        self._progress = StepFigures(info)
        self._lines = start_lines(info)
        self._draw()

    def step(self, record: Facts) -> None:
        assert self._progress is not None, "start comes first"
        self._progress.step(record)
        self._losses.append((record["step"], record["loss"]))
        if self._now() - self._drawn >= DRAWN_SECONDS:
            self._draw()

    def evaluation(self, record: Facts) -> None:
        assert self._progress is not None, "start comes first"
        self._progress.evaluation = record["loss"]
        self._held_out.append((record["step"], record["loss"]))
        if sample := record.get("sample"):
            self._sample = sample_parts(sample)
        self._draw()

    def message(self, text: str) -> None:
        self._lines.append("  " + shown(text))
        self._draw()

    def end(self, summary: Facts) -> None:
        self._lines += end_lines(summary)
        self._draw()

    def _draw(self) -> None:
        self._drawn = self._now()
        parts = [_STYLE, f"<pre>{escape(chr(10).join(self._lines))}</pre>"]
        if self._progress is not None:
            done, total = self._progress.done, self._progress.total
            parts.append(
                f"<progress max={total} value={done}></progress> step {done:,} of {total:,}"
            )
            if self._losses:
                parts.append(f" · {escape(self._progress.figures())}")
        parts.append(
            line_chart(
                [
                    Series("training", self._losses, "a"),
                    Series("held-out", self._held_out, "b", marks=True),
                ],
                title="Loss",
                x_label="step",
                y_label="nats per trained token",
            )
        )
        rows = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>"
            for name, text in self._sample
        )
        parts.append(f"<table>{rows}</table>" if rows else "")
        self._show(f"<div class=veneer>{''.join(parts)}</div>")


def screen_here(*, quiet: bool) -> Screen:
    """Returns a NotebookScreen in a notebook, else the screen of make_screen."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if quiet or not hasattr(shell, "kernel"):
        return make_screen(quiet=quiet)
    from IPython.display import HTML, display

    handle: Any = display(HTML(""), display_id=True)
    return NotebookScreen(lambda html: handle.update(HTML(html)))


class Evaluation(dict[str, Any]):
    """Holds an evaluation as a dict; a notebook shows its figures as a table."""

    def _repr_html_(self) -> str:
        intervals, rows = self.get("intervals", {}), []
        for name, value in self.items():
            if isinstance(value, int | float):
                low, high = intervals.get(name, (None, None))
                interval = "" if low is None else between(low, high)
                rows.append(
                    (name, f"{value:,}" if isinstance(value, int) else number(value), interval)
                )
        return html_table("", rows, head=("figure", "value", "95% interval"))
