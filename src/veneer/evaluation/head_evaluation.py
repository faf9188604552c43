"""Evaluates a score head on rows with labels: accuracy, F1 of each label, confusions, calibration.

All figures have 95% intervals over rows (intervals.py); equal texts, and the documents of a query,
are one observation. A label's F1 is 2 both / (chosen + right); the macro F1 is the mean over labels
that rows have or get. A row of several labels is right if exactly its labels are chosen.
Shapes: N rows, C outputs.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from veneer.adapters.labels import HeadSettings
from veneer.data.examples import Example
from veneer.errors import RefusedError
from veneer.evaluation.intervals import Counts, Figures, interval
from veneer.evaluation.label_figures import label_figures
from veneer.evaluation.metrics.metric import ratio
from veneer.models.frozen_base import FrozenBase
from veneer.models.score_heads import score_texts
from veneer.models.scores import ScoreRequest
from veneer.objectives.config import Classify
from veneer.objectives.labels import (
    ClassifyObjective,
    chosen,
    f1_of,
    label_scores,
    macro_f1,
    marked,
    ranking_of,
    targets_of,
)
from veneer.objectives.objective import AnswerBatch

HEAD_ONLY = "an adapter with a score head writes no answers: it is evaluated by its labels"
MOST_INTERVALS = 200
"""Most labels of a head whose macro F1 gets an interval."""


def evaluate_head(
    base: FrozenBase,
    examples: Sequence[Example],
    head: HeadSettings,
    prompts: Sequence[int],
    *,
    batch: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> Figures:
    """Returns what `veneer evaluate` reports of the acting adapter's head, ready for JSON.

    prompts: a number for each row, equal for rows that depend on each other (prompt_key)

    rows, loss   rows evaluated; their mean loss, without class weights
    accuracy     of labels also macro_f1, of rerank queries, mrr, ndcg_at_10 and best_first
                 (objectives/ranking.py); of regression mean_error in its place
    labels       kind and names; per_label: rows, precision, recall and f1 of each; of one label
                 also confusion, uncalibrated and calibrated (label_figures.py)
    intervals, units   as of an evaluation of answers
    """
    report = progress or (lambda label, done, total: None)
    applied = base.routing.acting.whole
    assert applied is not None
    (outputs,) = score_texts(
        base,
        [ScoreRequest(applied, examples)],
        batch_rows=batch,
        progress=lambda done, total: report("texts", done, total),
    )
    settings = Classify(kind=head.kind, labels=list(head.labels), thresholds=dict(head.thresholds))
    objective = ClassifyObjective(settings)
    answers = AnswerBatch.without_reference(examples)
    ones = np.ones(len(examples))
    counts = {"loss": np.stack([objective.answer_losses(outputs.ravel(), answers), ones], axis=1)}
    details: Figures = {"kind": head.kind, "names": list(head.labels)}
    result: Figures = {"rows": len(examples), "units": {}, "intervals": {}}
    if head.kind == "regression":
        errors = np.abs(outputs - targets_of(examples))[:, 0]
        counts["mean_error"] = np.stack([errors, ones], axis=1)
    else:
        counts["accuracy"] = np.stack([objective.right(outputs, examples), ones], axis=1)
        result["units"] = {"accuracy": "share", "macro_f1": "share"}
    for name, of_rows in counts.items():
        result[name] = ratio(of_rows.sum(axis=0))
        _add_interval(
            result, name, interval(of_rows, ratio, share=name == "accuracy", prompts=prompts)
        )
    if head.kind == "rerank":
        _add_ranking(result, ranking_of(outputs, examples))
    if head.names_outputs:
        details["per_label"] = _per_label(result, head, outputs, examples, prompts)
    if head.kind == "label":
        right = [[head.labels[int(example.label[0])]] for example in examples]
        figures, _ = label_figures(outputs, head.labels, right, [e.key for e in examples])
        details |= figures
    return {**result, "labels": details}


def _add_ranking(result: Figures, of_queries: Mapping[str, Counts]) -> None:
    """Enters the ranking figures and their intervals over queries into the result."""
    result["queries"] = int(of_queries["ndcg_at_10"][:, 1].sum())
    for name, counts in of_queries.items():
        if counts[:, 1].any():
            result[name], result["units"][name] = ratio(counts.sum(axis=0)), "share"
            _add_interval(result, name, interval(counts, ratio, share=True))


def _per_label(
    result: Figures,
    head: HeadSettings,
    outputs: Counts,
    examples: Sequence[Example],
    prompts: Sequence[int],
) -> list[Figures]:
    """Enters the macro F1 into the result; returns the figures of each label."""
    gets, has = chosen(head, outputs), marked(head, examples)
    scores = label_scores(gets, has)
    result["macro_f1"] = macro_f1(scores)
    if len(head.labels) <= MOST_INTERVALS:
        of_rows = np.stack([gets & has, gets, has], axis=1).astype(np.float64)  # (N, 3, C)
        ends = interval(
            of_rows.reshape(len(examples), -1),
            lambda sums: macro_f1(sums.reshape(3, -1)),
            share=True,
            prompts=prompts,
        )
        _add_interval(result, "macro_f1", ends)
    lines = []
    for number, (name, f1) in enumerate(zip(head.labels, f1_of(scores).tolist(), strict=True)):
        both, num_chosen, num_right = scores[:, number].tolist()
        lines.append(
            {
                "label": name,
                "rows": int(num_right),
                "precision": both / num_chosen if num_chosen else None,
                "recall": both / num_right if num_right else None,
                "f1": f1 if num_chosen or num_right else None,
            }
        )
    return lines


def _add_interval(result: Figures, name: str, ends: list[float] | None) -> None:
    if ends is not None:
        result["intervals"][name] = ends


def refuse_options(why: str, options: Mapping[str, object]) -> None:
    """Raises RefusedError for options of an evaluation that need answers. options: by name"""
    if names := [name for name, value in options.items() if value]:
        faults = [f"{name}: needs rows with one answer" for name in names]
        raise RefusedError(why, faults, "Leave these options out.")
