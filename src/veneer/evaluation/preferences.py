"""Evaluates preferences: how often the better answer to a prompt is the likelier one.

    score(y) = log p(y | x), of adapters in use minus that of the base alone

An answer's log-probability is summed over its trained tokens. A row's accuracy is the share of its
pairs of answers whose scores are in order (equal scores count one half); its margin is the score of
its best answer minus the mean score of the others. Intervals are over rows; rows with the same
prompt are one.
Source: Rafailov et al. 2023, arXiv:2305.18290: without beta, the rewards that dpo compares.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from veneer.data.batching import RowSpans
from veneer.data.examples import Example, Row, prompt_key
from veneer.evaluation.answers import finite
from veneer.evaluation.intervals import Counts, Figures, interval
from veneer.evaluation.metrics.metric import ratio
from veneer.models.frozen_base import FrozenBase

PREFERENCES_ONLY = "rows of preferences are evaluated by the likelihood of their answers"
Nats = Callable[[Sequence[Example]], Counts]


def are_preferences(examples: Sequence[Example]) -> bool:
    """Returns whether the rows have answers in order of preference."""
    return any(example.kind == "rejected" for example in examples)


def evaluate_preferences(
    base: FrozenBase, parts: Sequence[Row], examples: Sequence[Example], *, nats: Nats
) -> Figures:
    """Returns what `veneer evaluate` reports of preferences, ready for JSON.

    parts: the row of each example, with its answer

    rows, accuracy, margin    rows evaluated; shares and nats, as the head of this file says
    chosen, rejected          mean scores of the best answers and of the others
    chosen_tokens, rejected_tokens   their mean lengths
    against_base              whether the scores are relative to the base alone
    intervals, units          as of an evaluation of answers
    """
    answer_nats = finite(nats(examples), examples)
    scores = -answer_nats[:, 0]
    if adapted := bool(base.routing.acting.adapters):
        with base.routing.none():
            scores = scores + finite(nats(examples), examples)[:, 0]
    starts = RowSpans.of(examples).starts
    prompts = [prompt_key(parts[start]) for start in starts[:-1]]
    rows = [scores[start:end] for start, end in pairwise(starts)]
    ones = np.ones(len(rows))
    best = np.array([row[0] for row in rows])
    rejected = np.array([row[1:].mean() for row in rows])
    tokens = [answer_nats[start:end, 1] for start, end in pairwise(starts)]
    result: Figures = {"rows": len(rows), "intervals": {}, "units": {"accuracy": "share"}}
    for name, values in (
        ("accuracy", np.array([_in_order(row) for row in rows])),
        ("margin", best - rejected),
        ("chosen", best),
        ("rejected", rejected),
        ("chosen_tokens", np.array([row[0] for row in tokens])),
        ("rejected_tokens", np.array([row[1:].mean() for row in tokens])),
    ):
        counts = np.stack([values, ones], axis=1)
        result[name] = ratio(counts.sum(axis=0))
        if name in ("accuracy", "margin"):
            share = name == "accuracy"
            ends = interval(counts, ratio, share=share, signed=not share, prompts=prompts)
            if ends is not None:
                result["intervals"][name] = ends
    return {**result, "against_base": adapted}


def _in_order(scores: Counts) -> float:
    """Returns the share of pairs of a row's answers, best first, whose scores are in order."""
    later = np.triu_indices(len(scores), 1)
    differences = (scores[:, None] - scores[None])[later]
    return float(((differences > 0) + 0.5 * (differences == 0)).mean())
