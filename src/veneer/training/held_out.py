"""The held-out rows of a run: the loss of each set beside that of all, and how far it could be
another's.

Each evaluation gives the nats of every row. Those before step 1 and those of the values that are
kept are compared on the same rows (evaluation/intervals.py), so that a result says how sure it is.
What is kept of an evaluation is a few numbers: rows beyond MOST_CELLS are summed with others,
evenly, and each such sum counts as a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from veneer.data.batching import Rows
from veneer.data.examples import Example
from veneer.data.load import SetSize
from veneer.evaluation.intervals import Ends, interval, paired_difference
from veneer.evaluation.metric import ratio
from veneer.formats.manifest import Figure, HeldOut, SetHeldOut

MOST_CELLS = 1000
"""Of all sets together: a thousand sums give the same interval as more rows would."""


def mean_loss(examples: Sequence[Example], nats: Sequence[float]) -> float | None:
    """Nats per trained token, from those of each example; None where nothing is held out."""
    return sum(nats) / sum(int(example.trained.sum()) for example in examples) if examples else None


def losses_by_set(
    examples: Sequence[Example], sets: Sequence[SetSize], nats: Sequence[float]
) -> dict[str, float]:
    """Nats per trained token of each of several sets, which lie one behind the other."""
    if len(sets) < 2:
        return {}
    spans = [
        (each.name, slice(*span)) for each, span in zip(sets, _spans(examples, sets), strict=True)
    ]
    found = {name: mean_loss(examples[span], nats[span]) for name, span in spans}
    return {name: loss for name, loss in found.items() if loss is not None}


@dataclass(frozen=True)
class LossCells:
    """Where the nats of each example are summed: with those of its row's other ones, and of other
    rows where there are many.

    of      (E) each example's cell;  tokens  (C) trained tokens of each cell
    rows    of all cells;  sets  name, rows and cells of each set, where there are several
    """

    of: NDArray[np.int64]
    tokens: NDArray[np.float64]
    rows: int
    sets: tuple[tuple[str, int, slice], ...]

    @classmethod
    def over(cls, examples: Sequence[Example], sets: Sequence[SetSize]) -> "LossCells":
        found = Rows.of(examples)
        starts = np.asarray(found.starts)
        row_of = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        cell_of = np.zeros(len(starts) - 1, dtype=np.int64)
        spans = [
            tuple(int(row) for row in np.searchsorted(starts, span))
            for span in _spans(examples, sets)
        ]
        end, parts = 0, []
        for first, last in spans:
            count = min(last - first, max(MOST_CELLS // len(spans), 1))
            cell_of[first:last] = end + np.arange(last - first) % max(count, 1)
            parts.append((last - first, slice(end, end + count)))
            end += count
        of = cell_of[row_of]
        tokens = np.zeros(end)
        np.add.at(tokens, of, [int(each.trained.sum()) for each in examples])
        named = (
            [(each.name, *part) for each, part in zip(sets, parts, strict=True)]
            if len(sets) > 1
            else []
        )
        return cls(of, tokens, len(starts) - 1, tuple(named))

    def sums(self, nats: Sequence[float]) -> list[float]:
        """Of each cell, from the nats of each example."""
        found = np.zeros(len(self.tokens))
        np.add.at(found, self.of, nats)
        return [float(each) for each in found]

    def figures(self, before: Sequence[float] | None, after: Sequence[float]) -> HeldOut:
        """From these sums before step 1 (None: not kept) and of the values that are kept."""
        whole = slice(0, len(self.tokens))
        sets = {
            name: SetHeldOut(rows=rows, **self._of(at, before, after))
            for name, rows, at in self.sets
            if rows
        }
        return HeldOut(
            rows=self.rows,
            tokens=int(self.tokens.sum()),
            sets=sets,
            **self._of(whole, before, after),
        )

    def _of(
        self, at: slice, before: Sequence[float] | None, after: Sequence[float]
    ) -> dict[str, Figure]:
        ours, theirs = (
            None if nats is None else np.stack([np.asarray(nats)[at], self.tokens[at]], axis=1)
            for nats in (after, before)
        )
        assert ours is not None
        found = {"loss": _figure(ratio(ours.sum(axis=0)), interval(ours, ratio))}
        if theirs is not None:
            found["before"] = _figure(ratio(theirs.sum(axis=0)), interval(theirs, ratio))
            found["change"] = _figure(*paired_difference(ours, theirs, ratio))
        return found


def _figure(value: float, ends: Ends | None) -> Figure:
    low, high = ends or (None, None)
    return Figure(value=value, low=low, high=high)


def _spans(examples: Sequence[Example], sets: Sequence[SetSize]) -> list[tuple[int, int]]:
    """Which examples are of which set; all, where there are not several."""
    ends = list(accumulate(each.examples for each in sets)) if len(sets) > 1 else [len(examples)]
    return list(pairwise([0, *ends]))
