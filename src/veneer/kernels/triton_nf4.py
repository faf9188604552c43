"""4-bit weights on CUDA, in Triton: decoded, and multiplied with a few rows without decoding them to memory.

The same bits as nf4_reference.py: products and sums of scales are not fused (enable_fp_fusion=False), and a weight is
rounded once. More rows of x take the library's matrix product over a decoded buffer (nf4.py). Importing this needs
Triton; tested on the CPU in Triton's interpreter (TRITON_INTERPRET=1).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.triton_numbers import Launched, rounded

_ELEMENTS = 1024
_OUTS, _WIDTH = 8, 256


@triton.jit
def _weights(
    packed,
    scales,
    table,
    nested_table,
    nested_scales,
    offset,
    elements,
    inside,
    nested: tl.constexpr,
    block: tl.constexpr,
    nested_block: tl.constexpr,
):
    """float32 weights at `elements` of the flat weight; 0 where not `inside`."""
    byte = tl.load(packed + elements // 2, mask=inside, other=0).to(tl.int32)
    nibble = tl.where(elements % 2 == 0, byte >> 4, byte & 15)
    number = elements // block
    scale = tl.load(scales + number, mask=inside, other=0)
    if nested:
        outer = tl.load(nested_scales + number // nested_block, mask=inside, other=0.0)
        scale = tl.load(nested_table + scale.to(tl.int32), mask=inside, other=0.0) * outer + offset
    value = tl.load(table + nibble, mask=inside, other=0.0)
    return value * scale


@Launched
@triton.jit
def _dequantize(
    packed,
    scales,
    table,
    nested_table,
    nested_scales,
    offset,
    out,
    start,
    count,
    nested: tl.constexpr,
    block: tl.constexpr,
    nested_block: tl.constexpr,
    size: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = place < count
    value = _weights(
        packed, scales, table, nested_table, nested_scales, offset, start + place, inside, nested, block, nested_block
    )
    tl.store(out + place, rounded(value, out.dtype.element_ty), mask=inside)


@Launched
@triton.jit
def _product(
    packed,
    scales,
    table,
    nested_table,
    nested_scales,
    offset,
    x,
    y,
    start,
    rows,
    outs,
    width,
    nested: tl.constexpr,
    block: tl.constexpr,
    nested_block: tl.constexpr,
    padded_rows: tl.constexpr,
    tile: tl.constexpr,
    step: tl.constexpr,
):
    out_O = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    row_M = tl.arange(0, padded_rows)
    sums_MO = tl.zeros((padded_rows, tile), dtype=tl.float32)
    for first in range(0, width, step):
        column_I = first + tl.arange(0, step)
        elements_OI = start + out_O[:, None] * width + column_I[None, :]
        inside_OI = (out_O[:, None] < outs) & (column_I[None, :] < width)
        weight_OI = _weights(
            packed,
            scales,
            table,
            nested_table,
            nested_scales,
            offset,
            elements_OI,
            inside_OI,
            nested,
            block,
            nested_block,
        )
        rounded_OI = rounded(weight_OI, x.dtype.element_ty).to(tl.float32)
        inside_MI = (row_M[:, None] < rows) & (column_I[None, :] < width)
        x_MI = tl.load(x + row_M[:, None] * width + column_I[None, :], mask=inside_MI, other=0.0).to(tl.float32)
        sums_MO += tl.sum(x_MI[:, None, :] * rounded_OI[None, :, :], axis=2)
    inside_MO = (row_M[:, None] < rows) & (out_O[None, :] < outs)
    tl.store(y + row_M[:, None] * outs + out_O[None, :], rounded(sums_MO, y.dtype.element_ty), mask=inside_MO)


def _parts(weights: Any) -> tuple[Any, ...]:
    nested = weights.nested
    if nested is None:
        return weights.packed, weights.scales, weights.table, weights.table, weights.table, 0.0
    return weights.packed, weights.scales, weights.table, nested.table, nested.scales, nested.offset


def _shape(weights: Any) -> dict[str, Any]:
    nested = weights.nested
    return {
        "nested": nested is not None,
        "block": weights.block,
        "nested_block": 1 if nested is None else nested.block,
        "enable_fp_fusion": False,
    }


def dequantize(weights: Any, out: Tensor, *, start: int) -> Tensor:
    """As nf4.dequantize, `out` contiguous on the weights' device."""
    count = out.numel()
    grid = (triton.cdiv(count, _ELEMENTS),)
    _dequantize[grid](*_parts(weights), out, start, count, size=_ELEMENTS, **_shape(weights))
    return out


def product(weights: Any, x: Tensor, outs: int, *, start: int) -> Tensor:
    """As nf4.product: x (M, I) contiguous -> (M, outs), sums in float32."""
    y = torch.empty(x.shape[0], outs, dtype=x.dtype, device=x.device)
    padded = triton.next_power_of_2(x.shape[0])
    grid = (triton.cdiv(outs, _OUTS),)
    _product[grid](
        *_parts(weights),
        x,
        y,
        start,
        x.shape[0],
        outs,
        x.shape[1],
        padded_rows=padded,
        tile=_OUTS,
        step=_WIDTH,
        **_shape(weights),
    )
    return y
