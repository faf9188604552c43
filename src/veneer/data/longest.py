"""Finds the micro-batches of a run that may need the most memory, without running any.

The memory of a micro-batch rises with each count of Extent. So the largest micro-batch is among
those that no other exceeds in every count, and these are few. Shared prompts and padding are
counted as they are computed.

Most micro-batches are skipped: bounds that need no tokens show that another one exceeds them. Of
a run of many epochs the last ones are not planned: batches of its longest rows stand for them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from veneer.data.batching import (
    EpochPlan,
    RowSpans,
    best_groups,
    packed_rows,
    plan_epoch,
    shared_prompt,
    used_length,
)
from veneer.data.examples import Example
from veneer.data.files.on_disk import column_of
from veneer.data.mixture import Mixture
from veneer.kernels.layout import round_up

SLACK = 1.04
"""A micro-batch is skipped if another, times this, exceeds it in every count: memory differs by
less."""
MOST_EPOCHS = 1000
"""Most epochs whose micro-batches are looked at. All differ unless they are in the file's order."""
QUERY_ROWS = 256
"""Query rows whose scores attention holds at once (kernels/attention/packed.py BLOCK)."""

Counts = NDArray[np.int64]


class Extent(NamedTuple):
    """The counts that a micro-batch's memory rises with.

    computed  rows of the matrix products, filler and padding included
    trained   tokens whose logits are formed
    keys      rows of keys that the largest group's attention holds; the prompt counts for each
              document
    scores    values that one head of its attention holds at once
    """

    computed: int
    trained: int
    keys: int
    scores: int

    @classmethod
    def of(cls, examples: Sequence[Example], *, packed: bool, share_prompt: bool) -> "Extent":
        """Counts a micro-batch. packed: rows lie end to end, else they are padded to the
        longest."""
        trained = sum(int(np.count_nonzero(example.trained)) for example in examples)
        longest = max(map(used_length, examples))
        if not packed:
            padded = len(examples) * longest
            return cls(padded, trained, padded, padded * longest)
        keys = scores = 0
        for group in best_groups(examples) if share_prompt else [examples]:
            prompt = shared_prompt(group) if share_prompt else 0
            longest = max(map(used_length, group)) - prompt
            width = round_up(prompt + longest)
            keys = max(keys, len(group) * width)
            scores = max(
                scores,
                len(group) * min(longest, QUERY_ROWS) * width,
                min(prompt, QUERY_ROWS) * prompt,
            )
        return cls(packed_rows(examples, share_prompt=share_prompt), trained, keys, scores)


@dataclass(frozen=True)
class _RowCounts:
    """Counts of each row: computed tokens, tokens of its longest example, trained tokens,
    examples."""

    used: Counts
    longest: Counts
    trained: Counts
    examples: Counts

    @classmethod
    def of(cls, examples: Sequence[Example], rows: RowSpans) -> "_RowCounts":
        starts, used = np.asarray(rows.starts), column_of(examples, "used")
        first = starts[:-1]
        return cls(
            rows.lengths.astype(np.int64),
            np.maximum.reduceat(used, first),
            np.add.reduceat(column_of(examples, "trained"), first),
            np.diff(starts),
        )

    def bounds(self, rows: Counts, spans: Counts, *, packed: bool) -> Counts:
        """Returns upper bounds of the Extent of the rows in each span, (S, 4)."""
        used, trained, count = (
            _reduce_spans(np.add, part[rows], spans)
            for part in (self.used, self.trained, self.examples)
        )
        longest = _reduce_spans(np.maximum, self.longest[rows], spans)
        padded = count * longest
        if not packed:
            return np.stack([padded, trained, padded, padded * longest], axis=1)
        width = longest + round_up(1)
        computed = used + round_up(1)
        return np.stack(
            [computed, trained, count * width, count * np.minimum(longest, QUERY_ROWS) * width],
            axis=1,
        )


def _reduce_spans(reduce: np.ufunc, values: Counts, spans: Counts) -> Counts:
    """Applies `reduce` to values[start:stop] of each span."""
    return reduce.reduceat(np.append(values, 0), spans.ravel())[::2].astype(np.int64)


def plans_of_run(
    examples: Sequence[Example],
    rows: RowSpans,
    *,
    batch: int,
    seed: int,
    order: Literal["bucketed", "shuffled", "file"],
    mixture: Mixture | None,
    steps: int,
) -> Iterator[tuple[EpochPlan, int]]:
    """Yields the plan of each epoch, and how many of its batches the run takes.

    Epochs in the order of the file are alike, so the first stands for all. Of others only
    MOST_EPOCHS are yielded, then _worst_batches for all later ones.
    """
    is_plain = mixture is None or mixture.is_plain
    epoch, most = 0, 1 if order == "file" and is_plain else MOST_EPOCHS
    while steps > 0 and epoch < most:
        plan = plan_epoch(
            rows.lengths, batch=batch, seed=seed, epoch=epoch, order=order, mixture=mixture
        )
        if not len(plan):
            return
        yield plan, min(steps, len(plan))
        steps, epoch = steps - len(plan), epoch + 1
    if steps > 0 and most > 1:
        worst = _worst_batches(examples, rows, batch, 1 if mixture is None else mixture.most_uses)
        yield worst, len(worst)


def _worst_batches(
    examples: Sequence[Example], rows: RowSpans, batch: int, most_uses: int
) -> EpochPlan:
    """Makes batches of the rows with the most tokens, with the longest examples, and with the most
    trained tokens: no batch of the run has more of either. most_uses: of a row, in one batch"""
    counts = _RowCounts.of(examples, rows)
    orders = [
        np.argsort(-part, kind="stable") for part in (counts.used, counts.longest, counts.trained)
    ]
    batches = [np.repeat(order[:batch], most_uses)[:batch] for order in orders]
    return EpochPlan(np.concatenate(batches), len(batches[0]))


def largest_micro_batches(
    examples: Sequence[Example],
    rows: RowSpans,
    plans: Iterable[tuple[EpochPlan, int]],
    *,
    micro_batch: int,
    packed: bool,
    share_prompt: bool,
    divide: Callable[[list[int]], Iterable[list[int]]] = lambda part: [part],
) -> list[list[int]]:
    """Returns the example numbers of every micro-batch that may be the largest.

    Sorted by computed rows, the most first. divide: splits a micro-batch into the parts that are
    computed one after another
    """
    counts = _RowCounts.of(examples, rows) if len(examples) else None
    front: list[tuple[Extent, list[int]]] = []
    for plan, taken in plans:
        assert counts is not None
        spans = plan.spans(micro_batch, taken)
        bounds = counts.bounds(plan.rows, spans, packed=packed)
        candidates = np.argsort(-bounds[:, 0], kind="stable")
        for extent, _ in front:
            candidates = candidates[~_is_exceeded(bounds[candidates], extent)]
        while len(candidates):
            start, stop = spans[candidates[0]].tolist()
            candidates = candidates[1:]
            for part in divide(rows.examples(plan.rows[start:stop].tolist())):
                extent = Extent.of(
                    [examples[i] for i in part], packed=packed, share_prompt=share_prompt
                )
                if not any(_exceeds(larger, extent, SLACK) for larger, _ in front):
                    front = [pair for pair in front if not _exceeds(extent, pair[0], 1.0)] + [
                        (extent, part)
                    ]
                    candidates = candidates[~_is_exceeded(bounds[candidates], extent)]
    return [part for _, part in sorted(front, key=lambda pair: pair[0], reverse=True)]


def _exceeds(counts: Sequence[int], other_counts: Sequence[int], slack: float) -> bool:
    return all(mine * slack >= theirs for mine, theirs in zip(counts, other_counts, strict=True))


def _is_exceeded(bounds: Counts, extent: Extent) -> NDArray[np.bool_]:
    """Whether the extent exceeds the bounds in every count, but for the slack: (S, 4) -> (S)."""
    return np.asarray((bounds <= np.array(extent) * SLACK).all(axis=1))
