"""Evaluates preferences: how often the better answer to a prompt is the likelier one.

    score(y) = log p(y | x), of adapters in use minus that of the base alone

An answer's log-probability is summed over its trained tokens. A row's accuracy is the share of its
pairs of answers whose scores are in order (equal scores count one half); its margin is the score of
its best answer minus the mean score of the others. `likelier` is the accuracy of the
log-probabilities themselves. Intervals are over rows; rows with the same prompt are one.

A line of predictions has `answers`, the [nats, tokens] of each answer, best first; `nats` and
`tokens` are those of the best one. With the predictions of another evaluation of the same rows,
scores are relative to that evaluation.
Source: Rafailov et al. 2023, arXiv:2305.18290: without beta, the rewards that dpo compares.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from veneer.data.batching import RowSpans
from veneer.data.examples import AnswerKind, Example, Row, RowRef, prompt_key
from veneer.errors import DataError
from veneer.evaluation.answers import NAMED_ROWS, finite
from veneer.evaluation.evaluation import EvaluationOptions, evaluate_general, read_general
from veneer.evaluation.intervals import Counts, Figures, interval, paired_difference
from veneer.evaluation.label_scores import Nats
from veneer.evaluation.metrics.metric import ratio
from veneer.evaluation.predictions import (
    Line,
    line_of,
    matched,
    read_predictions,
    write_predictions,
)
from veneer.files.atomic import refuse_unwritable_file
from veneer.models.frozen_base import FrozenBase
from veneer.objectives.objective import AnswerBatch, Objective
from veneer.wording import first_lines

PREFERENCES_ONLY = "rows of preferences are evaluated by the likelihood of their answers"


def are_preferences(examples: Sequence[Example]) -> bool:
    """Returns whether the rows have answers in order of preference."""
    return any(example.kind == "rejected" for example in examples)


def evaluate_preferences(
    base: FrozenBase,
    parts: Sequence[Row],
    examples: Sequence[Example],
    options: EvaluationOptions,
    *,
    nats: Nats,
) -> Figures:
    """Returns what `veneer evaluate` reports of preferences, ready for JSON.

    parts: the row of each example, with its answer

    rows, accuracy, likelier, margin    rows evaluated; shares and nats, as the head of this file
                                        says
    chosen, rejected          mean scores of the best answers and of the others
    chosen_tokens, rejected_tokens   their mean lengths
    against_base              whether the scores are relative to the base alone
    intervals, units, general   as of an evaluation of answers
    against                   of the other predictions: {accuracy, likelier: other, difference,
                              interval}; their own accuracy is one half
    """
    if options.predictions is not None:
        refuse_unwritable_file(options.predictions)
    starts = [int(start) for start in RowSpans.of(examples).starts]
    others = None
    if options.against is not None:
        own = [line_of(examples[start]) for start in starts[:-1]]
        others = matched(own, read_predictions(options.against), str(options.against))
        sizes = [end - start for start, end in pairwise(starts)]
        _refuse_other_answers(others, sizes, str(options.against))
    general = read_general(base, options.general)
    prompts = [prompt_key(parts[start]) for start in starts[:-1]]
    lines = _lines(examples, starts, finite(nats(examples), examples))
    reference: list[Line] | None = None
    adapted = bool(base.routing.acting.adapters)
    if others is not None:
        reference = others
    elif adapted:
        with base.routing.none():
            reference = _lines(examples, starts, finite(nats(examples), examples))
    result = _figures(lines, reference, prompts)
    result["against_base"] = adapted and others is None
    if general is not None:
        result["general"] = evaluate_general(base, *general, nats)
    if others is not None:
        assert reference is not None
        compared = _differences(lines, reference, prompts)
        result["against"] = {"file": str(options.against), **compared}
    if options.predictions is not None:
        write_predictions(options.predictions, lines)
    return result


def _refuse_other_answers(others: Sequence[Line], sizes: Sequence[int], file: str) -> None:
    """Raises DataError for lines without nats and tokens of each answer. sizes: answers of a row"""
    refs = [
        str(line["row"])
        for line, size in zip(others, sizes, strict=True)
        if not _are_answers(line.get("answers"), size)
    ]
    if refs:
        raise DataError(
            f"{file} does not hold the likelihood of each answer",
            first_lines(refs, NAMED_ROWS),
            "Make it with veneer evaluate --predictions FILE on the same rows.",
        )


def _are_answers(value: Any, size: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == size
        and all(isinstance(answer, list) and len(answer) == 2 for answer in value)
        and all(type(n) in (int, float) and abs(n) < 2**53 for answer in value for n in answer)
    )


def _lines(examples: Sequence[Example], starts: Sequence[int], nats: Counts) -> list[Line]:
    """Returns a line for each row. nats: nats and tokens of each answer, (E, 2)"""
    return [
        {
            **line_of(examples[start]),
            "references": [],
            "nats": float(nats[start, 0]),
            "tokens": int(nats[start, 1]),
            "answers": nats[start:end].tolist(),
        }
        for start, end in pairwise(starts)
    ]


def _figures(
    lines: Sequence[Line], reference: Sequence[Line] | None, prompts: Sequence[int]
) -> Figures:
    shares = preference_counts(lines, reference)
    scores = _scores(lines, reference)
    tokens = [np.array(line["answers"])[:, 1] for line in lines]
    means = {
        "margin": [row[0] - row[1:].mean() for row in scores],
        "chosen": [row[0] for row in scores],
        "rejected": [row[1:].mean() for row in scores],
        "chosen_tokens": [row[0] for row in tokens],
        "rejected_tokens": [row[1:].mean() for row in tokens],
    }
    counts = shares | {name: _with_ones(values) for name, values in means.items()}
    result: Figures = {
        "rows": len(lines),
        **{name: ratio(of_rows.sum(axis=0)) for name, of_rows in counts.items()},
        "intervals": {},
        "units": dict.fromkeys(shares, "share"),
    }
    for name in (*shares, "margin"):
        share = name in shares
        ends = interval(counts[name], ratio, share=share, signed=not share, prompts=prompts)
        if ends is not None:
            result["intervals"][name] = ends
    return result


def _differences(
    lines: Sequence[Line], others: Sequence[Line], prompts: Sequence[int]
) -> dict[str, Figures]:
    """Returns ours minus theirs of each share, both relative to theirs."""
    ours, theirs = preference_counts(lines, others), preference_counts(others, others)
    compared = {}
    for name in ours:
        difference, ends = paired_difference(
            ours[name], theirs[name], ratio, share=True, prompts=prompts
        )
        if name == "accuracy":  # theirs is one half by definition, on any rows
            own = interval(ours[name], ratio, share=True, prompts=prompts)
            ends = None if own is None else [end - 0.5 for end in own]
        other = ratio(theirs[name].sum(axis=0))
        compared[name] = {"other": other, "difference": difference, "interval": ends}
    return compared


def preference_counts(lines: Sequence[Line], reference: Sequence[Line] | None) -> dict[str, Counts]:
    """Returns the counts (N, 2) of `accuracy` and `likelier`.

    reference: the same rows of the model that scores are relative to; None: of none
    """
    scores, log_probs = _scores(lines, reference), _scores(lines, None)
    return {
        "accuracy": _with_ones([_in_order(row) for row in scores]),
        "likelier": _with_ones([_in_order(row) for row in log_probs]),
    }


def objective_counts(
    lines: Sequence[Line], reference: Sequence[Line], objective: Objective
) -> Counts:
    """Returns losses of an objective of preferences with their counts, (N, 2)."""
    examples = [example for number, line in enumerate(lines) for example in _examples(number, line)]
    nats, known = (
        np.concatenate([np.array(line["answers"])[:, 0] for line in side])
        for side in (lines, reference)
    )
    losses = objective.answer_losses(nats, AnswerBatch(examples, -known))
    of_examples = np.stack([losses, objective.counts(examples)], axis=1)
    return np.add.reduceat(of_examples, np.asarray(RowSpans.of(examples).starts[:-1]))


def _examples(number: int, line: Line) -> list[Example]:
    """Returns an example for each answer of a row: without its ids, but with as many targets."""
    kinds: list[AnswerKind] = ["rejected"] * len(line["answers"])
    kinds[0] = "chosen"
    return [
        Example(
            np.zeros(int(tokens) + 1, dtype=np.int32),
            np.arange(int(tokens) + 1) > 0,
            RowRef(line["row"], number + 1),
            key=number,
            row=number,
            kind=kind,
        )
        for kind, (_, tokens) in zip(kinds, line["answers"], strict=True)
    ]


def _scores(lines: Sequence[Line], reference: Sequence[Line] | None) -> list[Counts]:
    """Returns the scores of each row's answers."""
    log_probs = [-np.array(line["answers"])[:, 0] for line in lines]
    if reference is None:
        return log_probs
    known = _scores(reference, None)
    return [own - other for own, other in zip(log_probs, known, strict=True)]


def _with_ones(values: Sequence[float]) -> Counts:
    """Returns counts (N, 2), whose ratio is the mean."""
    return np.stack([np.array(values, dtype=np.float64), np.ones(len(values))], axis=1)


def _in_order(scores: Counts) -> float:
    """Returns the share of pairs of a row's answers, best first, whose scores are in order."""
    later = np.triu_indices(len(scores), 1)
    differences = (scores[:, None] - scores[None])[later]
    return float(((differences > 0) + 0.5 * (differences == 0)).mean())
