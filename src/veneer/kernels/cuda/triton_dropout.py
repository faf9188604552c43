"""Dropout on CUDA in one pass, with the masks of dense/dropout.py and native/layers/dropout.c.

hash(row key, column) has the same bits. No mask is stored. Its integers have 32 bits, which a GPU
multiplies natively. This kernel stays ours because no library drops by the hash of a text.
Shapes: N rows, I width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.cuda.triton_numbers import DeviceKernel, rounded

_VALUES = 1024


@triton.jit
def _mix(value):
    """Computes lowbias32 of uint32 values."""
    value = (value ^ (value >> 16)) * 0x7FEB352D
    value = (value ^ (value >> 15)) * 0x846CA68B
    return value ^ (value >> 16)


@DeviceKernel
@triton.jit(do_not_specialize=("row_key", "column_key", "threshold"))  # they change every step
def _drop(x, rows, out, row_key, column_key, threshold, kept, width, size: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * size + tl.arange(0, size)
    inside, place = column < width, row.to(tl.int64) * width + column
    # Only the low half of a key is hashed. Sums and products of 32 bits wrap like 64 masked bits.
    row_hash = _mix((tl.load(rows + row) + row_key).to(tl.uint32))
    column_hash = _mix((column.to(tl.int64) * 0x85EBCA6B + column_key).to(tl.uint32))
    stays = _mix(row_hash ^ column_hash).to(tl.int64) >= threshold
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    result = tl.where(stays, tl.div_rn(value, kept), 0.0)
    tl.store(out + place, rounded(result, x.dtype.element_ty), mask=inside)


def drop(x: Tensor, rows: Tensor, row_key: int, column_key: int, share: float) -> Tensor:
    """Computes drop_out of x (N, I) and rows (N) int64, both contiguous, with keys of 32 bits."""
    (count, width), out = x.shape, torch.empty_like(x)
    grid, threshold = (count, triton.cdiv(width, _VALUES)), int(share * 2**32)
    _drop[grid](
        x,
        rows,
        out,
        row_key,
        column_key,
        threshold,
        1 - share,
        width,
        size=_VALUES,
        enable_fp_fusion=False,
    )
    return out
