"""Screens of a run: live on a terminal, plain lines, or quiet. None of them computes.

They receive what metrics.jsonl receives (records.py): the start record (with `paths`, lines that
say how steps are computed), every step, every evaluation, and the summary. Text from a model or
from data is shown as plain text, without markup or control characters.
"""

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from veneer.training.config import MOMENT_BYTES
from veneer.training.output.console import log_console
from veneer.wording import (
    SHARES,
    clock,
    cut,
    folded,
    interval_of_95,
    millions,
    number,
    percent,
    shares,
    shown,
    size,
    wrapped,
)

Facts = Mapping[str, Any]

VALUE_BYTES = 8  # of a trained value and its gradient, float32 each
QUESTION_CHARACTERS, ANSWER_CHARACTERS = (150, 400)  # of a sample
PLAIN_SECONDS = 5.0  # time between plain lines


class Screen:
    """Shows a run; every method returns at once. A subclass shows what it overrides."""

    def start(self, info: Facts) -> None:
        """Shows the start record, with `paths`, lines that say how steps are computed."""

    def step(self, record: Facts) -> None: ...

    def evaluation(self, record: Facts) -> None: ...

    def message(self, text: str) -> None: ...

    def end(self, summary: Facts) -> None:
        """Shows the summary, the content of summary.json."""

    def failure(self, text: str) -> None:
        """Shows the headline of the error that ended a job, while others train on."""
        self.message(text)

    def close(self) -> None:
        """Restores the terminal."""


class QuietScreen(Screen):
    """Shows nothing."""

    def failure(self, text: str) -> None: ...


class StepFigures:
    """Computes the figures that every screen shows from the records so far."""

    def __init__(self, info: Facts) -> None:
        self.total = int(info["steps"])
        self.first: int | None = None
        self.done = 0
        self.loss: float | None = None  # mean of the last ten steps
        self.falling: bool | None = None
        self.evaluation: float | None = None
        self.memory_bytes = 0
        self.preference = ""
        self._losses: deque[float] = deque(maxlen=10)
        self._recent: deque[tuple[int, float]] = deque(maxlen=50)  # (tokens, seconds) of a step

    def step(self, record: Facts) -> None:
        self.done = int(record["step"])
        if self.first is None:
            self.first = self.done
        else:
            # The first step allocates: its speed says nothing about the others.
            self._recent.append((int(record["tokens"]), float(record["seconds"])))
        self.memory_bytes = int(record["memory_bytes"])
        previous_loss = self.loss
        self._losses.append(float(record["loss"]))
        self.preference = figure_words(record)
        self.loss = sum(self._losses) / len(self._losses)
        self.falling = None if previous_loss is None else self.loss < previous_loss

    @property
    def tokens_per_second(self) -> float | None:
        seconds = sum(seconds for _, seconds in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        if not self._recent:
            return None
        mean = sum(seconds for _, seconds in self._recent) / len(self._recent)
        return mean * (self.total - self.done)

    def losses(self) -> str:
        """Returns: loss 1.12▼ · eval 1.20"""
        arrow = "" if self.falling is None else "▼" if self.falling else "▲"
        evaluation = "" if self.evaluation is None else f" · eval {number(self.evaluation)}"
        return f"loss {number(self.loss)}{arrow}{evaluation}"

    def figures(self) -> str:
        """Returns: loss 1.12▼ · eval 1.20 · 410 tokens/s · 1.3 GB · 6:10 left"""
        parts = [self.losses()]
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.memory_bytes:
            parts.append(size(self.memory_bytes))
        if self.seconds_left is not None:
            parts.append(f"{clock(self.seconds_left)} left")
        return " · ".join(parts) + self.preference


class PlainScreen(Screen):
    """Prints lines of text, for files, pipes and terminals that cannot redraw."""

    _progress: StepFigures

    def __init__(self, console: Console) -> None:
        self.console = console
        self._last_line = 0.0

    def start(self, info: Facts) -> None:
        self._progress = StepFigures(info)
        for line in start_lines(info):
            self._print(line)

    def step(self, record: Facts) -> None:
        self._progress.step(record)
        now = time.monotonic()
        at_an_end = (
            self._progress.first == self._progress.done
            or self._progress.done == self._progress.total
        )
        if at_an_end or now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            self._print(self._step_line(self._progress))

    def evaluation(self, record: Facts) -> None:
        self._print(evaluation_line(record, self._progress.evaluation))
        self._progress.evaluation = record["loss"]
        if sample := record.get("sample"):
            for name, text in sample_parts(sample):
                self._print(f"  {name:<9} {text}")

    def message(self, text: str) -> None:
        self._print("  " + shown(text))

    def end(self, summary: Facts) -> None:
        for line in end_lines(summary):
            self._print(line)

    def _step_line(self, progress: StepFigures) -> str:
        return f"  step {progress.done}/{progress.total} · {progress.figures()}"

    def _print(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)


class LiveScreen(Screen):
    """Redraws one region with bar and figures, and prints other lines above it."""

    _progress: StepFigures

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None

    def start(self, info: Facts) -> None:
        self._progress = StepFigures(info)
        for line in start_lines(info):
            for part in folded(line, self.console.width).split("\n"):
                self.console.print(Text(wrapped(part, self.console.width)))
        self._live = Live(
            console=self.console, refresh_per_second=4, transient=True, redirect_stdout=False
        )
        self._live.start()

    def step(self, record: Facts) -> None:
        assert self._live is not None, "start comes first"
        self._progress.step(record)
        self._live.update(self._region(self._progress))

    def evaluation(self, record: Facts) -> None:
        self.console.print(Text(evaluation_line(record, self._progress.evaluation)))
        self._progress.evaluation = record["loss"]
        if sample := record.get("sample"):
            self.console.print(sample_table(sample, self.console.width))

    def message(self, text: str) -> None:
        self.console.print(Text("  " + shown(text), style="dim"))

    def end(self, summary: Facts) -> None:
        self.close()
        for line in end_lines(summary):
            self.console.print(Text(folded(line, self.console.width)))

    def close(self) -> None:
        """Restores the terminal, also after an error."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _region(self, progress: StepFigures) -> RenderableType:
        count = f"step {progress.done}/{progress.total} "
        figures = progress.figures()
        one_line = self.console.width >= len(count) + len(figures) + 24
        width = 20 if one_line else max(self.console.width - len(count) - 4, 8)
        bar = Table.grid(padding=(0, 1))
        cells: list[RenderableType] = [
            Text("  " + count.strip()),
            ProgressBar(progress.total, progress.done, width),
        ]
        if one_line:
            bar.add_row(*cells, Text(figures))
            return bar
        bar.add_row(*cells)
        return Group(bar, Text(folded("  " + figures, self.console.width)))


def make_screen(*, json: bool = False, quiet: bool = False) -> Screen:
    """Returns the screen that fits: live on a terminal, else plain lines; on stderr if stdout is
    data.
    """
    if quiet:
        return QuietScreen()
    console = log_console(stderr=json)
    return (
        LiveScreen(console)
        if console.is_terminal and not console.is_dumb_terminal
        else PlainScreen(console)
    )


def start_lines(info: Facts) -> list[str]:
    """Returns the lines printed before step 1: what is trained, and by which paths."""
    trainable, total = int(info["trainable_parameters"]), int(info["total_parameters"])
    trained_text = (
        "every weight trains" if trainable == total else "every weight that text reaches trains"
    )
    if info["modules_total"] is not None:
        trained_text = f"{info['modules_adapted']} of {info['modules_total']} modules adapted"
    facts = [trained_text, f"{millions(trainable)} trainable ({percent(trainable, total)})"]
    if info["adapter_bytes"] is not None:
        facts.append(f"{size(info['adapter_bytes'])} on disk")
    per_value = VALUE_BYTES + MOMENT_BYTES[info["optimizer"]]
    facts.append(f"{size(round(trainable * per_value))} in memory")
    lines = [
        f"{shown(info['base'])} · {shown(info['method'])} · {info['steps']:,} steps · "
        f"{info['train_rows']:,} rows to train on · {info['validation_rows']:,} held out",
        "  " + " · ".join(facts),
    ]
    if info["paths"]:
        lines.append("  " + " · ".join(map(shown, info["paths"])))
    return lines


def evaluation_line(record: Facts, previous_loss: float | None) -> str:
    loss = record["loss"]
    arrow = (
        ""
        if previous_loss is None or loss is None or loss == previous_loss
        else "▼"
        if loss < previous_loss
        else "▲"
    )
    best = " · best so far" if record.get("best") else ""
    sets = "".join(
        f" · {shown(name)} {number(value)}" for name, value in record.get("sets", {}).items()
    )
    preference = figure_words(record)
    return f"  step {record['step']} · held-out loss {number(loss)}{arrow}{best}{sets}{preference}"


def figure_words(record: Facts) -> str:
    """Returns: · accuracy 71% (64% to 77%) · margin 0.42 (chosen 0.11, rejected -0.31)"""
    figures = record.get("preference") or record.get("labels")
    if not figures:
        return ""
    words = "".join(
        f" · {name} {_share_words(figures[key])}" for key, name in SHARES.items() if key in figures
    )
    scores = [f"{k} {number(figures[k])}" for k in ("chosen", "rejected") if k in figures]
    if "mean_error" in figures:
        words += f" · mean error {number(figures['mean_error'])}"
    if "margin" in figures:
        return f"{words} · margin {number(figures['margin'])} ({', '.join(scores)})"
    return f"{words} · {', '.join(scores)}" if scores else words


def _share_words(figure: float | Facts) -> str:
    if not isinstance(figure, Mapping):
        return percent(figure, 1)
    low, high = figure["low"], figure["high"]
    ends = "" if low is None else f" ({percent(low, 1)} to {percent(high, 1)})"
    return f"{percent(figure['value'], 1)}{ends}"


def sample_parts(sample: Facts) -> list[tuple[str, str]]:
    """Returns (name, one line of text) of a sample: question, expected answer, answer."""
    limits = {
        "prompt": QUESTION_CHARACTERS,
        "expected": ANSWER_CHARACTERS,
        "answer": ANSWER_CHARACTERS,
    }
    lines = [cut(" ".join(shown(sample[key]).split()), limit) for key, limit in limits.items()]
    return list(zip(("asked", "expected", "answer"), lines, strict=True))


def sample_table(sample: Facts, width: int) -> RenderableType:
    """Shows the answer next to the expected one, or below it on a narrow terminal."""
    (_, question), (_, expected), (_, answer) = sample_parts(sample)
    if width < 60:
        rows = [
            Text(f"  asked     {question}", style="dim"),
            Text(f"  expected  {expected}"),
            Text(f"  answer    {answer}"),
        ]
        return Group(*rows)
    table = Table(
        box=None, padding=(0, 2), width=min(width, 120), show_edge=False, header_style="dim"
    )
    table.add_column("expected", ratio=1, overflow="fold")
    table.add_column("answer", ratio=1, overflow="fold")
    table.add_row(Text(expected), Text(answer))
    return Group(Text(f"  {question}", style="dim"), table)


def _held_out(summary: Facts) -> str:
    """Returns the held-out loss before and after, with its interval if known."""
    loss, figures = number(summary["validation_loss"]), summary.get("held_out")
    if not figures:
        return loss
    before_text = f"{number(figures['before']['value'])} → " if figures["before"] else ""
    return (
        f"{before_text}{loss} ({interval_of_95(figures['loss']['low'], figures['loss']['high'])})"
    )


def loss_text(summary: Facts) -> str:
    """Returns: loss 2.18 → 1.07; one figure alone if both are the same."""
    ends = dict.fromkeys(number(summary[name]) for name in ("first_loss", "last_loss"))
    return f"loss {' → '.join(ends)}"


def end_lines(summary: Facts) -> list[str]:
    """Returns the main figures, and where the result is."""
    figures = [loss_text(summary)]
    if summary["validation_loss"] is not None:
        figures.append(f"held-out loss {_held_out(summary)}")
    if summary["tokens_per_second"]:
        figures.append(f"{summary['tokens_per_second']:,.0f} tokens/s")
    planned = summary.get("planned_memory_bytes")
    figures.append(
        f"peak {size(summary['peak_memory_bytes'])}"
        + (f" (plan {size(planned)})" if planned else "")
    )
    lines = ["  " + " · ".join(figures)]
    if parts := summary.get("seconds_by_part"):
        lines.append(f"  a step's time: {shares(parts)}")
    result_path = summary.get("adapter") or summary.get("model")
    if result_path:
        digest = (
            f" · sha256 {summary['adapter_sha256'][:12]}…" if "adapter_sha256" in summary else ""
        )
        lines.append(f"  ✓ {shown(result_path)} · {size(summary['adapter_bytes'])}{digest}")
    return lines
