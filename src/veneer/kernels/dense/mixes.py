"""The updates of a mix of adapters: of all layers at once, out of a table for each adapter.

    Table    an adapter's factors, layer by layer, as C reads them: made once, where it stays
    Mix      which tables act on which rows; lists the updates of every layer in a few operations on
             all of them

What a step computes differs from mix to mix in these lists alone, so calls that were noted are made
again with others (decoding/recorded.py). A mix holds its tables: what its lists point at stays for
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
    Listed,
    Updates,
    in_turns,
    update_columns,
)

_A, _B, _FIRST, _ROWS, _RANK, _TURN, _SCALE = range(7)
"""Words of an update."""
WORDS = update_columns()


class FactorTable:
    """factors: by the key of their layer, all of one type; scalings: what each update is multiplied
    with."""

    def __init__(self, factors: Mapping[str, Factors], scalings: Sequence[float]) -> None:
        self.keys, self.factors = tuple(factors), list(factors.values())
        self.dtype = self.factors[0].dtype
        if len(scalings) != len(self.factors) or any(
            each.dtype is not self.dtype for each in self.factors
        ):
            raise CallError(
                "factors of one type, and a scaling for each, are what a table is made of"
            )
        each = [(*f.places, 0, 0, f.rank, 0, 0, f.width, f.outs) for f in self.factors]
        self._words = torch.tensor(each, dtype=torch.int64)
        self._scalings = torch.tensor(scalings, dtype=torch.float64)
        self._spread: tuple[tuple[str, ...], tuple[Tensor, Tensor]] = (
            self.keys,
            (self._words, self._scalings),
        )

    @property
    def bytes(self) -> int:
        """Of the memory that the factors lie in."""
        return sum(
            {id(f.kept): f.kept.numel() * f.kept.element_size() for f in self.factors}.values()
        )

    def spread(self, keys: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """(P, words) and (P) of these layers; zeros where it has nothing."""
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
"""Rows, what acts there, and its weight."""


class AdapterMix:
    """dtype: of all tables. others: keys of layers at which what acts does something else too, or
    instead.

    Entries on the same rows take turns in their order.
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
        """Of all layers that it changes."""
        return frozenset(self.listed).union(self.others)

    @cached_property
    def listed(self) -> dict[str, Listed]:
        """The updates of each layer that has some."""
        if not self._entries:
            return {}
        tables = [table for _, (_, table, _) in self._entries]
        keys = tables[0].keys
        if any(table.keys != keys for table in tables[1:]):
            keys = tuple(dict.fromkeys(key for table in tables for key in table.keys))
        spread = [table.spread(keys) for table in tables]
        words = torch.stack([each for each, _ in spread], 1)  # (P, U, words)
        scalings = torch.stack([each for _, each in spread], 1)
        words[:, :, _FIRST] = torch.tensor([rows.start for _, (rows, _, _) in self._entries])
        words[:, :, _ROWS] = counts = torch.tensor(
            [rows.stop - rows.start for _, (rows, _, _) in self._entries]
        )
        words[:, :, _TURN] = torch.tensor([turn for turn, _ in self._entries])
        weights = torch.tensor([weight for _, (_, _, weight) in self._entries], dtype=torch.float64)
        words[:, :, _SCALE] = (
            (scalings * weights).float().view(torch.int32).long()
        )  # the float lies in the lower half
        there, sizes = words[:, :, _RANK] > 0, words[:, :, WORDS:]
        most = sizes.amax(1)
        if bool(((sizes != most[:, None]).any(2) & there).any()):
            raise CallError("adapters for layers of different sizes")
        self._kept = words[there][:, :WORDS].contiguous()
        number_of, room = there.sum(1), (words[:, :, _RANK] * counts).sum(1)
        first = (number_of.cumsum(0) - number_of) * (8 * WORDS) + self._kept.data_ptr()
        columns = torch.stack([first, number_of, room, *most.unbind(1)], 1).tolist()
        return {key: Listed(*each) for key, each in zip(keys, columns, strict=True)}

    def at(self, key: str, dtype: torch.dtype) -> Updates | None:
        """Of one layer, of x of this type; none of them, where it has none. None: there is more to
        do there, or another type, or more than a call takes."""
        found = self.listed.get(key, _NOTHING)
        if key in self.others or dtype is not self.dtype or found.updates > MOST_UPDATES:
            return None
        return Updates.listed(key, dtype, self.rows, found, self)


_NOTHING = Listed(0, 0, 0, 0, 0)
