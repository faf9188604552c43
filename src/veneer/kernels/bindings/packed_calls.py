"""The calls into the kernels over packed weights (native/nf4_*.c, gguf.c, packed_rows.c).

Each function states the shapes that C takes for granted; arguments.py refuses everything else.
Shapes: M rows of x, I in_features, O out_features.
"""

import ctypes

from torch import Tensor

from veneer.kernels.bindings.arguments import (
    BYTES,
    FP32,
    INT32,
    CallError,
    at,
    call,
    is_power_of_two,
    number,
    numbers,
    pointers,
    type_number,
    whole,
)

MOST_PRODUCT_ROWS = 8
MOST_ROWS = 2**20
"""Of one call of the products that decode W."""
BLOCKS = {
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    8: (32, 34),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
}
"""ggml's number of a kind of block -> the values in one, and its bytes, as native/gguf/gguf.c has
them."""


# -- 4-bit weights: nf4_*.c
# ------------------------------------------------------------------------------------------


class NF4Weights(ctypes.Structure):
    """A checked weight, by address: whoever holds it holds the tensors too."""

    _fields_ = [
        *pointers("packed scales table nested_table nested_scales"),
        *numbers("count block nested_block"),
        ("offset", ctypes.c_float),
    ]


def nf4_weights(
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    *,
    count: int,
    block: int,
    nested: tuple[Tensor, Tensor, int, float] | None,
) -> NF4Weights:
    """nested: (table of 256, scales, block, offset)."""
    _block(block)
    blocks = -(-number(count) // block)
    found = NF4Weights(count=count, block=block, nested_block=1)
    found.packed, found.table = whole(packed, BYTES, (count + 1) // 2), whole(table, FP32, 16)
    found.scales = whole(scales, FP32 if nested is None else BYTES, blocks)
    if nested is not None:
        table_256, outer, nested_block, found.offset = nested
        if not is_power_of_two(number(nested_block, 1)):
            raise CallError(f"blocks of {nested_block} scales where C takes a power of two")
        found.nested_table, found.nested_block = whole(table_256, FP32, 256), nested_block
        found.nested_scales = whole(outer, FP32, -(-blocks // nested_block))
    return found


def _block(block: int) -> None:
    if not is_power_of_two(number(block, 32)):
        raise CallError(f"blocks of {block} where C takes a power of two")


def nf4_quantize(
    values: Tensor,
    limits: Tensor,
    codes: Tensor,
    block: int,
    packed: Tensor,
    absmax: Tensor,
    level: int,
) -> None:
    """values flat; limits (16) float32, ascending, codes (16) int32 -> packed (ceil(n / 2)), absmax
    (blocks)."""
    (count,) = values.shape
    _block(block)
    source, kind = at(values, values.dtype, count), type_number(values.dtype)
    book = at(limits, FP32, 16), at(codes, INT32, 16)
    made = at(packed, BYTES, (count + 1) // 2), at(absmax, FP32, -(-count // block))
    call("veneer_nf4_quantize", source, kind, count, block, *book, *made, number(level, -1, 4))


def nf4_dequantize(weights: NF4Weights, out: Tensor, *, start: int, level: int) -> None:
    """The elements from `start` on into out, of any shape."""
    count = out.numel()
    number(start, 0, weights.count - count)
    made, kind = whole(out, out.dtype, count), type_number(out.dtype)
    call(
        "veneer_nf4_dequantize",
        ctypes.byref(weights),
        start,
        count,
        made,
        kind,
        number(level, -1, 4),
    )


def nf4_product(weights: NF4Weights, x: Tensor, y: Tensor, *, start: int, level: int) -> None:
    """y (M, O) = x (M, I) W^T, W being O rows of I elements from `start` on; M from 1 to 8.
    MemoryError without room."""
    (rows, width), (_, outs) = x.shape, y.shape
    number(rows, 1, MOST_PRODUCT_ROWS)
    number(start, 0, weights.count - outs * number(width, 1))
    place = start, outs, width
    made, kind = at(y, x.dtype, rows, outs), type_number(x.dtype)
    source = at(x, x.dtype, rows, width)
    if call(
        "veneer_nf4_product",
        ctypes.byref(weights),
        *place,
        source,
        rows,
        made,
        kind,
        number(level, -1, 4),
    ):
        raise MemoryError("no memory for one row of a packed weight")


# -- blocks of .gguf files: gguf.c
# -----------------------------------------------------------------------------------


def gguf_dequantise(kind: int, blocks: Tensor, out: Tensor, level: int) -> None:
    """blocks uint8 (O, bytes of a row) -> out (O, I). kind: ggml's number."""
    rows, columns = out.shape
    source = at(blocks, BYTES, rows, _row_bytes(kind, columns))
    made, type_ = at(out, out.dtype, rows, columns), type_number(out.dtype)
    if call(
        "veneer_gguf_dequantise", kind, source, rows, columns, made, type_, number(level, -1, 3)
    ):
        raise CallError(f"C knows no blocks of kind {kind}")


def _row_bytes(kind: int, columns: int) -> int:
    if type(kind) is not int or kind not in BLOCKS:
        raise CallError(f"blocks of kind {kind!r} where C knows {', '.join(map(str, BLOCKS))}")
    values, size = BLOCKS[kind]
    if columns % values:
        raise CallError(f"{columns} columns where C takes blocks of {values}")
    return columns // values * size


# -- either, a few rows at a time: packed_rows.c
# --------------------------------------------------------------------


class _PackedRows(ctypes.Structure):
    _fields_ = [
        *pointers("x packed bias y"),
        *numbers("rows width outs start kind"),
        ("type", ctypes.c_int),
    ]
    kept: object


def nf4_rows(
    weights: NF4Weights, x: Tensor, y: Tensor, bias: Tensor | None, *, start: int, level: int
) -> None:
    """y (M, O) = x (M, I) W^T + bias, W being O rows of I elements from `start` on."""
    (_, width), (_, outs) = x.shape, y.shape
    number(start, 0, weights.count - outs * number(width, 1))
    _packed_rows(ctypes.addressof(weights), -1, x, y, bias, start, level, weights)


def gguf_rows(
    kind: int, blocks: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, level: int
) -> None:
    """The same with blocks uint8 (O, bytes of a row). kind: ggml's number."""
    source = at(blocks, BYTES, len(blocks), _row_bytes(kind, number(x.shape[1], 1)))
    if y.shape[1] != len(blocks):
        raise CallError(f"{len(blocks)} rows of blocks for {y.shape[1]} values")
    _packed_rows(source, kind, x, y, bias, 0, level, None)


def _packed_rows(
    packed: int,
    kind: int,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    start: int,
    level: int,
    kept: object,
) -> None:
    (rows, width), (_, outs), dtype = x.shape, y.shape, x.dtype
    if (type_ := type_number(dtype)) > 1:
        raise CallError(f"{dtype} where C takes float32 or bf16")
    number(rows, 1, MOST_ROWS), number(outs, 1)
    made, added = at(y, dtype, rows, outs), None if bias is None else at(bias, dtype, outs)
    one = _PackedRows(
        at(x, dtype, rows, width), packed, added, made, rows, width, outs, start, kind, type_
    )
    one.kept = kept
    if call("veneer_packed_rows", ctypes.byref(one), number(level, 0, 5)):
        raise MemoryError("no memory for some rows of a packed weight")
