"""The calls into the kernels over dense weights (native/few_rows.c, updates.c, factors.c).

Each function states the shapes that C takes for granted; arguments.py refuses everything else.
Shapes: M rows of x, m of an update, I in_features, O out_features, R rank.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.kernels import pages
from veneer.kernels.arguments import BYTES, CallError, at, call, number, numbers, pointers, reachable, whole

MOST_PARTS = 16
"""Weights that share one x."""
MOST_UPDATES = 128
"""Of one layer: native/few_rows.c and updates.c name these numbers."""
BLOCK = 64
"""Outs of B that lie side by side; native/few_rows.h names it too."""
LINE = 64
"""Bytes of a cache line: where factors begin."""
MOST_ROWS = 2**20
"""Of one call."""
MOST_RANK = 2**16
NO_ROOM = "no memory for the rows of x that tiles multiply"
TYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1}


class _Part(ctypes.Structure):
    _fields_ = [*pointers("w bias y"), *numbers("outs")]


class _FewRows(ctypes.Structure):
    _fields_ = [*pointers("x parts"), *numbers("count rows width apart"), ("type", ctypes.c_int)]
    kept: object
    """What its pointers point at."""


_ARRAYS = {count: _Part * count for count in range(1, MOST_PARTS + 1)}


def few_rows(x: Tensor, parts: Sequence[tuple[Tensor, Tensor | None, Tensor]], level: int) -> None:
    """parts: (W (O, I), bias (O) or None, y (M, O)) each, y = x (M, I) W^T + bias; all float32 or all bf16.

    x's rows may lie apart from one another; M from 1 to 2^20. level: the most instructions used (5 tiles, 4 bf16
    pairs, 3, 2, 0). MemoryError without room for x on tiles.
    """
    (rows, width), dtype, count = x.shape, x.dtype, number(len(parts), 1, MOST_PARTS)
    number(rows, 1, MOST_ROWS)
    source = _rows_of(x)
    given = _ARRAYS[count](
        *[
            _Part(
                at(weight, dtype, number(len(weight), 1), width),
                None if bias is None else at(bias, dtype, len(weight)),
                at(y, dtype, rows, len(weight)),
                len(weight),
            )
            for weight, bias, y in parts
        ]
    )
    one = _FewRows(source, ctypes.addressof(given), count, rows, width, x.stride(0), TYPE_NUMBERS[dtype])
    one.kept = given
    if call("veneer_few_rows", ctypes.byref(one), number(level, 0, 5)):
        raise MemoryError(NO_ROOM)


def _rows_of(x: Tensor) -> int:
    """Where they lie; one after another or apart, each whole."""
    number(x.shape[1], 1)
    _kind(x.dtype)
    if (x.stride(1) != 1 and x.shape[1] > 1) or not reachable(x):
        raise CallError(f"x on {x.device} with steps of {x.stride(1)} where C takes whole rows on the CPU")
    if (address := x.data_ptr()) % x.dtype.itemsize:
        raise CallError("values at an odd address")
    return address


def _kind(dtype: torch.dtype) -> int:
    if dtype not in TYPE_NUMBERS:
        raise CallError(f"{dtype} where C takes float32 or bf16")
    return TYPE_NUMBERS[dtype]


# -- updates of some rows --------------------------------------------------------------------------------------------


class _Update(ctypes.Structure):
    _fields_ = [*pointers("A B"), *numbers("first rows rank turn"), ("scale", ctypes.c_float)]


class _UpdatedPart(ctypes.Structure):
    _fields_ = [*pointers("w bias y updates"), *numbers("outs count")]


class _Updated(ctypes.Structure):
    _fields_ = [*pointers("x down parts"), *numbers("count rows width apart"), ("type", ctypes.c_int)]
    kept: object


class _Factors(ctypes.Structure):
    _fields_ = [
        *pointers("A B to_A to_B"),
        *numbers("rank width outs"),
        ("from_type", ctypes.c_int),
        ("to", ctypes.c_int),
    ]


@dataclass(frozen=True)
class Factors:
    """A (R, I) and B (O, R) of one type as C reads them: R even, filled up with zeros; of B BLOCK outs side by side,
    word after word along R, a word two bf16 neighbours or one float. places: where they lie in `kept`."""

    dtype: torch.dtype
    rank: int
    width: int
    outs: int
    places: tuple[int, int]
    kept: Tensor


def laid_out(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[Factors]:
    """Of each A (R, I) and B (O, R), float32 or bf16, one behind the other in one piece of memory; as `dtype`."""
    size, room = 2 if _kind(dtype) else 4, 0
    sizes, given = [], []
    for A, B in pairs:
        A, B = A.detach().contiguous(), B.detach().contiguous()
        _kind(A.dtype)
        (rank, width), outs = A.shape, number(B.shape[0], 1)
        number(rank, 1, MOST_RANK), number(width, 1)
        given.append((A, at(A, A.dtype, rank, width), at(B, A.dtype, outs, rank), B))
        even, filled = rank + rank % 2, -(-outs // BLOCK) * BLOCK
        to_A = room
        to_B = to_A + -(-even * width * size // LINE) * LINE
        room = to_B + -(-even * filled * size // LINE) * LINE
        sizes.append((rank, width, outs, to_A, to_B))
    kept = pages.room(room)
    start = at(kept, BYTES, room, words=LINE)
    made = [
        _Factors(a, b, start + to_A, start + to_B, *dims, TYPE_NUMBERS[A.dtype], TYPE_NUMBERS[dtype])
        for (A, a, b, _), (*dims, to_A, to_B) in zip(given, sizes, strict=True)
    ]
    call("veneer_lay_out_factors", (_Factors * len(made))(*made), len(made))
    return [
        Factors(dtype, rank + rank % 2, width, outs, (start + to_A, start + to_B), kept)
        for rank, width, outs, to_A, to_B in sizes
    ]


Given = tuple[slice, Factors, float]
"""Which rows, 0 <= start < stop, what with, and its scale."""


class Updates:
    """Of one layer, all of one type. Those that share a row take turns."""

    def __init__(self, given: Sequence[Given]) -> None:
        number(len(given), 1, MOST_UPDATES)
        first = given[0][1]
        self.dtype, self.width, self.outs = first.dtype, first.width, first.outs
        self.factors = [factors for _, factors, _ in given]
        self.rows = self.room = 0
        made = []
        for turn, (rows, factors, scale) in _in_turns(given):
            if (factors.dtype, factors.width, factors.outs) != (self.dtype, self.width, self.outs):
                raise CallError(f"factors of {factors.width} to {factors.outs} beside {self.width} to {self.outs}")
            start, stop = number(rows.start), number(rows.stop, rows.start + 1)
            count = number(stop - start, 1, MOST_ROWS)
            made.append((*factors.places, start, count, factors.rank, turn, scale))
            self.rows, self.room = max(self.rows, stop), self.room + count * factors.rank
        self._given = (_Update * len(made))(*[_Update(*each) for each in made])

    def __len__(self) -> int:
        return len(self._given)

    @property
    def address(self) -> int:
        return ctypes.addressof(self._given)


def _in_turns(given: Sequence[Given]) -> list[tuple[int, Given]]:
    """Each with its turn, in which no two share a row; in the order of their turns."""
    turns: list[list[Given]] = []
    for update in sorted(given, key=lambda each: each[0].start):
        for turn in turns:
            if turn[-1][0].stop <= update[0].start:
                turn.append(update)
                break
        else:
            turns.append([update])
    return [(number, update) for number, turn in enumerate(turns) for update in turn]


Part = tuple[Tensor | None, Tensor | None, Updates | None, Tensor]
"""W (O, I) or None, bias (O) or None, updates of its rows, y (M, O)."""


def few_rows_updated(x: Tensor, parts: Sequence[Part], level: int) -> None:
    """y (M, O) of each part = x (M, I) W^T + bias, or, without W, as it stands, of any M; plus the updates of its rows,
    of all parts together MOST_UPDATES at most."""
    (rows, width), dtype, count = x.shape, x.dtype, number(len(parts), 1, MOST_PARTS)
    most, room, given = 2**31, 0, []
    number(sum(len(updates or ()) for _, _, updates, _ in parts), 1, MOST_UPDATES)
    for weight, bias, updates, y in parts:
        outs, listed = number(y.shape[1], 1), None
        if updates is not None:
            if (dtype, width, outs) != (updates.dtype, updates.width, updates.outs) or rows < updates.rows:
                wanted = f"updates of ({updates.rows}, {updates.width}) to {updates.outs}"
                raise CallError(f"{wanted} where x is {tuple(x.shape)} {dtype} and y {tuple(y.shape)}")
            listed, room = updates.address, room + updates.room
        most = most if weight is None else MOST_ROWS
        product = None if weight is None else at(weight, dtype, outs, width)
        added = None if weight is None or bias is None else at(bias, dtype, outs)
        given.append(_UpdatedPart(product, added, at(y, dtype, rows, outs), listed, outs, len(updates or ())))
    number(rows, 1, most)
    down = torch.empty(room, dtype=dtype)  # read as words: torch's memory begins at a multiple of 64
    made = (_UpdatedPart * count)(*given)
    source, place, all_ = _rows_of(x), whole(down, dtype, room), ctypes.addressof(made)
    one = _Updated(source, place, all_, count, rows, width, x.stride(0), TYPE_NUMBERS[dtype])
    one.kept = made, [updates for _, _, updates, _ in parts]
    if call("veneer_few_rows_updated", ctypes.byref(one), number(level, 0, 5)):
        raise MemoryError(NO_ROOM)
