"""The three products of a low-rank update, whose one side is a few dozen wide.

    down(x, A)        scale * x A^T             (M, I) x (R, I) -> (M, R)
    add_up(y, d, B)   y += scale * d B^T        (M, O) += (M, R) x (O, R)
    gradient(u, x)    scale * u^T x             (M, R) x (M, I) -> (R, I)

Compiled for bf16 on processors that multiply its pairs (native/rank.c), sums in float32 rounded once; elsewhere torch's
matrix products, which are made for squarer shapes. Shapes: M rows, I and O widths, R rank.
"""

import ctypes

import torch
from torch import Tensor

from veneer.kernels.fused import compiled

MOST_RANK = 256


class _Rank(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "pairs", "out", "grad")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "rank")),
        ("scale", ctypes.c_float),
    ]


def library_for(rank: int, width: int, *tensors: Tensor) -> ctypes.CDLL | None:
    """The library where it computes these: ranks and widths that fill registers, more than an answer's few rows."""
    if rank % 16 or width % 16 or not 0 < rank <= MOST_RANK or tensors[0].shape[0] < 16:
        return None
    return compiled(*tensors)


def across(matrix: Tensor) -> Tensor:
    """(R, K) -> (K / 2, R) words of two neighbours of a row."""
    return matrix.contiguous().view(torch.int32).T.contiguous()


def down(x: Tensor, A: Tensor, scale: float = 1.0) -> Tensor:
    rank, width = A.shape
    if (native := library_for(rank, width, x)) is None:
        found = x @ A.T
        return found if scale == 1.0 else found.mul_(scale)
    out, pairs = torch.empty(x.shape[0], rank, dtype=x.dtype, device=x.device), across(A)
    given = _Rank(x.data_ptr(), pairs.data_ptr(), out.data_ptr(), None, x.shape[0], width, rank, scale)
    native.veneer_rank_down(ctypes.byref(given))
    return out


def add_up(y: Tensor, d: Tensor, B: Tensor, scale: float = 1.0) -> None:
    width, rank = B.shape
    if (native := library_for(rank, width, y, d)) is None:
        y.addmm_(d, B.T, alpha=scale)
        return
    pairs = across(B)
    given = _Rank(d.data_ptr(), pairs.data_ptr(), y.data_ptr(), None, y.shape[0], width, rank, scale)
    native.veneer_rank_up(ctypes.byref(given))


def gradient(u: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
    """In float32 where it is compiled, else in the inputs' type."""
    rows, rank = u.shape
    if rows % 2 or (native := library_for(rank, x.shape[1], x, u)) is None:
        found = u.T @ x
        return found if scale == 1.0 else found.mul_(scale)
    out = torch.empty(rank, x.shape[1], dtype=torch.float32, device=x.device)
    pairs = u.view(rows // 2, 2, rank).transpose(1, 2).contiguous()
    given = _Rank(x.data_ptr(), pairs.data_ptr(), None, out.data_ptr(), rows, x.shape[1], rank, scale)
    native.veneer_rank_gradient(ctypes.byref(given))
    return out
