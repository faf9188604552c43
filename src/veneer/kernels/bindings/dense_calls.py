"""The calls into the kernels over dense weights (native/dense/few_rows.c, updates.c, factors.c).

Each function states the shapes that C takes for granted; arguments.py refuses everything else.
Shapes: M rows of x, m of an update, I in_features, O out_features, R rank.
"""

import ctypes
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from veneer.kernels.bindings import pages
from veneer.kernels.bindings.arguments import (
    BF16,
    BYTES,
    FP32,
    CallError,
    at,
    call,
    number,
    numbers,
    pointers,
    reachable,
)

MOST_PARTS = 16
"""Weights that share one x: native/dense/few_rows.c and updates.c name it too."""
MOST_UPDATES = 2**14
"""Of one call: C makes room for them in each."""
BLOCK, LANES, HALF, STEP = 64, 16, 8, 16
"""Outs of B that lie side by side, ranks of A, fewer, and words that A's are filled up to:
native/dense/few_rows.h and factors.h name them too."""
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
    """parts: (W (O, I), bias (O) or None, y (M, O)) each, y = x (M, I) W^T + bias; all float32 or
    all bf16.

    x's rows may lie apart from one another; M from 1 to 2^20. level: the most instructions used (5
    tiles, 4 bf16 pairs, 3, 2, 0). MemoryError without room for x on tiles.
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
    one = _FewRows(
        source, ctypes.addressof(given), count, rows, width, x.stride(0), TYPE_NUMBERS[dtype]
    )
    one.kept = given
    if call("veneer_few_rows", ctypes.byref(one), number(level, 0, 5)):
        raise MemoryError(NO_ROOM)


def put_at(given: Any, y: Tensor) -> None:
    """What a call of one product is given may get another y, of as many rows."""
    part = given.kept[0]
    part.y = at(y, BF16 if given.type else FP32, given.rows, part.outs)


def _rows_of(x: Tensor) -> int:
    """Where they lie; one after another or apart, each whole."""
    number(x.shape[1], 1)
    _kind(x.dtype)
    if (x.stride(1) != 1 and x.shape[1] > 1) or not reachable(x):
        raise CallError(
            f"x on {x.device} with steps of {x.stride(1)} where C takes whole rows on the CPU"
        )
    if (address := x.data_ptr()) % x.dtype.itemsize:
        raise CallError("values at an odd address")
    return address


def _kind(dtype: torch.dtype) -> int:
    if dtype not in TYPE_NUMBERS:
        raise CallError(f"{dtype} where C takes float32 or bf16")
    return TYPE_NUMBERS[dtype]


# -- updates of some rows
# --------------------------------------------------------------------------------------------


class _Update(ctypes.Structure):
    _fields_ = [*pointers("A B"), *numbers("first rows rank turn"), ("scale", ctypes.c_float)]


def update_columns() -> int:
    """Words of 8 bytes that one update takes: its fields in their order, the scale in the last
    one's lower half."""
    fields = [getattr(_Update, name).offset for name, _ in _Update._fields_]  # type: ignore[misc]
    if fields != [8 * n for n in range(len(fields))] or sys.byteorder != "little":
        raise CallError("updates do not lie as C and dense/mixes.py take them to")
    return ctypes.sizeof(_Update) // 8


class _UpdatedPart(ctypes.Structure):
    _fields_ = [*pointers("w bias y updates"), *numbers("outs count")]


class _ProductWithUpdates(ctypes.Structure):
    _fields_ = [
        *pointers("x down parts"),
        *numbers("count rows width apart"),
        ("type", ctypes.c_int),
    ]
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
    """A (R, I) and B (O, R) of one type as C reads them (native/dense/factors.h): R even, filled up
    with zeros; ranks of A and outs of B side by side, word after word along I and R, a word two
    bf16 neighbours or one float. places: where they lie in `kept`."""

    dtype: torch.dtype
    rank: int
    width: int
    outs: int
    places: tuple[int, int]
    kept: Tensor


def laid_out(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[Factors]:
    """Of each A (R, I) and B (O, R), float32 or bf16, one behind the other in one piece of memory;
    as `dtype`."""
    size, room = 2 if _kind(dtype) else 4, 0
    sizes, given = [], []
    for A, B in pairs:
        A, B = A.detach().contiguous(), B.detach().contiguous()
        _kind(A.dtype)
        (rank, width), outs = A.shape, number(B.shape[0], 1)
        number(rank, 1, MOST_RANK), number(width, 1)
        given.append((A, at(A, A.dtype, rank, width), at(B, A.dtype, outs, rank), B))
        even, filled = rank + rank % 2, -(-outs // BLOCK) * BLOCK
        ranks = -(-even // LANES) * LANES - (HALF if 0 < even % LANES <= HALF else 0)
        to_A = room
        to_B = to_A + ranks * -(-width * size // (4 * STEP)) * 4 * STEP
        room = to_B + -(-even * filled * size // LINE) * LINE
        sizes.append((rank, width, outs, to_A, to_B))
    kept = pages.room(room)
    start = at(kept, BYTES, room, words=LINE)
    made = [
        _Factors(
            a, b, start + to_A, start + to_B, *dims, TYPE_NUMBERS[A.dtype], TYPE_NUMBERS[dtype]
        )
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
    """Of one layer, all of one type. Those that share a row take turns. key: of the layer, where it
    has one."""

    def __init__(self, given: Sequence[Given]) -> None:
        number(len(given), 1, MOST_UPDATES)
        first = given[0][1]
        self.dtype, self.width, self.outs = first.dtype, first.width, first.outs
        self.key: str | None = None
        self.rows = self.room = 0
        made = []
        for turn, (rows, factors, scale) in in_turns(given):
            if (factors.dtype, factors.width, factors.outs) != (self.dtype, self.width, self.outs):
                raise CallError(
                    f"factors of {factors.width} to {factors.outs} beside {self.width} to"
                    f" {self.outs}"
                )
            start, stop = number(rows.start), number(rows.stop, rows.start + 1)
            count = number(stop - start, 1, MOST_ROWS)
            made.append((*factors.places, start, count, factors.rank, turn, scale))
            self.rows, self.room = max(self.rows, stop), self.room + count * factors.rank
        self._kept: object
        self._count, listed = len(made), (_Update * len(made))(*[_Update(*each) for each in made])
        self.address, self._kept = (
            ctypes.addressof(listed),
            ([factors for _, factors, _ in given], listed),
        )

    @classmethod
    def listed(
        cls, key: str, dtype: torch.dtype, rows: int, listed: "UpdateRange", kept: object
    ) -> "Updates":
        """Makes the updates of one layer of `rows` rows from addresses (dense/mixes.py). kept: the
        objects whose memory `listed` points at."""
        made = cls.__new__(cls)
        made.key, made.dtype, made.rows, made._kept = key, dtype, rows, kept
        made.address, made._count, made.room, made.width, made.outs = listed
        return made

    def __len__(self) -> int:
        return self._count


class UpdateRange(NamedTuple):
    """Updates of one layer, one behind the other from `address` on; room: values of x A^T of all of
    them."""

    address: int
    updates: int
    room: int
    width: int
    outs: int


E = TypeVar("E", bound=tuple[Any, ...])


def in_turns(given: Sequence[E]) -> list[tuple[int, E]]:
    """Each with its turn, in which no two share a row; in the order of their turns. Of each the
    first is its rows."""
    turns: list[list[E]] = []
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
    """y (M, O) of each part = x (M, I) W^T + bias, or, without W, as it stands, of any M; plus the
    updates of its rows, of all parts together MOST_UPDATES at most."""
    (rows, width), dtype, count = x.shape, x.dtype, number(len(parts), 1, MOST_PARTS)
    most, room, given = 2**31, 0, []
    number(sum(len(updates or ()) for _, _, updates, _ in parts), 0, MOST_UPDATES)
    for weight, bias, updates, y in parts:
        outs, listed = number(y.shape[1], 1), None
        if updates:
            if (dtype, width, outs) != (
                updates.dtype,
                updates.width,
                updates.outs,
            ) or rows < updates.rows:
                wanted = f"updates of ({updates.rows}, {updates.width}) to {updates.outs}"
                raise CallError(
                    f"{wanted} where x is {tuple(x.shape)} {dtype} and y {tuple(y.shape)}"
                )
            listed, room = updates.address, room + updates.room
        most = most if weight is None else MOST_ROWS
        product = None if weight is None else at(weight, dtype, outs, width)
        added = None if weight is None or bias is None else at(bias, dtype, outs)
        given.append(
            _UpdatedPart(product, added, at(y, dtype, rows, outs), listed, outs, len(updates or ()))
        )
    number(rows, 1, most)
    # Read as words: torch's memory begins at a multiple of 64.
    down = torch.empty(rows, -(-room // rows), dtype=dtype) if room else None
    made = (_UpdatedPart * count)(*given)
    place = None if down is None else at(down, dtype, *down.shape)
    source, all_ = _rows_of(x), ctypes.addressof(made)
    one = _ProductWithUpdates(
        source, place, all_, count, rows, width, x.stride(0), TYPE_NUMBERS[dtype]
    )
    one.kept = made, [updates for _, _, updates, _ in parts]
    if call("veneer_few_rows_updated", ctypes.byref(one), number(level, 0, 5)):
        raise MemoryError(NO_ROOM)


def update_by(
    calls: Sequence[Any], listed: Mapping[str, UpdateRange], dtype: torch.dtype
) -> int | None:
    """Let calls of `few_rows_updated`, which are made again, add these updates to the layers that
    have a key, and none to those that are not listed. Returns the values that `down` needs room
    for; None: too many of one call, and none may be made before others are listed."""
    room = 0
    for one in calls:
        count, own, (parts, before) = 0, 0, one.kept
        if TYPE_NUMBERS.get(dtype) != one.type:
            raise CallError(f"updates of {dtype} where x is another type")
        for part, updates in zip(parts, before, strict=True):
            if updates is None or updates.key is None:
                continue
            part.updates, part.count, needed, width, outs = listed.get(updates.key, _NONE)
            if part.count and (width, outs) != (one.width, part.outs):
                raise CallError(
                    f"updates of {width} to {outs} where a layer is {one.width} to {part.outs}"
                )
            count, own = count + part.count, own + needed
        if count > MOST_UPDATES:
            return None
        room = max(room, own)
    return room


_NONE = UpdateRange(0, 0, 0, 0, 0)
