"""Which adapters act on which rows of a forward: one immutable value, made before it and held for
its length.

A forward computes M rows (tokens), whatever the shape they come in: (M), (1, M) or (B, T) read row
by row. Its parts follow one another: the first takes the first rows, the next those behind them.
One part over all rows, however many, is a base with one adapter, with several that are added up, or
with none. Knows nothing of what a layer computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from veneer.adapters.combinations import refuse_sum
from veneer.adapters.placement.attachment import Attachment
from veneer.errors import ConfigError
from veneer.kernels.dense.dropout import Dropout
from veneer.kernels.dense.segments import UpdateCache

Applied = tuple[tuple[Attachment, float], ...]
"""Adapters that act on the same rows, each with its weight; none: the base alone."""


def check_together(adapters: Applied) -> None:
    """ConfigError: these adapters cannot act on the same rows with these weights
    (combinations.py)."""
    if len(adapters) > 1 or any(weight != 1.0 for _, weight in adapters):
        refuse_sum([(adapter.name, adapter.contents, weight) for adapter, weight in adapters])


@dataclass(frozen=True)
class TokenKeys:
    """What dropout draws from: rows (M), a key for every row; the optimizer step and the run's
    seed.

    number: of a layer among those that act at one place, each of which draws masks of its own.
    """

    rows: Tensor
    step: int
    seed: int = 0
    number: int = 0

    def of(self, rows: slice | Tensor) -> "TokenKeys":
        return replace(self, rows=self.rows[rows])

    def mask(self, module: int, share: float, *, expert: int = 0) -> Dropout:
        """module: its number in the adapter; expert: which of a stack."""
        drawn = self.step * 0x9E3779B1 + self.seed * 0x27D4EB2F + expert * 0xC2B2AE35
        return Dropout(
            self.rows, (module + self.number * 0x10001 << 32) + (drawn & 0xFFFFFFFF), share
        )


@dataclass(frozen=True)
class BatchPart:
    """rows: how many; None, of a single part: all. ConfigError: adapters that cannot act together
    like this."""

    rows: int | None
    adapters: Applied

    def __post_init__(self) -> None:
        check_together(self.adapters)


@dataclass(frozen=True)
class Segment:
    """The rows of one part in what a module is given."""

    rows: slice
    adapters: Applied

    @property
    def count(self) -> int:
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True)
class Acting:
    """parts: one, or several with their numbers of rows. keys: while training, dropout's; None:
    nothing is dropped.

    kept: (K) rising numbers of the rows that alone go through the output head; None: all do. plan:
    what the layers prepare for these parts; whoever lets the same act step after step holds one
    value, or `replace`s.
    """

    parts: tuple[BatchPart, ...] = (BatchPart(None, ()),)
    keys: TokenKeys | None = None
    kept: Tensor | None = None
    plan: UpdateCache = field(default_factory=UpdateCache, repr=False, compare=False)
    _rows_of_parts: dict[int, tuple[int, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _segments: dict[int, tuple[Segment, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if len(self.parts) != 1 and any(part.rows is None for part in self.parts):
            raise ValueError("each of several parts says how many rows it has")

    @classmethod
    def everywhere(cls, adapters: Applied) -> "Acting":
        """The same on every row."""
        return cls((BatchPart(None, adapters),))

    @property
    def whole(self) -> Applied | None:
        """What acts on all rows alike; None: several parts."""
        return self.parts[0].adapters if len(self.parts) == 1 else None

    @property
    def adapters(self) -> list[Attachment]:
        """All that act on any row, each once."""
        return list({id(a): a for part in self.parts for a, _ in part.adapters}.values())

    @property
    def rows(self) -> int | None:
        """M; None: any number."""
        return None if self.parts[0].rows is None else sum(part.rows or 0 for part in self.parts)

    def counts(self, rows: int) -> bool:
        """Whether a module that is given so many rows is given all of them, or those that were
        kept."""
        return rows == self.rows or (self.kept is not None and rows == len(self.kept))

    def segments(self, rows: int) -> tuple[Segment, ...]:
        """The parts of what a module is given: all M rows, or, behind them, those that were kept.

        ConfigError: another number of rows, of which nobody could say whose they are.
        """
        if rows not in self._segments:
            starts = accumulate(self.rows_of_parts(rows), initial=0)
            found = zip(pairwise(starts), self.parts, strict=True)
            self._segments[rows] = tuple(
                Segment(slice(a, b), part.adapters) for (a, b), part in found if a < b
            )
        return self._segments[rows]

    def rows_of_parts(self, rows: int) -> tuple[int, ...]:
        """How many of the rows that a module gets belong to each part, 0 included. ConfigError as
        in `segments`."""
        if rows not in self._rows_of_parts:
            self._rows_of_parts[rows] = self._count_rows(rows)
        return self._rows_of_parts[rows]

    def _count_rows(self, rows: int) -> tuple[int, ...]:
        if self.rows is None or self.rows == rows:
            return tuple(rows if part.rows is None else part.rows for part in self.parts)
        if self.kept is not None and len(self.kept) == rows:
            return tuple(self._counted(self.kept))
        raise ConfigError(
            f"several adapters act, each on rows of its own: a module gets {rows} rows, the forward"
            f" has {self.rows}",
            next_step=(
                "Leave the modules that see other rows out (method.exclude), or let one adapter act"
                " on all rows."
            ),
        )

    def _counted(self, chosen: Tensor) -> list[int]:
        """How many of the chosen rows each part has."""
        ends = torch.tensor([part.rows for part in self.parts]).cumsum(0)
        before = torch.searchsorted(chosen.cpu(), ends)
        return before.diff(prepend=before.new_zeros(1)).tolist()

    def select(self, chosen: Tensor) -> "Acting":
        """Of these rows alone, (K) rising numbers: what a module gets that comes after a choice of
        rows."""
        keys = None if self.keys is None else self.keys.of(chosen)
        if self.whole is not None:
            return replace(self, keys=keys, kept=None)
        counts = zip(self._counted(chosen), self.parts, strict=True)
        return Acting(tuple(BatchPart(count, part.adapters) for count, part in counts), keys)

    def between(self, rows: slice) -> "Acting":
        """Of these rows alone, start and stop given."""
        keys = None if self.keys is None else self.keys.of(rows)
        if self.whole is not None:
            return replace(self, keys=keys, kept=None)
        chosen = torch.arange(rows.start, rows.stop)
        return replace(replace(self, keys=None).select(chosen), keys=keys)

    def padded(self, filler: int) -> "Acting":
        """The same with so many more rows behind them, which nobody reads: they go with the last
        part."""
        *before, last = self.parts
        return (
            self
            if last.rows is None
            else replace(self, parts=(*before, replace(last, rows=last.rows + filler)))
        )

    def keeping(self, rows: Tensor) -> "Acting":
        """The same, where the model hands on only these rows to its output head."""
        return replace(self, kept=rows)

    def drawing(self, keys: TokenKeys | None) -> "Acting":
        """The same with dropout drawn from these keys."""
        return replace(self, keys=keys)


def in_turn(rows: Sequence[tuple[int, Applied]]) -> Acting:
    """Parts that follow one another, neighbours with the same adapters as one; (rows, adapters)
    each."""
    parts = _joined(rows)
    return Acting.everywhere(parts[0].adapters) if len(parts) == 1 else Acting(parts)


def in_step(rows: Sequence[tuple[int, Applied]], before: UpdateCache | None = None) -> Acting:
    """The same for steps of answers, while nothing of it trains: a single part says its rows too,
    so that what it needs is prepared once, as for several. before: of earlier steps, whose adapters
    are not prepared anew."""
    return Acting(_joined(rows), plan=UpdateCache() if before is None else before.following())


def _joined(rows: Sequence[tuple[int, Applied]]) -> tuple[BatchPart, ...]:
    parts: list[BatchPart] = []
    for count, adapters in rows:
        if parts and parts[-1].adapters == adapters:
            parts[-1] = BatchPart((parts[-1].rows or 0) + count, adapters)
        else:
            parts.append(BatchPart(count, adapters))
    return tuple(parts)
