"""Prints a plan on the screen and writes it as a run file (`veneer plan`)."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from veneer.cli.common import parse_columns
from veneer.wording import clock, folded, millions, number, shown, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from veneer.plan.ask import PlanAnswer, PlanQuestion
    from veneer.plan.table import PlanRow

BAR = 40


def print_plan(console: Console, answer: PlanAnswer, question: PlanQuestion) -> None:
    """Prints a table of all plans, bars of their memory, and the advice."""
    from rich.text import Text

    from veneer.report.plan_page import spread_lines, verdict

    console.print(Text(folded(_headline(answer, question), console.width)))
    console.print(_plan_table(answer, question))
    if len(question.bases) == 1:
        for row in answer.rows:
            _print_bar(console, row, max(r.estimate.needed_bytes for r in answer.rows))
            for line in spread_lines(row):
                console.print(Text(folded("    " + line, console.width), style="dim"))
        for row in answer.rows:
            explanation = verdict(row)
            if explanation and (row.fits is False or len(answer.rows) == 1):
                console.print(Text(folded(f"  {row.choice.label}: {explanation}", console.width)))
    for fault in answer.faults:
        console.print(Text("  " + shown(fault), style="dim"))
    if (advice := answer.advice) is not None:
        rate = advice.learning_rate
        rate_text = (
            "from the base's weights (set when training starts)" if rate is None else f"{rate:g}"
        )
        recommendation = f"take {advice.choice.label}, learning rate {rate_text}"
        console.print(Text(recommendation, style="bold"))
        for reason in advice.reasons:
            console.print(Text("  " + reason))
    for note in answer.notes:
        console.print(Text(note, style="dim"))


def _headline(answer: PlanAnswer, question: PlanQuestion) -> str:
    choice = question.choice
    rows = (
        f"{question.workload.num_rows:,} rows"
        if question.workload.rows
        else f"{choice.batch} × {choice.length} tokens a step"
    )
    parts = [shown(", ".join(question.bases)), rows, answer.machine.name]
    if answer.memory:
        parts.append(f"{size(answer.memory)} of memory")
    if choice.processes > 1:
        shards = ", the base in shards" if choice.in_shards else ""
        parts.append(f"{choice.processes:,} processes{shards}")
    return " · ".join(parts)


def _plan_table(answer: PlanAnswer, question: PlanQuestion) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
    names = ["method", "trained", "file", "memory", "tokens/s", "run", "fits"]
    has_cost, has_bases = bool(question.price_per_hour), len(question.bases) > 1
    names[-1:-1] = ["cost"] * has_cost
    names[:0] = ["base"] * has_bases
    for name in names:
        justify: Literal["left", "right"] = (
            "left" if name in ("base", "method", "fits") else "right"
        )
        table.add_column(name, justify=justify, no_wrap=True)
    for row in answer.rows:
        speed = row.tokens_per_second
        cells = [
            *([shown(row.base)] if has_bases else []),
            row.choice.label,
            millions(row.run.trainable_parameters),
            size(row.run.file_bytes),
            size(row.estimate.needed_bytes),
            number(speed) if speed < 1000 else f"{speed:,.0f}",
            "–" if row.run_seconds is None else clock(row.run_seconds),
        ]
        if has_cost:
            cells.append("–" if row.cost is None else f"{row.cost:,.2f}")
        fits = {None: "–", True: "yes", False: "no"}[row.fits]
        table.add_row(*cells, fits, style="dim" if row.fits is False else None)
    return table


def _print_bar(console: Console, row: PlanRow, most: int) -> None:
    """Prints the parts of the peak as a bar, the largest first, with a legend."""
    from rich.text import Text

    styles = ("blue", "yellow", "green", "magenta", "white", "cyan", "red", "bright_black")
    line = Text(f"  {row.choice.label:<10} ")
    legend = []
    for (label, part), style in zip(row.estimate.parts.items(), styles * 2, strict=False):
        cells = round(BAR * part / most)
        line.append("█" * cells, style=style)
        if cells:
            legend.append((f"{label} {size(part)}", style))
    console.print(line)
    legend_text = Text("             ")
    width = 13
    for text, style in legend:
        if width + len(text) + 2 > console.width:
            legend_text.append("\n             ")
            width = 13
        legend_text.append("■ ", style=style).append(text + "  ", style="dim")
        width += len(text) + 4
    console.print(legend_text)


def write_run_file(args: Namespace, answer: PlanAnswer) -> None:
    """Writes the recommended run, or else the planned one with the changes that make it fit."""
    import yaml

    from veneer.files.atomic import write_text

    row = answer.rows[0]
    choice = row.choice if row.remedy is None else row.remedy.choice
    rate = None
    if answer.advice is not None:
        choice, rate = answer.advice.choice, answer.advice.learning_rate
    settings: dict[str, Any] = {
        "base": args.base or row.base,
        "data": (
            {"train": args.data, "map": columns}
            if (columns := parse_columns(args))
            else args.data or "ROWS.jsonl"
        ),
        "method": (
            choice.method.model_dump(mode="json", exclude_defaults=True)
            | {"name": choice.method.name}
        ),
        "batch": choice.batch,
        "length": choice.length,
    }
    for name, value in (
        ("quantize", choice.quantize),
        ("micro_batch", choice.micro_batch),
        ("learning_rate", rate),
        ("steps", args.steps),
        ("checkpointing", choice.checkpointing or None),
        ("shard", choice.shard or None),
        ("reduce", None if choice.reduce == "plain" else choice.reduce),
        ("dtype", None if choice.dtype == "auto" else choice.dtype),
    ):
        if value is not None:
            settings[name] = value
    settings["out"] = "runs/" + Path(args.data or "run").stem
    write_text(args.write, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
