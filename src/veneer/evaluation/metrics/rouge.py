"""ROUGE-1, ROUGE-2 and ROUGE-L: F-measure of shared words, word pairs, and the longest common
subsequence.

Words as in the original script: lower case, letters a to z and digits, no stemming. A row counts
its best reference; the figure is the mean over rows. Equal to google-research's rouge-score
(rouge1, rouge2, rougeL). Other scripts than Latin have no words here: use chrf for them. Source:
Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from veneer.evaluation.metrics.metric import Metric, mean_of

_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def f_measure(shared: int, answered: int, expected: int) -> float:
    """Returns the harmonic mean of shared / given and shared / expected, 0 if nothing is shared."""
    return 2 * shared / (answered + expected) if shared else 0.0


def rouge_n(answer: str, reference: str, n: int) -> float:
    """Returns the F-measure of word n-grams, each counted as often as both texts have it."""
    ours, theirs = (
        Counter(zip(*(w[i:] for i in range(n)), strict=False))
        for w in (words(answer), words(reference))
    )
    return f_measure((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(answer: str, reference: str) -> float:
    """Returns the F-measure of the longest common subsequence of words."""
    ours, theirs = words(answer), words(reference)
    return f_measure(common_subsequence(ours, theirs), len(ours), len(theirs))


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence, in len(a) * len(b) steps."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other_word in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other_word else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def _best(score: Callable[[str, str], float]) -> Callable[[str, Sequence[str]], float]:
    return lambda answer, references: max(score(answer, reference) for reference in references)


ROUGE: tuple[Metric, ...] = (
    mean_of("rouge1", _best(lambda answer, reference: rouge_n(answer, reference, 1))),
    mean_of("rouge2", _best(lambda answer, reference: rouge_n(answer, reference, 2))),
    mean_of("rougeL", _best(rouge_l)),
)
