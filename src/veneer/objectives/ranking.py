"""Figures of reranking: how high the relevant documents of a query stand by their outputs.

    mrr         mean over queries of 1 / rank of the first document with a label above one half
    ndcg_at_10  mean over queries of DCG / DCG of the best order,
                DCG = sum of label / log2(rank + 1) over the ten highest documents
    best_first  share of the queries whose first document has the highest label of all

A query counts if its documents differ in their labels, and for mrr if one is above one half. Among
documents with equal outputs the least relevant stands first, so a constant output gains nothing.
Source: Järvelin and Kekäläinen 2002, ACM TOIS 20 (4), with the label as the gain.
Shapes: N documents, Q queries.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
PLACES = 10
RELEVANT = 0.5
NAMES = ("mrr", "ndcg_at_10", "best_first")


def ranking_counts(outputs: Values, labels: Values, queries: Sequence[int]) -> dict[str, Values]:
    """Returns each figure of every query as (Q, 2): its value and 1, or 0 and 0 if it does not
    count. outputs, labels: (N). queries: a number for each document, equal within a query"""
    documents: dict[int, list[int]] = {}
    for number, query in enumerate(queries):
        documents.setdefault(query, []).append(number)
    lines = [_figures(outputs[numbers], labels[numbers]) for numbers in documents.values()]
    return {
        name: np.array([line[place] for line in lines], dtype=np.float64).reshape(-1, 2)
        for place, name in enumerate(NAMES)
    }


def _figures(outputs: Values, labels: Values) -> tuple[tuple[float, float], ...]:
    """Returns (value, count) of each of NAMES for the documents of one query."""
    if labels.min() == labels.max():
        return ((0.0, 0.0),) * len(NAMES)
    ranked = labels[np.lexsort((labels, -outputs))]
    relevant = np.flatnonzero(ranked > RELEVANT)
    reciprocal = (1.0 / (1.0 + relevant[0]), 1.0) if len(relevant) else (0.0, 0.0)
    share = _dcg(ranked) / _dcg(np.sort(labels)[::-1])
    return reciprocal, (share, 1.0), (float(ranked[0] == labels.max()), 1.0)


def _dcg(ranked: Values) -> float:
    """Returns the discounted cumulative gain of labels in the order of their ranks."""
    top = ranked[:PLACES]
    return float((top / np.log2(np.arange(2, len(top) + 2))).sum())
