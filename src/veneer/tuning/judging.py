"""Judges an adapter once: base and adapter on rows that nothing has seen, and forgetting.

The loss is always compared. Answers are compared too where a metric fits them: field F1 for JSON,
accuracy for a few short labels. Differences are over the same rows, with 95% intervals.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from veneer import api
from veneer.base import Base
from veneer.data.examples import Row
from veneer.errors import VeneerError
from veneer.evaluation.general import BUILT_IN
from veneer.evaluation.labels import labels_of
from veneer.quant.config import Quantize

MORE_TOKENS = 1.25
"""Longest answer that is generated, times the longest right answer."""

Progress = Callable[[str, int, int], None]


def judge(
    base: str,
    adapter: Path,
    rows: Sequence[Row],
    file: Path,
    *,
    quantize: Quantize | None,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Evaluates the base and the adapter on the judging rows; returns both results.

    file: of the rows. out: folder for the predictions of both.
    """
    loaded = api.load(base, quantize=quantize)
    out.mkdir(exist_ok=True)
    metrics, tokens = metrics_for(rows), _longest_answer(loaded, rows)

    def measured(name: str, general: str | None, against: Path | None) -> dict[str, Any]:
        return api.evaluate(
            loaded,
            file,
            metrics=metrics,
            general=general,
            against=against,
            max_new_tokens=tokens,
            predictions=out / f"{name}.jsonl",
            progress=lambda label, done, total: progress(f"{label} of the {name}", done, total),
        )

    untuned = measured("base", None, None)
    loaded.use(loaded.load_adapter(adapter, name="tuned"))
    tuned = measured("adapter", BUILT_IN, out / "base.jsonl")
    return {"metrics": list(metrics), "base": untuned, "adapter": tuned}


def metrics_for(rows: Sequence[Row]) -> tuple[str, ...]:
    """Chooses the metric of these rows' answers; none if only the loss says something."""
    answers = [_answer(row) for row in rows]
    if all(_is_json_object(answer) for answer in answers):
        return ("field_f1",)
    try:
        labels = labels_of([[answer or ""] for answer in answers])
    except VeneerError:
        return ()
    return ("accuracy",) if all(answers) and len(labels) > 1 else ()


def _answer(row: Row) -> str | None:
    """Returns the last answer of a row; None if it has none, or a tool call."""
    last = row.messages[-1] if row.messages else {}
    return None if last.get("tool_calls") else last.get("content")


def _is_json_object(answer: str | None) -> bool:
    try:
        return isinstance(json.loads(answer or ""), dict)
    except ValueError:
        return False


def _longest_answer(base: Base, rows: Sequence[Row]) -> int:
    lengths = [len(base.tokenizer(_answer(row) or "")["input_ids"]) for row in rows]
    return round(MORE_TOKENS * max(lengths, default=0)) + 8
