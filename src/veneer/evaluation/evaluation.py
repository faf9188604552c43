"""Evaluates a base: its loss on held-out rows, the quality of its answers, and what it has
forgotten.

The function `nats` computes a batch (models/likelihood.py).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from veneer.data.batching import RowSpans
from veneer.data.examples import Example, Row, prompt_key
from veneer.decoding.schedule.lookup import LookupMode
from veneer.errors import DataError
from veneer.evaluation.answers import evaluate_answers, finite, references_of, refuse_rows
from veneer.evaluation.general import (
    by_document,
    general_documents,
    general_examples,
    general_result,
)
from veneer.evaluation.intervals import Counts, Figures, interval
from veneer.evaluation.label_figures import label_figures
from veneer.evaluation.label_scores import Nats, label_scores
from veneer.evaluation.labels import checked_labels, labels_of
from veneer.evaluation.metrics.metric import Metric, ratio
from veneer.evaluation.predictions import (
    Line,
    counts_of,
    differences,
    line_of,
    matched,
    read_predictions,
    refuse_unanswered,
    write_predictions,
)
from veneer.files.atomic import refuse_unwritable_file
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase

Progress = Callable[[str, int, int], None]
"""Reports (label, rows done, rows in all)."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Says what to evaluate besides the loss.

    metrics            answers are generated only if one needs them
    max_new_tokens     longer answers are cut
    lookup             as in Base.generate
    labels             what accuracy chooses from; none: the distinct answers of the rows, if they
                       are few and short
    length_normalised  labels are compared by their log-probability per token
    predictions        a JSONL file to write (predictions.py)
    against            another evaluation's predictions, to compare row by row
    general            a text file, or general.BUILT_IN, for the loss on general text; None: left
                       out
    variables          of the chat template
    """

    metrics: Sequence[Metric] = ()
    max_new_tokens: int = 256
    lookup: LookupMode = "auto"
    labels: Sequence[str] = field(default_factory=list)
    length_normalised: bool = False
    predictions: Path | None = None
    against: Path | None = None
    general: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


def evaluate(
    base: FrozenBase,
    rows: Sequence[Row],
    examples: Sequence[Example],
    choices: EvaluationOptions,
    *,
    nats: Nats,
    progress: Progress | None = None,
) -> Figures:
    """Returns what `veneer evaluate` reports, ready for JSON.

        rows, tokens      rows evaluated; trained tokens that the loss is over
        loss, perplexity  nats per trained token, every token counting the same; its exponential
        cut_answers       where rows were answered: how many answers were cut at max_new_tokens
        <metric>          each requested metric; units: share or points of each
        labels            for accuracy: own (whether the choices are the rows' own answers), names,
                          confusion, uncalibrated and calibrated (label_figures.py)
        intervals         {loss, metric: [low, high]}, 95%, over rows, those with the same prompt
                          as one (intervals.py), and so the answers of one conversation; a figure
                          without an interval is left out
        general           of general text: loss, interval, and with an adapter: before, forgetting
        against           of the other predictions: {loss, metric: other, difference, interval}

    nats   examples -> (N, 2), on this base with its active adapters
    Raises DataError for rows that a metric cannot be computed on and for predictions that these
    cannot be compared with, before anything is computed, and DivergedError for rows whose loss is
    not finite.
    """
    report = progress or (lambda label, done, total: None)
    if choices.predictions is not None:
        refuse_unwritable_file(choices.predictions)
    references = references_of(base, rows, choices.variables) if choices.metrics else []
    _refuse_references(choices.metrics, rows, references)
    labels = _labels(choices, rows, references)
    lines = [line_of(example) for example in examples]
    other_lines = None
    if choices.against is not None:
        other_lines = matched(lines, read_predictions(choices.against), str(choices.against))
        refuse_unanswered(other_lines, choices.metrics)
    general = read_general(base, choices.general)

    losses = finite(nats(examples), examples)
    if not losses[:, 1].sum():
        raise DataError("no token to evaluate", [], "See what is trained on: veneer data check")
    for line, (row_nats, row_tokens) in zip(lines, losses, strict=True):
        line.update(nats=float(row_nats), tokens=int(row_tokens))
    of_labels = _answer(base, rows, references, labels, choices, nats, lines, report)
    if choices.predictions is not None:  # the answers are kept if a user's metric fails on one
        write_predictions(choices.predictions, lines)
    spans = RowSpans.of(examples)
    prompts = [  # of whole rows: the examples of a row depend on each other
        prompt_key(rows[end - 1])
        for start, end in pairwise(spans.starts)
        for _ in range(start, end)
    ]
    result = {"rows": len(spans.lengths), **_figures(losses, lines, choices.metrics, prompts)}
    if labels:
        result["labels"] = {"own": not choices.labels, "names": labels, **of_labels}
    if general is not None:
        result["general"] = evaluate_general(base, *general, nats)
    if other_lines is not None:
        result["against"] = {
            "file": str(choices.against),
            **differences(lines, other_lines, choices.metrics, prompts),
        }
    if choices.predictions is not None:
        write_predictions(choices.predictions, lines)
    return result


def _refuse_references(
    metrics: Sequence[Metric], rows: Sequence[Row], references: list[list[str]]
) -> None:
    for metric in metrics:
        reasons = [metric.refuses(right) for right in references]
        if any(reasons):
            reason = next(text for text in reasons if text)
            refuse_rows(
                f"{metric.name} {reason}",
                [row.ref for row, fault in zip(rows, reasons, strict=True) if fault],
                "Ask for exact_match instead.",
            )
        if references:  # a user's function may fail
            metric.counts([references[0][0]], references[:1])


def _labels(
    choices: EvaluationOptions, rows: Sequence[Row], references: list[list[str]]
) -> list[str]:
    if not any(metric.needs == "label" for metric in choices.metrics):
        return []
    labels = checked_labels(choices.labels) if choices.labels else labels_of(references)
    label_set = set(labels)
    refuse_rows(
        "the right answer of these rows is none of the labels",
        [
            row.ref
            for row, right in zip(rows, references, strict=True)
            if not label_set & set(right)
        ],
        f"Labels: {', '.join(labels[:20])}{', …' if len(labels) > 20 else ''}.",
    )
    return labels


def _answer(
    base: FrozenBase,
    rows: Sequence[Row],
    references: list[list[str]],
    labels: list[str],
    choices: EvaluationOptions,
    nats: Nats,
    lines: list[Line],
    report: Progress,
) -> Figures:
    """Adds to each line what the metrics need: references, the chosen label, the generated
    answer. Returns the figures of labels.
    """
    figures: Figures = {}
    for line, right in zip(lines, references or [[]] * len(lines), strict=True):
        line["references"] = right
    if labels:
        scores = label_scores(
            base.acting_tokenizer,
            rows,
            labels,
            nats=nats,
            length_normalised=choices.length_normalised,
            variables=choices.variables,
            progress=lambda done, total: report("labels", done, total),
        )
        keys = [int(line["key"], 16) for line in lines]
        figures, of_rows = label_figures(scores, labels, references, keys)
        for line, of_row in zip(lines, of_rows, strict=True):
            line.update(of_row)
    if any(metric.needs == "answers" for metric in choices.metrics):
        answers = evaluate_answers(
            base,
            rows,
            max_new_tokens=choices.max_new_tokens,
            lookup=choices.lookup,
            variables=choices.variables,
            progress=lambda done, total: report("answers", done, total),
        )
        for line, answer in zip(lines, answers, strict=True):
            line["answer"], line["cut"] = answer.answer, answer.cut
    return figures


def _figures(
    losses: Counts, lines: list[Line], metrics: Sequence[Metric], prompts: Sequence[int]
) -> Figures:
    loss = ratio(losses.sum(axis=0))
    result: Figures = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": int(losses[:, 1].sum()),
        "intervals": {},
        "units": {},
    }
    ends = {"loss": interval(losses, ratio, prompts=prompts)}
    if any("cut" in line for line in lines):
        result["cut_answers"] = sum(line["cut"] for line in lines)
    for metric in metrics:
        counts = counts_of(lines, metric)
        result[metric.name] = metric.of_totals(counts.sum(axis=0))
        ends[metric.name] = interval(
            counts, metric.of_totals, share=metric.unit == "share", prompts=prompts
        )
        result["units"][metric.name] = metric.unit
        for line, row in zip(lines, counts, strict=True):
            line[metric.name] = metric.of_totals(row)
    result["intervals"] = {name: pair for name, pair in ends.items() if pair is not None}
    return result


def read_general(
    base: FrozenBase, source: str | None
) -> tuple[Sequence[Example], Sequence[int]] | None:
    """Returns windows of general text and the document of each. Raises DataError."""
    if source is None:
        return None
    return general_examples(general_documents(source), base.tokenizer, capacity_of(base).positions)


def evaluate_general(
    base: FrozenBase, examples: Sequence[Example], owners: Sequence[int], nats: Nats
) -> Figures:
    """Evaluates general text; with active adapters, also the base without them."""
    after = by_document(finite(nats(examples), examples), owners)
    before = None
    if base.routing.active:
        with base.routing.none():
            before = by_document(finite(nats(examples), examples), owners)
    return general_result(after, before)
