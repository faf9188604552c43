"""Measures how far label probabilities can be trusted: confusions, reliability, a temperature.

    p(label) = softmax over labels of score / temperature

Probabilities are normalised over the given labels alone: other answers have none. The expected
calibration error (ECE) is the mean distance between confidence (the highest probability) and the
share of right rows, over BINS equal ranges of confidence, weighted by rows. The temperature is
fitted on one half of the rows and judged on the other, both ways; a row's half follows from its
content, so equal rows are in the same half.
Shapes: N rows, L labels. Sources: Guo et al. 2017, arXiv:1706.04599 (temperature, ECE).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from veneer.evaluation.intervals import Counts, Figures

BINS = 10
LEAST_ROWS = 20
"""Fewest rows of a half on which a temperature is fitted."""
_LOG_RANGE = (math.log(0.02), math.log(50.0))

Right = NDArray[np.bool_]
"""(N, L): the labels that are right for each row."""


def probabilities(scores_NL: Counts, temperature: float = 1.0) -> Counts:
    """Returns the probability of each label, (N, L); rows sum to 1."""
    scaled = scores_NL / temperature
    powers: Counts = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def fit_temperature(scores_NL: Counts, right_NL: Right) -> float:
    """Finds the temperature of the lowest -log p(right labels), by golden section."""

    def loss(log_temperature: float) -> float:
        p_NL = probabilities(scores_NL, math.exp(log_temperature))
        return -float(np.log(np.maximum((p_NL * right_NL).sum(axis=1), 1e-300)).mean())

    low, high = _LOG_RANGE
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        first, second = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, second) if loss(first) < loss(second) else (first, high)
    return math.exp((low + high) / 2)


@dataclass(frozen=True)
class Calibration:
    """Probabilities whose temperature was fitted on the other half of the rows.

    probabilities: (N, L). temperatures: used for the first and for the second half
    """

    probabilities: Counts
    temperatures: tuple[float, float]


def calibrate(scores_NL: Counts, right_NL: Right, keys: Sequence[int]) -> Calibration | None:
    """Calibrates each half of the rows by the other. keys: hashes of the rows' content.

    Returns None if a half has fewer than LEAST_ROWS rows.
    """
    half_N = np.array([key & 1 for key in keys], dtype=np.int64)
    if min(np.bincount(half_N, minlength=2)) < LEAST_ROWS:
        return None
    p_NL, temperatures = np.empty_like(scores_NL), []
    for half in (0, 1):
        own, others = half_N == half, half_N != half
        temperatures.append(fit_temperature(scores_NL[others], right_NL[others]))
        p_NL[own] = probabilities(scores_NL[own], temperatures[-1])
    return Calibration(p_NL, (temperatures[0], temperatures[1]))


def reliability(probabilities_NL: Counts, right_NL: Right) -> Figures:
    """Returns the ECE and the bins that have rows: low, high, rows, mean confidence, accuracy."""
    chosen = probabilities_NL.argmax(axis=1)
    confidence, is_right = probabilities_NL.max(axis=1), right_NL[np.arange(len(chosen)), chosen]
    bin_of = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    bins = []
    for number in np.unique(bin_of).tolist():
        rows = bin_of == number
        bins.append(
            {
                "low": number / BINS,
                "high": (number + 1) / BINS,
                "rows": int(rows.sum()),
                "confidence": float(confidence[rows].mean()),
                "accuracy": float(is_right[rows].mean()),
            }
        )
    distances = [part["rows"] * abs(part["confidence"] - part["accuracy"]) for part in bins]
    return {"ece": sum(distances) / len(chosen), "bins": bins}


def confusion(right: Sequence[str], chosen: Sequence[str]) -> list[Figures]:
    """Returns the cells of the confusion matrix that have rows, the most frequent first."""
    cells = Counter(zip(right, chosen, strict=True))
    return [
        {"right": label, "chosen": other, "rows": rows}
        for (label, other), rows in sorted(cells.items(), key=lambda cell: (-cell[1], cell[0]))
    ]


def label_figures(
    scores_NL: Counts,
    labels: Sequence[str],
    references: Sequence[Sequence[str]],
    keys: Sequence[int],
) -> tuple[Figures, list[Figures]]:
    """Returns the figures of an evaluation by labels, and the label and probability of each row.

    references: the right answers of each row; at least one of them is a label
    """
    right_NL = np.array([[label in own for label in labels] for own in references])
    plain_NL, calibration = probabilities(scores_NL), calibrate(scores_NL, right_NL, keys)
    numbers = scores_NL.argmax(axis=1).tolist()
    chosen = [labels[number] for number in numbers]
    # A row with several right labels stands under the one that was chosen, if it is right.
    right = [
        label if right_NL[row, number] else labels[int(right_NL[row].argmax())]
        for row, (number, label) in enumerate(zip(numbers, chosen, strict=True))
    ]
    figures: Figures = {
        "confusion": confusion(right, chosen),
        "uncalibrated": reliability(plain_NL, right_NL),
        "calibrated": None,
    }
    lines = [
        {"label": label, "probability": float(plain_NL[row, number])}
        for row, (number, label) in enumerate(zip(numbers, chosen, strict=True))
    ]
    if calibration is not None:
        figures["calibrated"] = {
            "temperatures": list(calibration.temperatures),
            **reliability(calibration.probabilities, right_NL),
        }
        for row, (line, number) in enumerate(zip(lines, numbers, strict=True)):
            line["calibrated"] = float(calibration.probabilities[row, number])
    return figures, lines
