"""The calls into the kernels over packed weights (native/nf4_*.c, gguf.c, packed_rows.c).

Shapes: M rows of x, I in_features, O out_features.
"""

import ctypes
from typing import Any

from torch import Tensor

from veneer.kernels.bindings.arguments import BYTES, FP32, CallError, at, number
from veneer.kernels.bindings.checks import Values
from veneer.kernels.bindings.declarations import declare, declare_structure, structure

MOST_PRODUCT_ROWS = 8
MOST_ROWS = 2**20
"""Most rows in one call of the products that decode W."""
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
"""ggml's number of a kind of block -> (values, bytes) of a block. Also in native/gguf/gguf.c."""


_NF4 = """
    packed: u8{(count + 1) // 2}
    scales: S{blocks}
    table: f32{16}
    nested_table: f32{256}?
    nested_scales: f32{(blocks + nested_block - 1) // nested_block}?
    count, block, nested_block
    offset: float
    body nested_table, nested_scales, nested_block, offset, blocks
"""
NF4Weights = structure("NF4Weights", _NF4)
"""A checked weight. It holds addresses, so its owner must keep the tensors."""


@declare_structure(NF4Weights, _NF4)
def nf4_weights(
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    *,
    count: int,
    block: int,
    nested: tuple[Tensor, Tensor, int, float] | None,
) -> Values:
    """Checks a weight. nested: (table of 256, scales, block, offset) of scales that are bytes."""
    _check_power_of_two(block, 32)
    if scales.dtype is not (FP32 if nested is None else BYTES):
        raise CallError(f"scales are {scales.dtype}")
    nested_table, nested_scales, nested_block, offset = nested or (None, None, 1, 0.0)
    _check_power_of_two(nested_block, 1)
    return {
        "nested_table": nested_table,
        "nested_scales": nested_scales,
        "nested_block": nested_block,
        "offset": offset,
        "blocks": -(-number(count) // block),
    }


def _check_power_of_two(block: int, least: int) -> None:
    if number(block, least) & (block - 1):
        raise CallError(f"blocks of {block} where C takes a power of two")


@declare(
    "veneer_nf4_quantize(values: V[count], V, count, block, limits: f32[16], codes: i32[16],"
    " packed: u8[(count + 1) // 2], absmax: f32[(count + block - 1) // block],"
    " level: int32 -1..4)"
)
def nf4_quantize(
    values: Tensor,
    limits: Tensor,
    codes: Tensor,
    block: int,
    packed: Tensor,
    absmax: Tensor,
    level: int,
) -> None:
    """Quantizes values (n) to packed (ceil(n / 2)) and absmax (blocks). limits (16) float32,
    ascending; codes (16) int32."""
    _check_power_of_two(block, 32)


@declare(
    "veneer_nf4_dequantize(weights: pointer, start: 0..stored - count, count, out: V{count}, V,"
    " level: int32 -1..4)",
    "body stored, weights",
)
def nf4_dequantize(weights: Any, out: Tensor, *, start: int, level: int) -> Values:
    """Decodes the elements from `start` on into out, which has any shape."""
    return {"stored": weights.count, "weights": ctypes.byref(weights)}


@declare(
    "veneer_nf4_product(weights: pointer, start: 0..stored - outs * width, outs, width: 1..,"
    f" x: V[rows, width], rows: 1..{MOST_PRODUCT_ROWS}, bias: V[outs]?,"
    " y: V[rows, outs], V, level: int32 -1..4)",
    "body stored, weights",
    fails=MemoryError("no memory for one row of a packed weight"),
)
def nf4_product(
    weights: Any, x: Tensor, y: Tensor, bias: Tensor | None, *, start: int, level: int
) -> Values:
    """Computes y (M, O) = x (M, I) W^T + bias, W being O rows of I elements from `start`
    on; M is 1 to 8."""
    return {"stored": weights.count, "weights": ctypes.byref(weights)}


@declare(
    "veneer_gguf_dequantise(kind: int32, blocks: u8[rows, row_bytes], rows, columns,"
    " out: V[rows, columns], V, level: int32 -1..3)",
    "body row_bytes",
    fails=CallError("C does not know blocks of this kind"),
)
def gguf_dequantise(kind: int, blocks: Tensor, out: Tensor, level: int) -> Values:
    """Decodes blocks, uint8 (O, bytes of a row), into out (O, I). kind: ggml's number."""
    return {"row_bytes": _row_bytes(kind, out.shape[1])}


def _row_bytes(kind: int, columns: int) -> int:
    if type(kind) is not int or kind not in BLOCKS:
        raise CallError(f"blocks of kind {kind!r} where C knows {', '.join(map(str, BLOCKS))}")
    values, size = BLOCKS[kind]
    if columns % values:
        raise CallError(f"{columns} columns where C takes blocks of {values}")
    return columns // values * size


def nf4_rows(
    weights: Any, x: Tensor, y: Tensor, bias: Tensor | None, *, start: int, level: int
) -> None:
    """Computes y (M, O) = x (M, I) W^T + bias, W being O rows of I elements from `start` on."""
    number(start, 0, weights.count - y.shape[1] * number(x.shape[1], 1))
    _packed_rows(ctypes.addressof(weights), -1, x, y, bias, start, level, weights)


def gguf_rows(
    kind: int, blocks: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, level: int
) -> None:
    """Computes y = x W^T + bias, W being blocks, uint8 (O, bytes of a row). kind: ggml's number."""
    at(blocks, BYTES, y.shape[1], _row_bytes(kind, x.shape[1]))
    _packed_rows(blocks.data_ptr(), kind, x, y, bias, 0, level, None)


@declare(
    "veneer_packed_rows(*, level: int32 0..5)",
    f"""
    x: T[rows, width]
    packed: pointer
    bias: T[outs]?
    y: T[rows, outs]
    rows: 1..{MOST_ROWS}
    width, outs: 1..
    start
    kind: -1..
    type = T: int32
    kept weights: NF4Weights
    """,
    fails=MemoryError("no memory for some rows of a packed weight"),
)
def _packed_rows(
    packed: int,
    kind: int,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    start: int,
    level: int,
    weights: object,
) -> None:
    """packed: address of the blocks, or of `weights`, an NF4Weights, whose kind is -1."""
