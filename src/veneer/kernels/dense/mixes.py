"""Lists the updates of a mix of adapters, for all layers at once, from one table per adapter.

    FactorTable  an adapter's factors, layer by layer, as C reads them; made once per adapter
    AdapterMix   which tables act on which rows; lists the updates of all layers in a few operations

What a step computes differs from mix to mix in these lists alone, so calls that were noted are made
again with others (execution/recorded.py). A mix holds its tables: what its lists point at stays for
as long as it does. Shapes: P layers, U tables that act.
"""

from collections.abc import Mapping, Sequence, Set
from functools import cached_property

import torch
from torch import Tensor

from veneer.kernels.bindings.arguments import CallError, number
from veneer.kernels.bindings.dense_calls import (
    MOST_ROWS,
    MOST_UPDATES,
    Factors,
    UpdateRange,
    Updates,
    in_turns,
    update_columns,
)

_A, _B, _FIRST, _ROWS, _RANK, _TURN, _SCALE = range(7)
"""Columns of an update."""
WORDS = update_columns()


class FactorTable:
    """The factors of an adapter by layer key, all of one type, with the scaling of each update."""

    def __init__(self, factors: Mapping[str, Factors], scalings: Sequence[float]) -> None:
        self.keys, self.factors = tuple(factors), list(factors.values())
        self.dtype = self.factors[0].dtype
        if len(scalings) != len(self.factors) or any(
            factors.dtype is not self.dtype for factors in self.factors
        ):
            raise CallError("a table needs factors of one type, and a scaling for each")
        rows = [(*f.places, 0, 0, f.rank, 0, 0, f.width, f.outs) for f in self.factors]
        self._words = torch.tensor(rows, dtype=torch.int64)
        self._scalings = torch.tensor(scalings, dtype=torch.float64)
        self._spread: tuple[tuple[str, ...], tuple[Tensor, Tensor]] = (
            self.keys,
            (self._words, self._scalings),
        )

    @property
    def bytes(self) -> int:
        """Returns the bytes of the memory that holds the factors."""
        return sum(
            {id(f.kept): f.kept.numel() * f.kept.element_size() for f in self.factors}.values()
        )

    def spread(self, keys: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Columns (P, words) and scalings (P) of these layers, zeros for layers without factors."""
        if self._spread[0] != keys:
            at = {key: number for number, key in enumerate(keys)}
            places = torch.tensor([at[key] for key in self.keys])
            words = torch.zeros(len(keys), self._words.shape[1], dtype=torch.int64).index_copy_(
                0, places, self._words
            )
            scalings = torch.zeros(len(keys), dtype=torch.float64).index_copy_(
                0, places, self._scalings
            )
            self._spread = keys, (words, scalings)
        return self._spread[1]


MixEntry = tuple[slice, FactorTable, float]
"""Rows, the table that acts on them, and its weight."""


class AdapterMix:
    """The tables that act on a step's rows.

    dtype   type of all tables
    others  keys of layers at which the adapters do not only add updates

    Entries on the same rows are applied in order.
    """

    def __init__(
        self, entries: Sequence[MixEntry], dtype: torch.dtype, others: Set[str] = frozenset()
    ) -> None:
        self.dtype, self.others = dtype, others
        self._entries = in_turns(entries)
        self.rows = max((number(rows.stop, 1, MOST_ROWS) for rows, _, _ in entries), default=0)
        if any(table.dtype is not dtype for _, table, _ in entries):
            raise CallError(f"a table of another type than {dtype}")
        if any(not 0 <= rows.start < rows.stop for rows, _, _ in entries):
            raise CallError("updates of no rows")
        self._kept: Tensor | None = None

    @cached_property
    def keys(self) -> frozenset[str]:
        """Returns the keys of all layers that the mix changes."""
        return frozenset(self.listed).union(self.others)

    @cached_property
    def listed(self) -> dict[str, UpdateRange]:
        """Returns the updates of each layer that has any."""
        if not self._entries:
            return {}
        tables = [table for _, (_, table, _) in self._entries]
        keys = tables[0].keys
        if any(table.keys != keys for table in tables[1:]):
            keys = tuple(dict.fromkeys(key for table in tables for key in table.keys))
        spread = [table.spread(keys) for table in tables]
        words = torch.stack([columns for columns, _ in spread], 1)  # (P, U, words)
        scalings = torch.stack([scaling for _, scaling in spread], 1)
        words[:, :, _FIRST] = torch.tensor([rows.start for _, (rows, _, _) in self._entries])
        words[:, :, _ROWS] = counts = torch.tensor(
            [rows.stop - rows.start for _, (rows, _, _) in self._entries]
        )
        words[:, :, _TURN] = torch.tensor([turn for turn, _ in self._entries])
        weights = torch.tensor([weight for _, (_, _, weight) in self._entries], dtype=torch.float64)
        words[:, :, _SCALE] = (
            (scalings * weights).float().view(torch.int32).long()
        )  # the float lies in the lower half
        present, sizes = words[:, :, _RANK] > 0, words[:, :, WORDS:]
        most = sizes.amax(1)
        if bool(((sizes != most[:, None]).any(2) & present).any()):
            raise CallError("adapters for layers of different sizes")
        self._kept = words[present][:, :WORDS].contiguous()
        counts_of, room = present.sum(1), (words[:, :, _RANK] * counts).sum(1)
        first = (counts_of.cumsum(0) - counts_of) * (8 * WORDS) + self._kept.data_ptr()
        columns = torch.stack([first, counts_of, room, *most.unbind(1)], 1).tolist()
        return {key: UpdateRange(*row) for key, row in zip(keys, columns, strict=True)}

    def at(self, key: str, dtype: torch.dtype) -> Updates | None:
        """Returns the updates of one layer for x of this type, possibly none. Returns None if the
        adapters do more there, for another type, or for more updates than a call takes."""
        listed = self.listed.get(key, _NOTHING)
        if key in self.others or dtype is not self.dtype or listed.updates > MOST_UPDATES:
            return None
        return Updates.listed(key, dtype, self.rows, listed, self)


_NOTHING = UpdateRange(0, 0, 0, 0, 0)
