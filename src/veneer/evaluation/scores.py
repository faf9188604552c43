"""Scores rows: the log-probability of each row's answers, for one set of adapters or for several in
the same forwards (models/scores.py)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from veneer.adapters.methods.new_tokens import texts_of
from veneer.adapters.placement.acting import Acting, Applied, check_answers
from veneer.adapters.preamble import Preamble
from veneer.data.batching import RowSpans
from veneer.data.examples import Example
from veneer.data.files.writing import Record, is_rows
from veneer.errors import fits_memory
from veneer.evaluation.answers import finite
from veneer.evaluation.id_pairs import IdPair, id_pairs, pair_examples
from veneer.evaluation.rows import RowOptions, load_rows
from veneer.models.frozen_base import FrozenBase
from veneer.models.scores import AnswerScore, ScoreRequest, score_examples


@dataclass(frozen=True)
class Score:
    """The log-probability of a row's answers, everything that a run would train on.

    row        location of the row
    sum        log-probability of all scored tokens, nats
    tokens     how many there are, the end of the turn included
    greedy     whether each of them is the likeliest in its place
    ids        the scored tokens;  log_probs: of each, nats; both None unless requested
    """

    row: str
    sum: float
    tokens: int
    greedy: bool
    ids: tuple[int, ...] | None = None
    log_probs: tuple[float, ...] | None = None

    @property
    def mean(self) -> float:
        """Log-probability per token, nats."""
        return self.sum / self.tokens

    def to_dict(self) -> dict[str, Any]:
        fields = {"sum": self.sum, "mean": self.mean, "tokens": self.tokens, "greedy": self.greedy}
        if self.ids is None or self.log_probs is None:
            return fields
        return {**fields, "ids": list(self.ids), "log_probs": list(self.log_probs)}


def score_rows(
    base: FrozenBase,
    data: str | Path | Iterable[Record] | Iterable[IdPair],
    adapters: Sequence[Applied],
    options: RowOptions,
    *,
    per_token: bool = False,
    system: str | None = None,
    variables: Mapping[str, Any] | None = None,
    batch_rows: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Score]]:
    """Returns the score of every row, for each of the given sets of adapters.

    Each reads the rows with its own preamble and new tokens. Raises DataError with every row that
    cannot be computed, DivergedError for rows whose score is not finite.
    """
    rows: Any = data if isinstance(data, str | Path) or not is_rows(data) else [*data]
    pairs = id_pairs(rows)
    examples_of: list[tuple[tuple[Preamble, tuple[str, ...]], list[Example]]] = []
    requests = []
    for applied in adapters:
        check_answers([adapter for adapter, _ in applied])
        with base.routing.held(Acting.everywhere(applied)):
            preamble = base.preamble.overridden(system, variables)
            key = preamble, texts_of(base.routing.acting.adapters)
            examples = next((known for other, known in examples_of if other == key), None)
            if examples is None:
                if pairs is None:
                    loaded = load_rows(base, rows, options, preamble=preamble, purpose="scored")
                    examples = list(loaded.train)
                else:
                    examples = pair_examples(base, pairs, length=options.length)
                examples_of.append((key, examples))
        requests.append(ScoreRequest(applied, examples))
    step = "Take fewer rows at once (batch), or fewer adapters."
    with fits_memory("while rows were scored", next_step=step):
        scores = score_examples(base, requests, batch_rows=batch_rows, progress=progress)
    return [
        _row_scores(request.examples, values, per_token=per_token)
        for request, values in zip(requests, scores, strict=True)
    ]


def _row_scores(
    examples: Sequence[Example], answers: Sequence[AnswerScore], *, per_token: bool
) -> list[Score]:
    sums = [answer.log_probs.double().sum().item() for answer in answers]
    counts = [len(answer.log_probs) for answer in answers]
    finite(np.stack([sums, counts], axis=1, dtype=np.float64), examples)
    spans = RowSpans.of(examples)
    scores = []
    for row in range(len(spans.lengths)):
        numbers = spans.examples([row])
        ids = log_probs_of_row = None
        if per_token:
            ids = tuple(int(i) for n in numbers for i in examples[n].ids[examples[n].trained])
            log_probs_of_row = tuple(v for n in numbers for v in answers[n].log_probs.tolist())
        scores.append(
            Score(
                str(examples[numbers[0]].ref),
                sum(sums[n] for n in numbers),
                sum(counts[n] for n in numbers),
                all(answers[n].greedy for n in numbers),
                ids,
                log_probs_of_row,
            )
        )
    return scores
