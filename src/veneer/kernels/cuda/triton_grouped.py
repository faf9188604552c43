"""Low-rank updates on CUDA where rows have different adapters, all adapters in one launch.

    down        narrow[rows of n] = x[rows of n] factor_n^T      (M, K) x (n, R, K) -> (M, R)
    add_up      y[rows of n] += narrow[rows of n] factor_n^T     (M, R) x (n, K, R) -> (M, K)
    gradient    u[rows of n]^T x[rows of n]                      (M, R) x (M, K) -> (n, R, K)
                float32

Nothing is gathered, padded or scattered. A program takes at most ROWS neighbouring rows of one
adapter (`tiles`); for a gradient it takes all of the adapter's rows in their order, so that sums
have one order. Sums are float32 and rounded once. Two programs never write the same row. These
kernels stay ours because the libraries that have them have no gradients. After Chen et al. 2023,
arXiv:2310.18547 (Punica). Shapes: M rows, n adapters, K width, R rank.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.cuda.triton_numbers import DeviceKernel, multiplied, rounded

ROWS = 16
"""Rows of a tile: the fewest that tensor cores multiply."""
_FACTOR_BYTES = 2**15
"""Bytes of a factor that are in shared memory at a time."""


@triton.jit
def _tile(tiles, rank, rows: tl.constexpr, ranks: tl.constexpr):
    """Returns a program's adapter, its rows and their mask, its ranks and their mask."""
    tile = tiles + 3 * tl.program_id(0)
    number, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    row, r = first + tl.arange(0, rows), tl.arange(0, ranks)
    return number, row, row < first + count, r, r < rank


@triton.jit
def _places(number, r, column, number_stride, rank_stride, width_stride):
    """Returns the places of a factor's elements, for r and column that broadcast."""
    return number * number_stride + r * rank_stride + column * width_stride


@DeviceKernel
@triton.jit
def _down(
    x,
    factor,
    tiles,
    narrow,
    width,
    rank,
    x_stride,
    number_stride,
    rank_stride,
    width_stride,
    rows: tl.constexpr,
    ranks: tl.constexpr,
    step: tl.constexpr,
):
    number, row, real, r, ranked = _tile(tiles, rank, rows, ranks)
    sums = tl.zeros((rows, ranks), dtype=tl.float32)
    for start in range(0, width, step):
        column = start + tl.arange(0, step)
        inside = column < width
        places = row[:, None] * x_stride + column[None, :]
        values = tl.load(x + places, mask=real[:, None] & inside[None, :], other=0.0)
        places = _places(
            number, r[None, :], column[:, None], number_stride, rank_stride, width_stride
        )
        factors = tl.load(factor + places, mask=ranked[None, :] & inside[:, None], other=0.0)
        sums = multiplied(values, factors, sums)
    result = rounded(sums, narrow.dtype.element_ty)
    places = row[:, None] * rank + r[None, :]
    tl.store(narrow + places, result, mask=real[:, None] & ranked[None, :])


@DeviceKernel
@triton.jit
def _add_up(
    narrow,
    factor,
    tiles,
    y,
    width,
    rank,
    y_stride,
    number_stride,
    rank_stride,
    width_stride,
    rows: tl.constexpr,
    ranks: tl.constexpr,
    step: tl.constexpr,
):
    number, row, real, r, ranked = _tile(tiles, rank, rows, ranks)
    column = tl.program_id(1) * step + tl.arange(0, step)
    inside = column < width
    values = tl.load(
        narrow + row[:, None] * rank + r[None, :], mask=real[:, None] & ranked[None, :], other=0.0
    )
    places = _places(number, r[:, None], column[None, :], number_stride, rank_stride, width_stride)
    factors = tl.load(factor + places, mask=ranked[:, None] & inside[None, :], other=0.0)
    there = real[:, None] & inside[None, :]
    places = row[:, None] * y_stride + column[None, :]
    before = tl.load(y + places, mask=there, other=0.0).to(tl.float32)
    sums = multiplied(values, factors, before)
    tl.store(y + places, rounded(sums, y.dtype.element_ty), mask=there)


@DeviceKernel
@triton.jit
def _gradient(
    u,
    x,
    spans,
    out,
    width,
    rank,
    x_stride,
    rows: tl.constexpr,
    ranks: tl.constexpr,
    step: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    first, count = tl.load(spans + 2 * number), tl.load(spans + 2 * number + 1)
    r, column = tl.arange(0, ranks), tl.program_id(1) * step + tl.arange(0, step)
    ranked, inside = r < rank, column < width
    sums = tl.zeros((ranks, step), dtype=tl.float32)
    for start in range(0, count, rows):
        row = first + start + tl.arange(0, rows)
        real = row < first + count
        narrow = tl.load(
            u + row[None, :] * rank + r[:, None], mask=real[None, :] & ranked[:, None], other=0.0
        )
        places = row[:, None] * x_stride + column[None, :]
        values = tl.load(x + places, mask=real[:, None] & inside[None, :], other=0.0)
        sums = multiplied(narrow, values, sums)
    places = (number * rank + r[:, None]) * width + column[None, :]
    tl.store(out + places, sums, mask=ranked[:, None] & inside[None, :])


def _shape(rank: int, dtype: torch.dtype) -> tuple[int, int]:
    """Returns R padded for tensor cores, and the columns of a factor multiplied at once."""
    ranks = max(16, triton.next_power_of_2(rank))
    return ranks, max(16, min(64, _FACTOR_BYTES // (ranks * dtype.itemsize)))


def down(x: Tensor, factor: Tensor, tiles: Tensor) -> Tensor:
    """Returns narrow (M, R); rows without a tile are not written.

    x       (M, K), each row contiguous
    factor  (n, R, K), in any strides
    tiles   (t, 3) int64: adapter, first row, number of rows
    """
    (rows, width), rank = x.shape, factor.shape[1]
    narrow, (ranks, step) = x.new_empty(rows, rank), _shape(rank, x.dtype)
    _down[(len(tiles),)](
        x,
        factor,
        tiles,
        narrow,
        width,
        rank,
        x.stride(0),
        *factor.stride(),
        rows=ROWS,
        ranks=ranks,
        step=step,
        enable_fp_fusion=False,
    )
    return narrow


def add_up(y: Tensor, narrow: Tensor, factor: Tensor, tiles: Tensor) -> None:
    """Adds to y (M, K), each row contiguous.

    narrow  (M, R), contiguous
    factor  (n, K, R), in any strides
    """
    width, rank = factor.shape[1:]
    (number_stride, width_stride, rank_stride) = factor.stride()
    ranks, step = _shape(rank, y.dtype)
    _add_up[(len(tiles), triton.cdiv(width, step))](
        narrow,
        factor,
        tiles,
        y,
        width,
        rank,
        y.stride(0),
        number_stride,
        rank_stride,
        width_stride,
        rows=ROWS,
        ranks=ranks,
        step=step,
        enable_fp_fusion=False,
    )


def gradient(u: Tensor, x: Tensor, spans: Tensor) -> Tensor:
    """Returns the gradients (n, R, K) float32.

    u      (M, R), contiguous
    x      (M, K), each row contiguous
    spans  (n, 2) int64: first row and number of rows of each adapter
    """
    width, rank = x.shape[1], u.shape[1]
    ranks, step = _shape(rank, x.dtype)
    out = torch.empty(len(spans), rank, width, dtype=torch.float32, device=x.device)
    _gradient[(len(spans), triton.cdiv(width, step))](
        u,
        x,
        spans,
        out,
        width,
        rank,
        x.stride(0),
        rows=ROWS,
        ranks=ranks,
        step=step,
        enable_fp_fusion=False,
    )
    return out
