"""BLEU and chrF: n-grams of words and of characters that an answer shares with references; 0 to 100
points.

Tokenisation, n-grams and BLEU's formula are sacrebleu's; counts are kept by row, so that rows can
be left out. Equal to sacrebleu's corpus scores at its defaults (13a tokens, exponential smoothing;
chrF2). Sources: Papineni et al. 2002; Popović 2015; Post 2018, arXiv:1804.08771.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from veneer.errors import ConfigError
from veneer.evaluation.intervals import Counts
from veneer.evaluation.metrics.metric import Metric

ORDER = 4  # of BLEU's word n-grams
CHARACTERS = 6  # of chrF's character n-grams
BETA = 2.0  # chrF: recall counts twice as much as precision


@cache
def _sacrebleu() -> Any:
    try:
        import sacrebleu
        import sacrebleu.metrics.helpers
    except ImportError:
        raise ConfigError(
            "bleu and chrf need sacrebleu, which is not installed",
            next_step="Install it: pip install 'veneer[metrics]'",
        ) from None
    return sacrebleu


@cache
def _bleu() -> Any:
    # The effective order concerns the score of a single sentence, which is not used here.
    return _sacrebleu().metrics.BLEU(effective_order=True)


def bleu_line(answer: str, references: Sequence[str]) -> list[float]:
    """Returns [length, reference length, matches of 1- to 4-grams, 1- to 4-grams of the answer]."""
    score = _bleu().sentence_score(answer, list(references))
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


def bleu(totals: Counts) -> float:
    numbers = [int(n) for n in np.rint(totals)]
    score = _sacrebleu().metrics.BLEU.compute_bleu(
        numbers[2 : 2 + ORDER], numbers[2 + ORDER :], numbers[0], numbers[1], smooth_method="exp"
    )
    return float(score.score)


def chrf_line(answer: str, references: Sequence[str]) -> list[float]:
    """Returns [n-grams of the answer, of the reference, in both] for n = 1 to 6, of the best
    reference.
    """
    ngrams = _sacrebleu().metrics.helpers.extract_all_char_ngrams
    answer_ngrams = ngrams(answer, CHARACTERS)
    lines = []
    for reference in references:
        line: list[float] = []
        for of_answer, of_reference in zip(
            answer_ngrams, ngrams(reference, CHARACTERS), strict=True
        ):
            # Orders that the reference is too short for do not count against the answer.
            line += [
                of_answer.total() if of_reference else 0,
                of_reference.total(),
                (of_answer & of_reference).total(),
            ]
        lines.append(line)
    return max(lines, key=lambda line: chrf(np.asarray(line)))


def chrf(totals: Counts) -> float:
    """Returns the F-beta of mean precision and mean recall over the orders that both sides have."""
    of_answer, of_reference, shared = np.asarray(totals, dtype=np.float64).reshape(CHARACTERS, 3).T
    in_both = (of_answer > 0) & (of_reference > 0)
    if not in_both.any():
        return 0.0
    precision, recall = (
        (shared[in_both] / of_answer[in_both]).mean(),
        (shared[in_both] / of_reference[in_both]).mean(),
    )
    denominator = BETA**2 * precision + recall
    return float(100 * (1 + BETA**2) * precision * recall / denominator) if denominator else 0.0


def _needs_sacrebleu(references: Sequence[str]) -> None:
    _sacrebleu()


BLEU = Metric("bleu", bleu_line, bleu, unit="points", refuses=_needs_sacrebleu)
CHRF = Metric("chrf", chrf_line, chrf, unit="points", refuses=_needs_sacrebleu)
