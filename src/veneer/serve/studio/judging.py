"""Evaluates the base and adapters on a job's held-out rows, and compares them row by row.

    rows.jsonl            the rows
    <model>.json, .jsonl  what `veneer evaluate` prints, and its predictions

Models are the base, the job's adapter, and another adapter of the library by its content.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from veneer.data.batching import RowSpans
from veneer.data.examples import Row
from veneer.data.files.writing import record_of
from veneer.data.load import DataSet
from veneer.errors import ConfigError
from veneer.evaluation.metrics.fitting import longest_answer, metrics_for
from veneer.evaluation.predictions import Line, lines_of_rows, read_predictions
from veneer.files.atomic import write_text
from veneer.files.strict_json import json_text, legible, read_json
from veneer.wording import cut

MOST_ROWS = 300
"""Held-out rows that are evaluated."""
MOST_WORSE = 200
"""Rows that became worse and are sent to the page; their count is of all."""
MOST_TEXT = 2000
"""Characters of a question or an answer that are sent."""
BASE, ADAPTER = "base", "adapter"
HEAD_METRICS = ("accuracy", "macro_f1", "mean_error", "ndcg_at_10")
"""Figures of score heads; each kind of head has some of them."""
PLAN = "evaluation.json"


@dataclass(frozen=True)
class JudgedModel:
    """A model of an evaluation. key: name of its files. adapter: its folder, None for the base"""

    key: str
    shown: str
    adapter: Path | None = None


def held_out_rows(data: DataSet) -> list[Row]:
    """Returns each held-out row once, with its best answer; none for rejected answers alone."""
    starts = RowSpans.of(data.validation).starts
    answers = [  # the last example of a row is the whole row
        [n for n in range(*ends) if data.validation[n].kind in ("answer", "chosen")]
        for ends in pairwise(starts)
    ]
    return [data.validation_rows[numbers[-1]] for numbers in answers if numbers]


def whole_rows(data: DataSet, settings: dict[str, Any]) -> Sequence[Row]:
    """Returns the held-out rows that the run did not cut: `veneer evaluate` refuses longer ones.

    settings: of the run
    """
    rows, length = held_out_rows(data), settings["length"]
    if settings["data"].get("long_rows") != "cut":
        return rows
    cut_lines = {example.ref.line for example in data.validation if len(example.ids) >= length}
    kept = [row for row in rows if row.ref.line not in cut_lines]
    if rows and not kept:
        raise ConfigError(f"all held-out rows are cut at {length:,} tokens: none can be evaluated")
    return kept


def write_rows(folder: Path, rows: Sequence[Row], settings: dict[str, Any], tokenizer: Any) -> None:
    """Writes the rows, and how they are evaluated. ConfigError: there are none.

    Labels are evaluated by the adapter's score head, which the base does not have.
    settings: of the run
    """
    if not rows:
        raise ConfigError("the run has no held-out rows with a right answer to judge it by")
    rows = rows[:MOST_ROWS]
    text = "".join(json.dumps(record_of(row), ensure_ascii=False) + "\n" for row in rows)
    write_text(folder / "rows.jsonl", text, replace=True)
    has_labels = any(row.label is not None for row in rows)
    metrics = HEAD_METRICS if has_labels else metrics_for(rows)
    flags = ["--length", str(settings["length"])]
    if has_labels:
        flags += ["--format", rows[0].format]
    elif "train_on" in settings["data"]:
        flags += ["--train-on", settings["data"]["train_on"]]
    if metrics and not has_labels:
        flags += ["--metrics", ",".join(metrics)]
        flags += ["--max-new-tokens", str(longest_answer(tokenizer, rows))]
    for name in ("dtype", "device", "quantize"):
        if settings.get(name) is not None:
            flags += [f"--{name}", settings[name]]
    plan = {
        "base": settings["base"],
        "metrics": list(metrics),
        "has_labels": has_labels,
        "flags": flags,
        "rows": [_shown_row(row) for row in rows],
    }
    write_text(folder / PLAN, json_text(legible(plan)), replace=True)


def label_text(label: Any) -> str:
    """Returns a label as the server names it."""
    return label if isinstance(label, str) else json.dumps(label, ensure_ascii=False)


def _shown_row(row: Row) -> dict[str, Any]:
    *before, last = row.messages or [{"content": row.text}]
    if row.label is not None:
        before, last = [{"role": "user", "content": row.text}], {"content": label_text(row.label)}
    question = next((m["content"] for m in reversed(before) if m.get("role") == "user"), "")
    texts = (str(question or ""), str(last.get("content") or ""))
    return {
        "line": row.ref.line,
        "question": cut(texts[0], MOST_TEXT),
        "expected": cut(texts[1], MOST_TEXT),
    }


def arguments_for(folder: Path, model: JudgedModel) -> list[str]:
    """Returns the arguments of the command that evaluates a model on the rows."""
    plan = read_json(folder / PLAN)
    arguments = ["evaluate", "--base", plan["base"], "--data", str(folder / "rows.jsonl")]
    arguments += ["--json", *plan["flags"]]
    if model.adapter is not None:
        arguments += ["--adapter", str(model.adapter)]
    if plan["has_labels"]:
        return arguments
    arguments += ["--general", "--predictions", str(folder / f"{model.key}.jsonl")]
    if model.adapter is not None:
        arguments += ["--against", str(folder / f"{BASE}.jsonl")]
    return arguments


def save_result(folder: Path, model: JudgedModel, result: dict[str, Any]) -> None:
    """Keeps what a model's evaluation printed. Its file is written last, so it marks the end."""
    write_text(folder / f"{model.key}.json", json_text(legible(result)), replace=True)


def is_judged(folder: Path, model: JudgedModel) -> bool:
    return (folder / f"{model.key}.json").is_file()


def comparison(folder: Path, models: Sequence[JudgedModel]) -> dict[str, Any]:
    """Returns the figures of the models that are evaluated, and the rows where the second is worse
    than the first, the worst row first."""
    plan = read_json(folder / PLAN)
    judged = [model for model in models if is_judged(folder, model)]
    result: dict[str, Any] = {
        "rows": len(plan["rows"]),
        "models": [
            _figures(model.shown, read_json(folder / f"{model.key}.json"), plan["metrics"])
            for model in judged
        ],
        "worse": None,
    }
    keys = [model.key for model in judged]
    if keys[:2] == [BASE, ADAPTER]:
        before, after = (read_predictions(folder / f"{key}.jsonl") for key in keys[:2])
        result["worse"] = worse_rows(plan["rows"], before, after, plan["metrics"])
    return result


def _figures(shown: str, result: dict[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    against, general = result.get("against", {}), result.get("general", {})
    intervals, units = result.get("intervals", {}), result.get("units", {})
    figures = {
        name: {
            "value": result[name],
            "interval": intervals.get(name),
            "unit": units.get(name, "nats"),
            "change": against.get(name, {}).get("difference"),
            "change_interval": against.get(name, {}).get("interval"),
        }
        for name in ("loss", *metrics)
        if name in result
    }
    if not general:
        return {"name": shown, "figures": figures, "documents": None}
    figures["general"] = {
        "value": general.get("loss"),
        "interval": general.get("interval"),
        "unit": "nats",
        "change": general.get("forgetting"),
        "change_interval": general.get("forgetting_interval"),
    }
    return {"name": shown, "figures": figures, "documents": general.get("documents")}


def worse_rows(
    rows: Sequence[dict[str, Any]],
    before: Sequence[Line],
    after: Sequence[Line],
    metrics: Sequence[str],
) -> dict[str, Any]:
    """Counts the rows that have a higher loss per token than before, and returns the MOST_WORSE
    rows with the largest difference, with their last answers."""
    worse = []
    for row, *of_models in zip(rows, lines_of_rows(before), lines_of_rows(after), strict=True):
        losses = [
            sum(line["nats"] for line in lines) / max(sum(line["tokens"] for line in lines), 1)
            for lines in of_models
        ]
        if losses[1] > losses[0]:
            sides = [_side(lines[-1], metrics) for lines in of_models]
            worse.append({**row, "losses": losses, "before": sides[0], "after": sides[1]})
    worse.sort(key=lambda row: row["losses"][0] - row["losses"][1])
    return {"count": len(worse), "rows": worse[:MOST_WORSE]}


def _side(line: Line, metrics: Sequence[str]) -> dict[str, Any]:
    answer = line.get("answer", line.get("label"))
    return {
        "answer": None if answer is None else cut(str(answer), MOST_TEXT),
        "metrics": {name: line.get(name) for name in metrics},
    }
