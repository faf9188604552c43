"""4-bit weights on CUDA, in Triton: decoded, and multiplied with a few rows of x as they are.

These stay because bitsandbytes (bitsandbytes_nf4.py) knows two tables alone: MXFP4 has another one.
They also serve starts within a block, rows that blocks straddle, and machines without bitsandbytes.
Decoded weights have the bits of packed/nf4_reference.py: products and sums of scales are not fused
(enable_fp_fusion=False), and a weight is rounded once. For more rows of x, packed/nf4.py decodes
the weight into a buffer and multiplies that. Tests on a CPU use Triton's interpreter
(TRITON_INTERPRET=1).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.cuda.triton_numbers import DeviceKernel, rounded

_BYTES = 512
"""Bytes that a program decodes: 4 a lane, whose weights in 16 bits are one store of 16 bytes."""
_OUTS, _WIDTH = 8, 256


@triton.jit
def _pairs(
    packed,
    scales,
    table,
    nested_table,
    nested_scales,
    offset,
    byte,
    inside,
    nested: tl.constexpr,
    block: tl.constexpr,
    nested_block: tl.constexpr,
):
    """byte (...), numbers of bytes of the flat weight -> float32 weights (..., 2), 0 outside.

    Both weights of a byte have the same scale.
    """
    both = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    number = byte // (block // 2)
    scale = tl.load(scales + number, mask=inside, other=0)
    if nested:
        outer = tl.load(nested_scales + number // nested_block, mask=inside, other=0.0)
        scale = tl.load(nested_table + scale.to(tl.int32), mask=inside, other=0.0) * outer + offset
    first = tl.load(table + (both >> 4), mask=inside, other=0.0)
    second = tl.load(table + (both & 15), mask=inside, other=0.0)
    return tl.join(first * scale, second * scale)


@DeviceKernel
@triton.jit
def _dequantize(
    packed,
    scales,
    table,
    nested_table,
    nested_scales,
    offset,
    out,
    first_byte,
    bytes,
    count,
    before: tl.constexpr,
    nested: tl.constexpr,
    block: tl.constexpr,
    nested_block: tl.constexpr,
    size: tl.constexpr,
):
    """before: 1 if `out` begins with the second weight of its first byte, else 0."""
    byte = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    value = _pairs(
        packed,
        scales,
        table,
        nested_table,
        nested_scales,
        offset,
        first_byte + byte,
        byte < bytes,
        nested,
        block,
        nested_block,
    )
    place = tl.program_id(0).to(tl.int64) * (2 * size) + tl.arange(0, 2 * size) - before
    value = rounded(value.reshape(2 * size), out.dtype.element_ty)
    tl.store(out + place, value, mask=(place >= 0) & (place < count) if before else place < count)


@DeviceKernel
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
    first_byte,
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
    row_M, half = tl.arange(0, padded_rows), width // 2
    sums_MO = tl.zeros((padded_rows, tile), dtype=tl.float32)
    for first in range(0, half, step // 2):
        byte_J = first + tl.arange(0, step // 2)
        weight_OJ2 = _pairs(
            packed,
            scales,
            table,
            nested_table,
            nested_scales,
            offset,
            first_byte + out_O[:, None] * half + byte_J[None, :],
            (out_O[:, None] < outs) & (byte_J[None, :] < half),
            nested,
            block,
            nested_block,
        )
        rounded_OI = rounded(weight_OJ2.reshape(tile, step), x.dtype.element_ty).to(tl.float32)
        column_I = 2 * first + tl.arange(0, step)
        inside_MI = (row_M[:, None] < rows) & (column_I[None, :] < width)
        x_MI = tl.load(
            x + row_M[:, None] * width + column_I[None, :], mask=inside_MI, other=0.0
        ).to(tl.float32)
        sums_MO += tl.sum(x_MI[:, None, :] * rounded_OI[None, :, :], axis=2)
    inside_MO = (row_M[:, None] < rows) & (out_O[None, :] < outs)
    tl.store(
        y + row_M[:, None] * outs + out_O[None, :],
        rounded(sums_MO, y.dtype.element_ty),
        mask=inside_MO,
    )


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
    """Computes nf4.dequantize into a contiguous `out` on the weights' device."""
    count = out.numel()
    first, before = divmod(start, 2)
    bytes = triton.cdiv(count + before, 2)
    grid = (triton.cdiv(bytes, _BYTES),)
    _dequantize[grid](
        *_parts(weights), out, first, bytes, count, before=before, size=_BYTES, **_shape(weights)
    )
    return out


def product(weights: Any, x: Tensor, outs: int, *, start: int) -> Tensor:
    """Computes nf4.product of contiguous x (M, I), with float32 sums. start and I are even."""
    assert start % 2 == 0 == x.shape[1] % 2
    y = torch.empty(x.shape[0], outs, dtype=x.dtype, device=x.device)
    padded = triton.next_power_of_2(x.shape[0])
    grid = (triton.cdiv(outs, _OUTS),)
    _product[grid](
        *_parts(weights),
        x,
        y,
        start // 2,
        x.shape[0],
        outs,
        x.shape[1],
        padded_rows=padded,
        tile=_OUTS,
        step=_WIDTH,
        **_shape(weights),
    )
    return y
