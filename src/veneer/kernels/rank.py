"""The three products of a low-rank update, whose one side is a few dozen wide.

    down(x, A)        scale * x A^T             (M, I) x (R, I) -> (M, R)
    add_up(y, d, B)   y += scale * d B^T        (M, O) += (M, R) x (O, R)
    gradient(u, x)    scale * u^T x             (M, R) x (M, I) -> (R, I)

Compiled for bf16 on processors that multiply its pairs (native/rank.c), sums in float32 rounded once; elsewhere torch's
matrix products, which are made for squarer shapes. Shapes: M rows, I and O widths, R rank.
"""

import torch
from torch import Tensor

from veneer.kernels import calls
from veneer.kernels.fused import compiled

_HALVES = (torch.bfloat16, torch.float16)


def is_compiled(rank: int, width: int, *tensors: Tensor) -> bool:
    """Whether a kernel computes these: ranks and widths that fill registers, more than an answer's few rows."""
    if rank % 16 or width % 16 or not 0 < rank <= calls.MOST_RANK or tensors[0].shape[0] < 16:
        return False
    return compiled(*tensors)


def across(matrix: Tensor) -> Tensor:
    """(R, K) -> (K / 2, R) words of two neighbours of a row."""
    return matrix.contiguous().view(torch.int32).T.contiguous()


def down(x: Tensor, A: Tensor, scale: float = 1.0) -> Tensor:
    rank, width = A.shape
    if not is_compiled(rank, width, x):
        found = x @ A.T
        return found if scale == 1.0 else found.mul_(scale)
    out = torch.empty(x.shape[0], rank, dtype=x.dtype, device=x.device)
    calls.rank_down(x, across(A), out, scale)
    return out


def add_up(y: Tensor, d: Tensor, B: Tensor, scale: float = 1.0) -> None:
    width, rank = B.shape
    if not is_compiled(rank, width, y, d):
        y.addmm_(d, B.T, alpha=scale)
        return
    calls.rank_up(d, across(B), y, scale)


def gradient(u: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
    """In float32 where it is compiled and on CUDA, whose products keep their sums so; else in the inputs' type."""
    rows, rank = u.shape
    if rows % 2 or not is_compiled(rank, x.shape[1], x, u):
        found = torch.mm(u.T, x, out_dtype=torch.float32) if x.is_cuda and x.dtype in _HALVES else u.T @ x
        return found if scale == 1.0 else found.mul_(scale)
    out = torch.empty(rank, x.shape[1], dtype=torch.float32, device=x.device)
    calls.rank_gradient(u.T.contiguous(), x, out, scale)
    return out
