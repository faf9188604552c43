"""Which adapters act on which rows of a forward: one immutable value per forward.

A forward computes M rows (tokens) in the shape (M), (1, M) or (B, T), read row by row. Its parts
cover the rows in order: the first part has the first rows, the next part the rows after them. A
single part covers all rows: with no adapter, with one, or with several that are added. This module
knows nothing of what a layer computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.activation import active_tokens
from veneer.adapters.combinations import refuse_answers, refuse_sum
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.score_head import ScoreHead
from veneer.errors import ConfigError, RefusedError
from veneer.kernels.dense.dropout import Dropout
from veneer.kernels.dense.segments import UpdateCache

Applied = tuple[tuple[Attachment, float], ...]
"""Adapters that act on the same rows, with their weights. Empty: the base alone."""


def score_head_of(adapters: Applied) -> ScoreHead | None:
    """Returns the score head of the adapters; at most one of them has a head."""
    return next((adapter.score for adapter, _ in adapters if adapter.score is not None), None)


def invocation_of(adapters: Applied) -> tuple[int, ...]:
    """Returns the invocation tokens of the adapters; one that has them acts alone."""
    return next((adapter.invocation for adapter, _ in adapters if adapter.invocation), ())


def check_together(adapters: Applied) -> None:
    """Raises ConfigError if these adapters cannot act together (combinations.py)."""
    if len(adapters) > 1 or any(weight != 1.0 for _, weight in adapters):
        refuse_sum([(adapter.name, adapter.contents, weight) for adapter, weight in adapters])


def check_answers(adapters: Sequence[Attachment]) -> None:
    """Raises RefusedError if a base with these adapters writes no answers (combinations.py)."""
    refuse_answers([(adapter.name, adapter.contents) for adapter in adapters])


@dataclass(frozen=True)
class TokenKeys:
    """What dropout masks are drawn from: a key for each of M rows, the optimizer step, the seed.

    number: index of a layer among the layers that act on one module; each has its own masks.
    """

    rows: Tensor
    step: int
    seed: int = 0
    number: int = 0

    @classmethod
    def of_runs(cls, rows: Tensor, runs: Sequence[tuple[int, int, int]]) -> "TokenKeys":
        """Returns the keys of several runs in one batch, each (number of rows, step, seed), in
        order.

        A mask hashes the sum of a row's key and what `mask` makes of step and seed. So each run
        gets the masks that it would draw alone.
        """
        if len(runs) == 1:
            return cls(rows, *runs[0][1:])
        parts = rows.split([count for count, _, _ in runs])
        keys = [
            part + _drawn(step, seed) for part, (_, step, seed) in zip(parts, runs, strict=True)
        ]
        return cls(torch.cat(keys) & 0xFFFFFFFF, step=0)

    def of(self, rows: slice | Tensor) -> "TokenKeys":
        return replace(self, rows=self.rows[rows])

    def mask(self, module: int, share: float, *, expert: int = 0) -> Dropout:
        """Returns the mask of a module, by its number in the adapter; expert: its number in a
        stack."""
        drawn = _drawn(self.step, self.seed) + expert * 0xC2B2AE35
        return Dropout(
            self.rows, (module + self.number * 0x10001 << 32) + (drawn & 0xFFFFFFFF), share
        )


def _drawn(step: int, seed: int) -> int:
    """Returns the number of 32 bits that a mask adds to each row's key."""
    return (step * 0x9E3779B1 + seed * 0x27D4EB2F) & 0xFFFFFFFF


@dataclass(frozen=True)
class BatchPart:
    """A number of rows and the adapters that act on them. rows is None for a single part over all
    rows. Raises ConfigError if the adapters cannot act together."""

    rows: int | None
    adapters: Applied

    def __post_init__(self) -> None:
        check_together(self.adapters)


@dataclass(frozen=True)
class Segment:
    """The rows of one part in a module's input."""

    rows: slice
    adapters: Applied

    @property
    def count(self) -> int:
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True)
class Acting:
    """The adapters that act on a forward.

    parts  one part, or several with their numbers of rows
    keys   what dropout masks are drawn from; None: no dropout
    kept   (K) ascending numbers of the rows that go through the output head; None: all rows
    plan   cache of what the layers prepare for these parts; reuse one value for the same parts
    step   rows of each later forward of a loop over tokens, for which layers prepare once what a
           single part adds: its trained values stay as they are meanwhile; None: no such loop
    """

    parts: tuple[BatchPart, ...] = (BatchPart(None, ()),)
    keys: TokenKeys | None = None
    kept: Tensor | None = None
    plan: UpdateCache = field(default_factory=UpdateCache, repr=False, compare=False)
    step: int | None = None
    _rows_of_parts: dict[int, tuple[int, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _segments: dict[int, tuple[Segment, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if len(self.parts) != 1 and any(part.rows is None for part in self.parts):
            raise ValueError("each of several parts needs its number of rows")

    @classmethod
    def everywhere(cls, adapters: Applied) -> "Acting":
        """Returns the same adapters on every row."""
        return cls((BatchPart(None, adapters),))

    @property
    def whole(self) -> Applied | None:
        """Returns the adapters of a single part. None if there are several parts."""
        return self.parts[0].adapters if len(self.parts) == 1 else None

    @property
    def adapters(self) -> list[Attachment]:
        """Returns all adapters that act on any row, without repeats."""
        return list({id(a): a for part in self.parts for a, _ in part.adapters}.values())

    @property
    def rows(self) -> int | None:
        """M, the number of rows. None if any number is allowed."""
        return None if self.parts[0].rows is None else sum(part.rows or 0 for part in self.parts)

    def counts(self, rows: int) -> bool:
        """Whether so many rows are all rows of the forward or of a step, or its kept rows."""
        return rows in (self.rows, self.step) or (self.kept is not None and rows == len(self.kept))

    def segments(self, rows: int) -> tuple[Segment, ...]:
        """Divides a module's input, all M rows or the kept rows, into the parts' rows.

        Raises ConfigError for another number of rows: their adapters are unknown.
        """
        if rows not in self._segments:
            starts = accumulate(self.rows_of_parts(rows), initial=0)
            self._segments[rows] = tuple(
                Segment(slice(start, stop), part.adapters)
                for (start, stop), part in zip(pairwise(starts), self.parts, strict=True)
                if start < stop
            )
        return self._segments[rows]

    def rows_of_parts(self, rows: int) -> tuple[int, ...]:
        """Counts a module's input rows by part, 0 included. Raises ConfigError like `segments`."""
        if rows not in self._rows_of_parts:
            self._rows_of_parts[rows] = self._count_rows(rows)
        return self._rows_of_parts[rows]

    def _count_rows(self, rows: int) -> tuple[int, ...]:
        if self.rows is None or self.rows == rows:
            return tuple(rows if part.rows is None else part.rows for part in self.parts)
        if self.kept is not None and len(self.kept) == rows:
            return tuple(self._count_chosen(self.kept))
        raise ConfigError(
            f"several adapters act, each on its own rows: a module gets {rows} rows, the forward"
            f" has {self.rows}",
            next_step=(
                "Exclude the modules that get other rows (method.exclude), or let one adapter act"
                " on all rows."
            ),
        )

    def _count_chosen(self, chosen: Tensor) -> list[int]:
        """Counts the chosen rows of each part."""
        ends = torch.tensor([part.rows for part in self.parts]).cumsum(0)
        before = torch.searchsorted(chosen.cpu(), ends)
        return before.diff(prepend=before.new_zeros(1)).tolist()

    def select(self, chosen: Tensor) -> "Acting":
        """Returns the same value for some of the rows, by (K) ascending numbers."""
        keys = None if self.keys is None else self.keys.of(chosen)
        if self.whole is not None:
            return replace(self, keys=keys, kept=None)
        counts = zip(self._count_chosen(chosen), self.parts, strict=True)
        return Acting(tuple(BatchPart(count, part.adapters) for count, part in counts), keys)

    def between(self, rows: slice) -> "Acting":
        """Returns the same value for a slice of the rows, with start and stop."""
        keys = None if self.keys is None else self.keys.of(rows)
        if self.whole is not None:
            return replace(self, keys=keys, kept=None)
        chosen = torch.arange(rows.start, rows.stop)
        return replace(replace(self, keys=None).select(chosen), keys=keys)

    def within(self, active: Sequence[slice], rows: int) -> "Acting":
        """Returns the same adapters on these rows of a forward of `rows` rows, in order; the base
        alone computes all other rows."""
        entries: list[tuple[int, Applied]] = []
        start = 0
        for part in self.parts:
            stop = start + (rows if part.rows is None else part.rows)
            for run in active:
                first, last = max(run.start, start), min(run.stop, stop)
                if first < last:
                    entries += [(first - start, ()), (last - first, part.adapters)]
                    start = last
            entries.append((stop - start, ()))
            start = stop
        return Acting(_joined([entry for entry in entries if entry[0]]), self.keys)

    def padded(self, filler: int) -> "Acting":
        """Returns the same value with filler rows at the end, which belong to the last part."""
        *before, last = self.parts
        return (
            self
            if last.rows is None
            else replace(self, parts=(*before, replace(last, rows=last.rows + filler)))
        )

    def keeping(self, rows: Tensor) -> "Acting":
        """Returns a copy for a model whose output head gets only these rows."""
        return replace(self, kept=rows)

    def drawing(self, keys: TokenKeys | None) -> "Acting":
        """Returns a copy that draws dropout masks from these keys."""
        return replace(self, keys=keys)


def in_turn(rows: Sequence[tuple[int, Applied]]) -> Acting:
    """Returns an Acting with a part for each (rows, adapters), one after the other. Neighbours with
    the same adapters are joined."""
    parts = _joined(rows)
    return Acting.everywhere(parts[0].adapters) if len(parts) == 1 else Acting(parts)


def in_step(rows: Sequence[tuple[int, Applied]], before: UpdateCache | None = None) -> Acting:
    """`in_turn` for decoding steps, without training: a single part has its number of rows too, so
    its updates are cached like those of several. before: the cache of earlier steps, reused for the
    same adapters."""
    return Acting(_joined(rows), plan=UpdateCache() if before is None else before.following())


def within_texts(acting: Acting, args: Sequence[Any], kwargs: dict[str, Any]) -> Acting | None:
    """Returns what acts on the rows of a model's forward over whole texts, ids (B, T), if a single
    adapter with invocation tokens acts. Returns None if the rows of all adapters are known.

    Raises RefusedError if the forward does not get whole texts.
    """
    invocation = () if acting.rows is not None else invocation_of(acting.parts[0].adapters)
    if not invocation:
        return None
    ids = kwargs.get("input_ids", args[0] if args else None)
    cache = kwargs.get("past_key_values")
    if not isinstance(ids, Tensor) or (cache is not None and cache.get_seq_length()):
        raise RefusedError(
            f"{acting.adapters[0].name} acts from its activation on, and this forward does not get"
            " the ids of whole texts",
            next_step="Answer by base.generate, or call the model with whole texts.",
        )
    return acting.within(active_tokens(list(ids.cpu().numpy()), invocation), ids.numel())


def _joined(rows: Sequence[tuple[int, Applied]]) -> tuple[BatchPart, ...]:
    parts: list[BatchPart] = []
    for count, adapters in rows:
        if parts and parts[-1].adapters == adapters:
            parts[-1] = BatchPart((parts[-1].rows or 0) + count, adapters)
        else:
            parts.append(BatchPart(count, adapters))
    return tuple(parts)
