"""The three products of a low-rank update, whose one side is a few dozen wide.

    down(x, A)        scale * x A^T             (M, I) x (R, I) -> (M, R)
    add_up(y, d, B)   y += scale * d B^T        (M, O) += (M, R) x (O, R)
    gradient(u, x)    scale * u^T x             (M, R) x (M, I) -> (R, I)

With dropout the wide side is seen through its mask: x, or what is added to y, is 0 where it drops,
else / (1 - share); compiled, no pass of its own is made for that, and the division is one of the
sums. Compiled for bf16 on processors that multiply its pairs (native/layers/rank.c), sums in
float32 rounded once; elsewhere torch's matrix products, which are made for squarer shapes. Factors
are float32 or in the products' type; compiled kernels round them as they lay them out. Shapes: M
rows, I and O widths, R rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.kernels.bindings import rank_calls
from veneer.kernels.bindings.library import has_bf16, on_cpu
from veneer.kernels.dense.dropout import Dropout
from veneer.kernels.dense.fused import compiled

MOST = rank_calls.MOST_RANK
_HALVES = (torch.bfloat16, torch.float16)


def is_compiled(rank: int, width: int, *tensors: Tensor) -> bool:
    """Whether a kernel computes these: ranks and widths that fill registers, more than an answer's
    few rows."""
    if rank % 16 or width % 16 or not 0 < rank <= rank_calls.MOST_RANK or tensors[0].shape[0] < 16:
        return False
    return compiled(*tensors)


def typed(factor: Tensor, x: Tensor) -> Tensor:
    """A factor as the products of x take it: itself, where a kernel rounds it, else in x's type."""
    taken = (
        factor.dtype is torch.float32 and x.dtype is torch.bfloat16 and factor.shape[0] % 16 == 0
    )
    return (
        factor
        if taken
        and factor.shape[1] % 16 == 0
        and factor.is_contiguous()
        and on_cpu(x)
        and has_bf16()
        else factor.to(x.dtype)
    )


def _laid(factor: Tensor) -> Tensor:
    """As the kernels read it: without gaps, one way round or the other."""
    return factor if factor.is_contiguous() or factor.T.is_contiguous() else factor.contiguous()


def _narrow(side: Tensor) -> bool:
    """Whether rows of R columns are whole pairs; they may be columns of a wider matrix."""
    return (
        side.stride(1) == 1
        and side.stride(0) % 2 == 0
        and side.data_ptr() % rank_calls.PAIR_BYTES == 0
    )


def _mask(dropout: Dropout | None) -> rank_calls.Mask | None:
    return None if dropout is None else dropout.mask()


def down(
    x: Tensor,
    A: Tensor,
    scale: float = 1.0,
    out: Tensor | None = None,
    *,
    dropout: Dropout | None = None,
) -> Tensor:
    """out: columns of a wider matrix that are written instead of a fresh one."""
    rank, width = A.shape
    out = x.new_empty(x.shape[0], rank) if out is None else out
    if not rank:
        return out
    if not is_compiled(rank, width, x) or not _narrow(out):
        torch.mm(x if dropout is None else dropout.apply(x), A.to(x.dtype).T, out=out)
        return out if scale == 1.0 else out.mul_(scale)
    rank_calls.rank_down(x, _laid(A), out, scale, _mask(dropout))
    return out


def add_up(
    y: Tensor, d: Tensor, B: Tensor, scale: float = 1.0, *, dropout: Dropout | None = None
) -> None:
    width, rank = B.shape
    if not rank:
        return
    if is_compiled(rank, width, y) and _narrow(d):
        rank_calls.rank_up(d, _laid(B), y, scale, _mask(dropout))
    elif dropout is None:
        y.addmm_(d, B.to(y.dtype).T, alpha=scale)
    else:
        y.add_(dropout.apply(d @ B.to(y.dtype).T), alpha=scale)


def gradient(u: Tensor, x: Tensor, scale: float = 1.0, *, dropout: Dropout | None = None) -> Tensor:
    """In float32 where it is compiled and on CUDA, whose products keep their sums so; else in the
    inputs' type."""
    rank = u.shape[1]
    if not rank:
        return x.new_empty(0, x.shape[1])
    if not is_compiled(rank, x.shape[1], x) or not _narrow(u):
        x = x if dropout is None else dropout.apply(x)
        found = (
            torch.mm(u.T, x, out_dtype=torch.float32)
            if x.is_cuda and x.dtype in _HALVES
            else u.T @ x
        )
        return found if scale == 1.0 else found.mul_(scale)
    out = torch.empty(rank, x.shape[1], dtype=torch.float32, device=x.device)
    rank_calls.rank_gradient(u, x, [out], scale, _mask(dropout), turned=False, add=False)
    return out


def together(sizes: Sequence[int], dropouts: Sequence[Dropout | None]) -> bool:
    """Whether factors of these ranks, of layers of one input, are one factor: each sees the wide
    side itself, and they are no more than a kernel takes."""
    return all(each is None for each in dropouts) and (len(sizes) == 1 or sum(sizes) <= MOST)


def gradients(
    u: Tensor, x: Tensor, sizes: Sequence[int], dropouts: Sequence[Dropout | None]
) -> Sequence[Tensor]:
    """`gradient` of several factors, u (M, R) theirs side by side: (R, I) of each. Where all ranks
    are 0, x may have no rows."""
    if not u.shape[1]:
        return [x.new_empty(0, x.shape[1]) for _ in sizes]
    if together(sizes, dropouts):
        return gradient(u, x).split(list(sizes))
    each = zip(u.split(list(sizes), dim=1), dropouts, strict=True)
    return [gradient(own, x, dropout=dropout) for own, dropout in each]


def put_gradients(
    outs: Sequence[Tensor],
    u: Tensor,
    x: Tensor,
    dropouts: Sequence[Dropout | None],
    scale: float = 1.0,
    *,
    turned: bool = False,
    add: bool = False,
) -> None:
    """`gradients`, where they are compiled, times scale, into float32 outs (R, I); turned: (I, R).
    add: + what they were."""
    sizes = [out.shape[int(turned)] for out in outs]
    if together(sizes, dropouts):
        rank_calls.rank_gradient(u, x, outs, scale, turned=turned, add=add)
        return
    for out, own, dropout in zip(outs, u.split(sizes, dim=1), dropouts, strict=True):
        rank_calls.rank_gradient(own, x, [out], scale, _mask(dropout), turned=turned, add=add)
