"""The calls into the kernels over dense weights (native/dense/few_rows.c, updates.c, factors.c).

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
from veneer.kernels.bindings.arguments import BF16, BYTES, FP32, CallError, at, is_narrow, number
from veneer.kernels.bindings.checks import Values
from veneer.kernels.bindings.declarations import declare, declare_structure, structure

MOST_PARTS = 16
"""Most weights of one call, all with the same x. Also in native/dense/few_rows.c."""
MOST_UPDATES = 2**14
"""Most updates of one call. Each call allocates memory for all of its updates."""
BLOCK, LANES, HALF, STEP = 64, 16, 8, 16
"""Layout of factors: B in groups of BLOCK outs, A in groups of LANES ranks, the last group of HALF
if that is enough; the words of a rank of A padded to a multiple of STEP. Also in
native/dense/few_rows.h and factors.h."""
LINE = 64
"""Bytes of a cache line: where factors begin."""
MOST_ROWS = 2**20
"""Most rows of x in one call of few_rows."""
MOST_PRODUCT_ROWS = 2**24
MOST_RANK = 2**16
NO_ROOM = "no memory for the rows of x that tiles multiply"
TYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1}


_SIZES = "width: 1..; apart; type = T: int32"
_PART = "w: W[outs, width]; bias: T[outs]?; y: T[rows, outs]; outs: 1..; narrow: flag"
_Part = structure("Part", _PART)


@declare_structure(_Part, f"{_PART}; check x: T[rows@apart, width]; body narrow")
def _part(x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor) -> Values:
    """Describes a product with x."""
    return {"narrow": is_narrow(x, w)}


@declare(
    "veneer_few_rows(*, level: int32 0..5)",
    f"""
    x: T[rows@apart, width]
    parts: pointer
    count
    rows: 1..{MOST_ROWS}
    {_SIZES}
    kept array: pointer
    body parts, array, count
    """,
    fails=MemoryError(NO_ROOM),
)
def few_rows(
    x: Tensor, parts: Sequence[tuple[Tensor, Tensor | None, Tensor]], level: int
) -> Values:
    """Computes y = x (M, I) W^T + bias for each part: (W (O, I), bias (O) or None, y (M, O)).

    All are float32, or all bf16, or W alone is bf16. Rows of x may have gaps between them; M from 1
    to 2^20. level: the newest instructions that are used: 5 AMX tiles, 4 bf16 pairs, 3 AVX-512,
    2 AVX2, 0 plain C.
    Raises MemoryError if there is no memory for the rows of x that tiles multiply.
    """
    array = (_Part * number(len(parts), 1, MOST_PARTS))(*[_part(x, *part) for part in parts])
    return {"parts": ctypes.addressof(array), "array": array, "count": len(array)}


def put_at(struct: Any, y: Tensor) -> None:
    """Replaces the y of a call with one product by another y of as many rows."""
    part = struct.kept[0]
    part.y = at(y, BF16 if struct.type else FP32, struct.rows, part.outs)


@declare(
    "veneer_product(*)",
    f"""
    x: bf16[rows, width]
    w: bf16{{outs * width}}
    bias: bf16[outs]?
    y: bf16[rows, outs]
    rows: 1..{MOST_PRODUCT_ROWS}
    width: 2.. % 2
    outs: 1..
    along, add: flag
    body w
    """,
    fails=CallError("no products of bf16 here"),
)
def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, *, along: bool, add: bool
) -> Values:
    """Computes y (M, O) = x (M, I) W^T + bias (O), W being (O, I); along: x W + bias, W being
    (I, O). add: adds this to y. All are bf16, I is even (native/dense/products.c). Raises CallError
    where the processor multiplies no bf16."""
    return _weight(x, weight, y, along)


@declare(
    "veneer_product_float(*)",
    f"""
    x: f32[rows@row, width]
    w: W{{outs * width}}
    bias: f32[outs]?
    y: f32[rows@apart, outs]
    rows: 1..{MOST_PRODUCT_ROWS}
    width, outs: 1..
    row, apart
    along, add, narrow: flag
    body w, narrow
    """,
    fails=CallError("no AVX2 here"),
)
def float_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, *, along: bool, add: bool
) -> Values:
    """Computes what `product` computes, in float32; W may be bf16. Rows of x and y may have gaps
    between them (native/dense/float_products.c). Raises CallError without AVX2."""
    return {**_weight(x, weight, y, along), "narrow": is_narrow(x, weight)}


def _weight(x: Tensor, weight: Tensor, y: Tensor, along: bool) -> Values:
    shape = y.shape[1], x.shape[1]
    if weight.shape != (shape[::-1] if along else shape):
        raise CallError(f"W is {list(weight.shape)} where C takes {list(shape)} or along")
    return {"w": weight}


# -- updates of some rows
# --------------------------------------------------------------------------------------------


_Update = structure("Update", "A, B: pointer; first, rows, rank, turn; scale: float")
_UPDATED_PART = """
    w: W[outs, width]?
    bias: T[outs]?
    y: T[rows, outs]
    updates: pointer
    outs: 1..
    count
    narrow: flag
    unread: unused*2
"""
UpdatedPart = structure("UpdatedPart", _UPDATED_PART)
_Factors = structure(
    "Factors", "A, B, to_A, to_B: pointer; rank, width, outs; from_type, to: int32"
)


def update_columns() -> int:
    """Returns the number of 8-byte words of an update: one for each field, in order. The scale is
    in the lower half of the last word."""
    fields = [getattr(_Update, name).offset for name, _ in _Update._fields_]
    if fields != [8 * n for n in range(len(fields))] or sys.byteorder != "little":
        raise CallError("the fields of an update are not where C and dense/mixes.py expect them")
    return ctypes.sizeof(_Update) // 8


@dataclass(frozen=True)
class Factors:
    """A (R, I) and B (O, R) of one type, in the layout that C reads (native/dense/factors.h). R is
    padded to an even number with zeros. A word is two bf16 neighbours, or one float. In A the same
    word of a group of ranks lies side by side, in B that of a group of outs.

    places: addresses of A and B, in the memory `kept`; of a stack those of its first matrices: B
    lies behind A, then come A and B of the next ones
    """

    dtype: torch.dtype
    rank: int
    width: int
    outs: int
    places: tuple[int, int]
    kept: Tensor


def laid_out(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[Factors]:
    """Copies each A (R, I) and B (O, R), or stack of them (E, R, I) and (E, O, R), float32 or bf16,
    into the layout of Factors, as `dtype`, all in one allocation."""
    size, memory_bytes = 2 if _type_number(dtype) else 4, 0
    matrices: list[tuple[Tensor, Tensor]] = []
    firsts, sizes, placed = [], [], []
    for pair in pairs:
        A, B = (factor.detach().contiguous() for factor in pair)
        firsts.append(len(matrices))
        matrices.extend(zip(A.unbind(), B.unbind(), strict=True) if A.dim() == 3 else [(A, B)])
    for A, B in matrices:
        (rank, width), outs = A.shape, number(B.shape[0], 1)
        number(rank, 1, MOST_RANK), number(width, 1)
        addresses = at(A, A.dtype, rank, width), at(B, A.dtype, outs, rank)
        even, filled = rank + rank % 2, -(-outs // BLOCK) * BLOCK
        ranks = -(-even // LANES) * LANES - (HALF if 0 < even % LANES <= HALF else 0)
        to_A = memory_bytes
        to_B = to_A + ranks * -(-width * size // (4 * STEP)) * 4 * STEP
        memory_bytes = to_B + -(-even * filled * size // LINE) * LINE
        sizes.append((even, width, outs))
        placed.append((*addresses, to_A, to_B, rank, width, outs, _type_number(A.dtype)))
    memory = pages.allocate(memory_bytes)
    start = at(memory, BYTES, memory_bytes, words=LINE)
    array = (_Factors * len(placed))(
        *[
            (a, b, start + to_A, start + to_B, *rest, _type_number(dtype))
            for a, b, to_A, to_B, *rest in placed
        ]
    )
    _lay_out(array, len(array))
    return [
        Factors(dtype, *sizes[first], (array[first].to_A, array[first].to_B), memory)
        for first in firsts
    ]


def _type_number(dtype: torch.dtype) -> int:
    if dtype not in TYPE_NUMBERS:
        raise CallError(f"{dtype} where C takes float32 or bf16")
    return TYPE_NUMBERS[dtype]


@declare("veneer_lay_out_factors(array: pointer, count)")
def _lay_out(array: Any, count: int) -> None:
    """array: `count` of _Factors."""


Update = tuple[slice, Factors, float]
"""(rows with 0 <= start < stop, factors, scale)."""


class Updates:
    """The updates of one layer, all of one type. Updates that share a row are added one after the
    other, in turns. key: the key of the layer, or None."""

    def __init__(self, updates: Sequence[Update]) -> None:
        number(len(updates), 1, MOST_UPDATES)
        first = updates[0][1]
        self.dtype, self.width, self.outs = first.dtype, first.width, first.outs
        self.key: str | None = None
        self.rows = self.room = 0
        fields = []
        for turn, (rows, factors, scale) in in_turns(updates):
            if (factors.dtype, factors.width, factors.outs) != (self.dtype, self.width, self.outs):
                raise CallError(
                    f"factors of {factors.width} to {factors.outs} beside {self.width} to"
                    f" {self.outs}"
                )
            start, stop = number(rows.start), number(rows.stop, rows.start + 1)
            count = number(stop - start, 1, MOST_ROWS)
            fields.append((*factors.places, start, count, factors.rank, turn, scale))
            self.rows, self.room = max(self.rows, stop), self.room + count * factors.rank
        array = (_Update * len(fields))(*fields)
        self.address, self._count = ctypes.addressof(array), len(fields)
        self._kept: object = [factors for _, factors, _ in updates], array

    @classmethod
    def listed(
        cls, key: str, dtype: torch.dtype, rows: int, listed: "UpdateRange", kept: object
    ) -> "Updates":
        """Makes the updates of one layer of `rows` rows from addresses (dense/mixes.py). kept: the
        objects whose memory `listed` points at."""
        updates = cls.__new__(cls)
        updates.key, updates.dtype, updates.rows, updates._kept = key, dtype, rows, kept
        updates.address, updates._count, updates.room, updates.width, updates.outs = listed
        return updates

    def __len__(self) -> int:
        return self._count


class UpdateRange(NamedTuple):
    """Updates of one layer, one after the other in memory from `address` on. room: number of values
    of x A^T of all these updates."""

    address: int
    updates: int
    room: int
    width: int
    outs: int


E = TypeVar("E", bound=tuple[Any, ...])


def in_turns(updates: Sequence[E]) -> list[tuple[int, E]]:
    """Returns (turn, update) for each update, in the order of turns. No two updates of a turn share
    a row. The first value of an update is its rows."""
    turns: list[list[E]] = []
    for update in sorted(updates, key=lambda update: update[0].start):
        for turn in turns:
            if turn[-1][0].stop <= update[0].start:
                turn.append(update)
                break
        else:
            turns.append([update])
    return [(number, update) for number, turn in enumerate(turns) for update in turn]


Part = tuple[Tensor | None, Tensor | None, Updates | None, Tensor]
"""(W (O, I) or None, bias (O) or None, updates of rows of y or None, y (M, O))."""


@declare_structure(
    UpdatedPart, f"{_UPDATED_PART} check x: T[rows@apart, width]; body updates, bias, count, narrow"
)
def _updated_part(
    x: Tensor, w: Tensor | None, bias: Tensor | None, updates: Updates | None, y: Tensor
) -> Values:
    """Checks a part: a product with x if there is a weight, and updates of rows of y."""
    if updates and (
        (x.dtype, x.shape[1], y.shape[1]) != (updates.dtype, updates.width, updates.outs)
        or len(x) < updates.rows
    ):
        wanted = f"updates of ({updates.rows}, {updates.width}) to {updates.outs}"
        raise CallError(f"{wanted} where x is {tuple(x.shape)} {x.dtype} and y {tuple(y.shape)}")
    return {
        "updates": updates.address if updates else None,
        "bias": None if w is None else bias,
        "count": len(updates or ()),
        "narrow": w is not None and is_narrow(x, w),
    }


@declare(
    "veneer_few_rows_updated(*, level: int32 0..5)",
    f"""
    x: T[rows@apart, width]
    down: T[down_rows, down_width]?
    parts: pointer
    count
    rows: 1..most_rows
    {_SIZES}
    body down, parts, arrays, count, most_rows
    kept arrays: pointer
    """,
    fails=MemoryError(NO_ROOM),
)
def few_rows_updated(x: Tensor, parts: Sequence[Part], level: int) -> Values:
    """Computes y (M, O) = x (M, I) W^T + bias for each part with a weight, then adds the updates to
    rows of y. Without a weight y keeps its values, and M may be any number. All parts together have
    at most MOST_UPDATES updates."""
    updates = [part[2] for part in parts]
    number(sum(len(layer_updates or ()) for layer_updates in updates), 0, MOST_UPDATES)
    fields = [_updated_part(x, *part) for part in parts]
    array = (UpdatedPart * number(len(fields), 1, MOST_PARTS))(*fields)
    room = sum(layer_updates.room for layer_updates in updates if layer_updates)
    has_weight = any(weight is not None for weight, *_ in parts)
    return {
        # Read as words: torch's memory begins at a multiple of 64.
        "down": torch.empty(len(x), -(-room // len(x)), dtype=x.dtype) if room else None,
        "parts": ctypes.addressof(array),
        "arrays": (array, updates),
        "count": len(array),
        "most_rows": MOST_ROWS if has_weight else 2**31,
    }


def update_by(
    calls: Sequence[Any], listed: Mapping[str, UpdateRange], dtype: torch.dtype
) -> int | None:
    """Replaces the updates in recorded calls of `few_rows_updated`, for layers that have a key.
    Layers that are not listed get none. Returns the number of values that `down` must hold. Returns
    None if a call has too many updates; then no call may be made before its updates are
    replaced."""
    room = 0
    for call in calls:
        count, needed, (parts, before) = 0, 0, call.kept[:2]
        if TYPE_NUMBERS.get(dtype) != call.type:
            raise CallError(f"updates of {dtype} where x is another type")
        for part, updates in zip(parts, before, strict=True):
            if updates is None or updates.key is None:
                continue
            part.updates, part.count, values, width, outs = listed.get(updates.key, _NONE)
            if part.count and (width, outs) != (call.width, part.outs):
                raise CallError(
                    f"updates of {width} to {outs} where a layer is {call.width} to {part.outs}"
                )
            count, needed = count + part.count, needed + values
        if count > MOST_UPDATES:
            return None
        room = max(room, needed)
    return room


_NONE = UpdateRange(0, 0, 0, 0, 0)
