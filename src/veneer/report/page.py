"""Writes report.html: one file that shows a run, made from its folder.

No network, no script, no font to load: it can be mailed and opened in ten years. Everything that
comes from users or models is escaped. Reads run.yaml, metrics.jsonl, summary.json and, where there
is one, adapter/veneer.json; what an interrupted run did not write is left out of the page.
"""

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from veneer.adapters.config import METHODS
from veneer.errors import CorruptFileError, SourceError
from veneer.files.atomic import atomic_file
from veneer.files.settings import part_models
from veneer.files.strict_json import read_json, read_yaml
from veneer.formats.manifest import MANIFEST_NAME, read_manifest
from veneer.objectives.config import OBJECTIVES
from veneer.report.html import html_page, section, table
from veneer.report.labels import label_section
from veneer.report.plots import MAX_POINTS, Series, bars, line_chart, smooth
from veneer.report.preferences import loss_label, preference_section
from veneer.training.config import RunConfig
from veneer.training.output.loggers import flat
from veneer.training.output.records import Record, read_records
from veneer.wording import clock, interval_of_95, millions, number, percent, shares, size

NAME = "report.html"
SAMPLES = 20  # most that are shown
REASONS = {
    "done": "finished",
    "early_stop": "stopped early: the held-out loss no longer fell",
    "halving": "stopped by halving: other jobs of the sweep had a lower held-out loss",
    "time": "stopped because its time was used up",
    "interrupted": "interrupted; its best values are kept",
}


def write_report(run_folder: str | Path) -> Path:
    """Writes report.html into the run folder, replacing an older one, and returns its path.

    Raises SourceError where the folder is not a run's, CorruptFileError where its records are
    broken.
    """
    folder = Path(run_folder)
    needed = [folder / "run.yaml", folder / "metrics.jsonl"]
    if missing := [f"{file} is not there" for file in needed if not file.is_file()]:
        raise SourceError(f"{folder} is not the folder of a run", missing)
    settings = read_yaml(needed[0])
    file = folder / "summary.json"
    summary = read_json(file) if file.is_file() else {}
    hashes = _hashes(folder / "adapter" / MANIFEST_NAME)
    records = read_records(needed[1])
    try:
        page = make_page(folder, settings, records, summary, hashes)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as fault:
        raise CorruptFileError(
            f"what {folder} holds is not what a run writes",
            [f"{type(fault).__name__}: {fault}"],
            "Copy the folder again from where the run was.",
        ) from fault
    with atomic_file(folder / NAME, replace=True) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")
    return folder / NAME


def make_page(
    folder: Path,
    settings: Mapping[str, Any],
    records: Sequence[Record],
    summary: Mapping[str, Any],
    hashes: Mapping[str, str],
) -> str:
    """Returns the HTML text."""
    steps = [r for r in records if r["kind"] == "step"]
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    start: Record = next((r for r in records if r["kind"] == "start"), {})
    end: Record = next((r for r in reversed(records) if r["kind"] == "end"), {})
    name = folder.resolve().name
    sections = [
        _head(name, start, end, len(steps)),
        _figures(start, summary, steps, evaluations),
        section("Loss", _loss_chart(start, steps, evaluations)),
        section("Preferences", preference_section(steps, evaluations)),
        section("Labels", label_section(evaluations)),
        section("Answers on held-out rows", _samples(evaluations, summary.get("best_step"))),
        section("Memory", _memory(summary)),
        section("Time", _time(steps, evaluations)),
        section("Data", _data(start, steps)),
        section("Learning rate and gradient", _small_charts(steps)),
        section("Recipe", _recipe(settings)),
        section("Run it again", _repeat(folder, settings)),
        section("Hashes and versions", _identity(summary, hashes)),
    ]
    return html_page(name, "".join(sections))


def _head(name: str, start: Record, end: Record, num_steps: int) -> str:
    facts = (
        [f"{start['method']} on {start['base']}"] if "method" in start and "base" in start else []
    )
    facts.append(
        f"{num_steps:,} of {start['steps']:,} steps" if "steps" in start else f"{num_steps:,} steps"
    )
    if isinstance(start.get("time"), int | float):
        facts.append(time.strftime("%d %B %Y, %H:%M", time.localtime(start["time"])))
    reason = str(end.get("reason", "not finished"))
    status = f"<p class=status>{escape(REASONS.get(reason, reason))}</p>"
    return f"<header><h1>{escape(name)}</h1><p>{escape(' · '.join(facts))}</p>{status}</header>"


def _figures(
    start: Record,
    summary: Mapping[str, Any],
    steps: Sequence[Record],
    evaluations: Sequence[Record],
) -> str:
    figures: list[tuple[str, str, str]] = []  # value, name, note
    held_out = [(r["step"], r["loss"]) for r in evaluations if r["loss"] is not None]
    # What stood before step 1 is never kept, however low its loss.
    kept = summary.get("validation_loss") or min((y for x, y in held_out if x), default=None)
    if kept is not None:
        best_step = [f"step {summary['best_step']:,}"] if summary.get("best_step") else []
        first = [f"first {number(held_out[0][1])}"] if len(held_out) > 1 else []
        note = " · ".join([*best_step, *first, *_intervals(summary)])
        figures.append((number(kept), "held-out loss, best", note))
    elif held_out:
        figures.append((number(held_out[0][1]), "held-out loss before step 1", ""))
    losses = [r["loss"] for r in steps if r["loss"] is not None]
    if losses:
        tenth = losses[-max(len(losses) // 10, 1) :]
        figures.append(
            (
                number(sum(tenth) / len(tenth)),
                "training loss, last tenth",
                f"first {number(losses[0])}",
            )
        )
    if steps:
        seconds = sum(r["seconds"] for r in steps)
        rate = summary.get("tokens_per_second") or (
            sum(r["tokens"] for r in steps) / seconds if seconds else 0
        )
        per_row = summary.get("examples_per_second")
        figures.append(
            (
                f"{rate:,.0f}",
                "tokens per second",
                f"{number(per_row)} rows per second" if per_row else "",
            )
        )
        parts = shares(summary.get("seconds_by_part") or {})
        figures.append(
            (clock(seconds), "training time", parts or f"{number(seconds / len(steps))} s a step")
        )
    if peak := summary.get("peak_memory_bytes"):
        idle = summary.get("idle_memory_bytes")
        figures.append((size(peak), "peak memory", f"{size(idle)} before the base" if idle else ""))
    if trainable := start.get("trainable_parameters"):
        share = percent(trainable, start["total_parameters"])
        figures.append((millions(trainable), "trainable parameters", f"{share} of the base"))
    if start.get("modules_total"):
        figures.append(
            (f"{start['modules_adapted']} of {start['modules_total']}", "modules adapted", "")
        )
    if on_disk := summary.get("adapter_bytes", start.get("adapter_bytes")):
        figures.append((size(on_disk), "on disk", ""))
    cells = (
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span><small>{escape(note)}</small></div>"
        for value, name, note in figures
    )
    return f"<div class=figures>{''.join(cells)}</div>"


def _intervals(summary: Mapping[str, Any]) -> list[str]:
    """Returns the intervals of the held-out loss and of its change."""
    held_out = summary.get("held_out") or {}
    intervals = ((name, held_out.get(key)) for name, key in (("", "loss"), ("change ", "change")))
    return [
        f"{name}{interval_of_95(interval['low'], interval['high'])}"
        for name, interval in intervals
        if interval
    ]


def _loss_chart(start: Record, steps: Sequence[Record], evaluations: Sequence[Record]) -> str:
    raw = [(r["step"], r["loss"]) for r in steps]
    # The mean over a fiftieth of the run to each side smooths noise and keeps trends.
    every = len(raw) // MAX_POINTS + 1
    means = smooth([y for _, y in raw], len(raw) // 50, every=every)
    smoothed = [(x, mean) for (x, _), mean in zip(raw[::every], means, strict=True)]
    return line_chart(
        [
            Series("each step", raw, "quiet"),
            Series("training, smoothed", smoothed, "a"),
            Series("held-out", [(r["step"], r["loss"]) for r in evaluations], "b", marks=True),
        ],
        title="Loss",
        x_label="step",
        y_label=loss_label(start),
    )


def _small_charts(steps: Sequence[Record]) -> str:
    charts = [
        line_chart(
            [Series(title, [(r["step"], r[key]) for r in steps], "a")],
            title=title,
            x_label="step",
            y_label=unit,
            small=True,
        )
        for title, key, unit in (
            ("Learning rate", "learning_rate", "per step"),
            ("Gradient norm", "gradient_norm", "before clipping"),
        )
    ]
    return f"<div class=pair>{''.join(charts)}</div>" if any(charts) else ""


def _samples(evaluations: Sequence[Record], best_step: int | None) -> str:
    """Shows per prompt the answer before, the answer of the kept values and the expected one;
    others folded.
    """
    by_prompt: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for record in evaluations:
        if sample := record.get("sample"):
            by_prompt.setdefault(sample["prompt"], []).append((record["step"], sample))
    cards = []
    for prompt, answers in list(by_prompt.items())[-SAMPLES:]:
        step, sample = next((item for item in answers if item[0] == best_step), answers[-1])
        columns = [
            ("before", sample.get("before")),
            (f"after {step:,} steps", sample["answer"]),
            ("expected", sample["expected"]),
        ]
        cells = "".join(
            f"<div><h4>{escape(title)}</h4><p>{escape(text) or '<i>empty</i>'}</p></div>"
            for title, text in columns
            if text is not None
        )
        other_answers = [
            (f"step {at_step:,}", item["answer"])
            for at_step, item in answers
            if at_step not in (0, step)
        ]
        way = (
            "<details><summary>answers at other steps</summary>"
            f"{table((), other_answers)}</details>"
            if other_answers
            else ""
        )
        cards.append(
            f"<article><h3>{escape(prompt)}</h3><div class=answers>{cells}</div>{way}</article>"
        )
    return "".join(cards)


def _memory(summary: Mapping[str, Any]) -> str:
    rows: list[tuple[str, float, str]] = []
    if planned := summary.get("planned_memory_bytes"):
        rows.append(("planned", planned, "quiet"))
    if peak := summary.get("peak_memory_bytes"):
        rows.append(("measured peak", peak, "a"))
    if idle := summary.get("idle_memory_bytes"):
        rows.append(("before the base was loaded", idle, "quiet"))
    if not rows:
        return ""
    note = ""
    if planned and peak:
        off = 100 * (peak - planned) / planned
        note = (
            f"<p>The plan was {abs(off):.1f}% {'below' if off > 0 else 'above'} what was"
            " measured.</p>"
        )
    return bars([(name, value, size(value), colour) for name, value, colour in rows]) + note


def _time(steps: Sequence[Record], evaluations: Sequence[Record]) -> str:
    rows = [
        ("training steps", sum(r["seconds"] for r in steps), "a"),
        ("evaluations", sum(r["seconds"] for r in evaluations), "b"),
    ]
    shown = [row for row in rows if row[1] > 0]
    return bars([(name, value, clock(value), colour) for name, value, colour in shown])


def _data(start: Record, steps: Sequence[Record]) -> str:
    tokens, trained = sum(r["tokens"] for r in steps), sum(r["trained_tokens"] for r in steps)
    rows = []
    if "train_rows" in start:
        rows.append(("rows to train on", f"{start['train_rows']:,}"))
        rows.append(("rows held out", f"{start['validation_rows']:,}"))
    if tokens:
        rows.append(("tokens read", f"{tokens:,}"))
        rows.append(("of these trained on", f"{trained:,} ({100 * trained / tokens:.0f}%)"))
    return table((), rows)


def _recipe(settings: Mapping[str, Any]) -> str:
    """Shows every setting: those that differ from the default first, the others folded."""
    changed, same = recipe_rows(settings)
    folded = table((), [row[:2] for row in same])
    return table(("setting", "value", "default"), changed) + (
        f"<details><summary>{len(same)} settings at their defaults</summary>{folded}</details>"
        if same
        else ""
    )


def recipe_rows(
    settings: Mapping[str, Any],
) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Returns (setting, value, default) of those that differ from the default, and of the
    others.
    """
    defaults = _defaults(settings)
    values = flat({**settings, "data": settings.get("data") or {}})
    rows = [
        (name, _setting_text(value), _setting_text(defaults.get(name)))
        for name, value in values.items()
    ]
    return [row for row in rows if row[1] != row[2]], [row for row in rows if row[1] == row[2]]


def _defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns flat defaults of the run, its parts, method and objective; required settings are
    absent."""

    def of(model: Any) -> dict[str, Any]:
        fields = model.model_fields.items()
        return {
            k: f.get_default(call_default_factory=True) for k, f in fields if not f.is_required()
        }

    defaults = of(RunConfig) | {name: of(part) for name, part in part_models(RunConfig).items()}
    for part, models in (("method", METHODS), ("objective", OBJECTIVES)):
        values = settings.get(part)
        chosen = models.get(values.get("name", "")) if isinstance(values, Mapping) else None
        usual = defaults[part].name
        defaults[part] = {**of(chosen), "name": usual} if chosen else {}
    return flat(defaults)


def _setting_text(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _repeat(folder: Path, settings: Mapping[str, Any]) -> str:
    command = (
        f"veneer train {shlex.quote(str(folder / 'run.yaml'))} --out"
        f" {shlex.quote(str(folder) + '-again')}"
    )
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    return (
        f"<pre>{escape(command)}</pre><details><summary>run.yaml</summary>"
        f"<pre>{escape(text)}</pre></details>"
    )


def _identity(summary: Mapping[str, Any], hashes: Mapping[str, str]) -> str:
    versions = summary.get("versions") or {}
    rows = [*hashes.items(), *((str(name), str(version)) for name, version in versions.items())]
    return table((), rows)


def _hashes(manifest_file: Path) -> dict[str, str]:
    if not manifest_file.is_file():
        return {}
    manifest = read_manifest(manifest_file)
    hashes = {
        "base": manifest.base.name,
        "base revision": manifest.base.revision,
        **{
            f"base {name}": str(value)
            for name, value in manifest.base.fingerprint.items()
            if name != "config"
        },
        "tokenizer": manifest.tokenizer_hash,
        "chat template": manifest.template_hash,
        "data": manifest.data_fingerprint,
        "adapter": manifest.content_hash,
        "adapter it started from": manifest.parent,
    }
    return {name: value for name, value in hashes.items() if value}
