"""The held-out loss of a run, for each set and for all rows, with intervals.

The nats before step 1 and those of the kept values are compared row by row
(evaluation/intervals.py), so that a result says how certain it is. An evaluation is stored as a few
numbers: rows with the same prompt are summed into a cell; beyond MOST_CELLS prompts, a cell holds
several of them, evenly. Each cell counts as a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from veneer.data.batching import RowSpans
from veneer.data.collector import SetSize
from veneer.data.examples import Example
from veneer.evaluation.intervals import Ends, interval, paired_difference
from veneer.evaluation.metrics.metric import ratio
from veneer.formats.manifest import Figure, HeldOut, SetHeldOut

MOST_CELLS = 1000
"""Cells of all sets together: more rows would give the same interval."""


def mean_loss(losses: Sequence[float], counts: Sequence[float]) -> float | None:
    """Returns the mean loss of examples, None if nothing is held out.

    counts: what each counts; of answers, its trained tokens
    """
    return sum(losses) / sum(counts) if len(counts) else None


def losses_by_set(
    examples: Sequence[Example],
    sets: Sequence[SetSize],
    losses: Sequence[float],
    counts: Sequence[float],
) -> dict[str, float]:
    """Returns the mean loss of each set, if there are several."""
    if len(sets) < 2:
        return {}
    spans = [
        (size.name, slice(*span)) for size, span in zip(sets, _spans(examples, sets), strict=True)
    ]
    means = {name: mean_loss(losses[span], counts[span]) for name, span in spans}
    return {name: loss for name, loss in means.items() if loss is not None}


@dataclass(frozen=True)
class LossCells:
    """Sums the losses of examples into cells: a cell holds the rows of a prompt, or of several
    prompts if there are many.

    of       (E) each example's cell;  counts  (C) what each cell counts, such as trained tokens
    prompts  (N) a number for each row, equal for rows of a set with the same prompt
    tokens   trained tokens of all rows
    sets     name, rows and cells of each set, if there are several
    """

    of: NDArray[np.int64]
    counts: NDArray[np.float64]
    prompts: NDArray[np.int64]
    tokens: int
    sets: tuple[tuple[str, int, slice], ...]

    @classmethod
    def over(
        cls, examples: Sequence[Example], sets: Sequence[SetSize], counts: Sequence[float]
    ) -> "LossCells":
        """Divides the held-out rows. counts: what each example counts, (E)"""
        rows = RowSpans.of(examples)
        starts = np.asarray(rows.starts)
        row_of = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        cell_of = np.zeros(len(starts) - 1, dtype=np.int64)
        prompts = np.zeros_like(cell_of)
        spans = [
            tuple(int(row) for row in np.searchsorted(starts, span))
            for span in _spans(examples, sets)
        ]
        end, num_prompts, cells_of_sets = 0, 0, []
        for first, last in spans:
            numbers = _prompt_numbers(
                [_last(examples, *ends) for ends in pairwise(starts[first : last + 1])]
            )
            count = min(max(numbers, default=-1) + 1, max(MOST_CELLS // len(spans), 1))
            prompts[first:last] = num_prompts + np.array(numbers, dtype=np.int64)
            cell_of[first:last] = end + np.array(numbers, dtype=np.int64) % max(count, 1)
            cells_of_sets.append((last - first, slice(end, end + count)))
            end += count
            num_prompts += last - first
        of = cell_of[row_of]
        of_cells = np.zeros(end)
        np.add.at(of_cells, of, counts)
        tokens = sum(e.trained_tokens for e in examples if e.kind != "teacher")
        named = (
            [(item.name, *part) for item, part in zip(sets, cells_of_sets, strict=True)]
            if len(sets) > 1
            else []
        )
        return cls(of, of_cells, prompts, tokens, tuple(named))

    @property
    def rows(self) -> int:
        return len(self.prompts)

    def sums(self, losses: Sequence[float]) -> list[float]:
        """Sums the losses of examples by cell."""
        sums = np.zeros(len(self.counts))
        np.add.at(sums, self.of, losses)
        return [float(value) for value in sums]

    def figures(self, before: Sequence[float] | None, after: Sequence[float]) -> HeldOut:
        """Returns loss and change from sums before step 1, None if unknown, and of the kept
        values.
        """
        all_cells = slice(0, len(self.counts))
        sets = {
            name: SetHeldOut(rows=rows, **self._figures_of(cells, before, after))
            for name, rows, cells in self.sets
            if rows
        }
        return HeldOut(
            rows=self.rows,
            tokens=self.tokens,
            sets=sets,
            **self._figures_of(all_cells, before, after),
        )

    def _figures_of(
        self, cells: slice, before: Sequence[float] | None, after: Sequence[float]
    ) -> dict[str, Figure]:
        after_counts, before_counts = (
            None
            if nats is None
            else np.stack([np.asarray(nats)[cells], self.counts[cells]], axis=1)
            for nats in (after, before)
        )
        assert after_counts is not None
        figures = {"loss": _figure(ratio(after_counts.sum(axis=0)), interval(after_counts, ratio))}
        if before_counts is not None:
            figures["before"] = _figure(
                ratio(before_counts.sum(axis=0)), interval(before_counts, ratio)
            )
            figures["change"] = _figure(*paired_difference(after_counts, before_counts, ratio))
        return figures


def _prompt_numbers(examples: Sequence[Example]) -> list[int]:
    """Numbers the prompts of rows from 0, in order; the prompt of a document is its query.
    examples: one of each row."""
    numbers: dict[bytes | tuple[str, int], int] = {}
    return [
        numbers.setdefault(_prompt(example) or ("row", row), len(numbers))
        for row, example in enumerate(examples)
    ]


def _last(examples: Sequence[Example], start: int, end: int) -> Example:
    """Returns the last of a row's own examples; an answer to another row's prompt is none."""
    return next(
        example
        for number in reversed(range(start, end))
        if (example := examples[number]).kind != "mismatched"
    )


def _prompt(example: Example) -> bytes | tuple[str, int] | None:
    """Returns the query or the tokens before the last answer; None for a text without a prompt."""
    if example.query is not None:
        return "query", example.query
    length = example.prompt_length
    return example.ids[:length].tobytes() if length > 1 else None


def _figure(value: float, ends: Ends | None) -> Figure:
    low, high = ends or (None, None)
    return Figure(value=value, low=low, high=high)


def _spans(examples: Sequence[Example], sets: Sequence[SetSize]) -> list[tuple[int, int]]:
    """Returns the range of examples of each set; one range if there are not several sets."""
    ends = list(accumulate(size.examples for size in sets)) if len(sets) > 1 else [len(examples)]
    return list(pairwise([0, *ends]))
