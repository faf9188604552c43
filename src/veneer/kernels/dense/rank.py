"""The three products of a low-rank update, one side of which is a few dozen wide.

    down(x, A)        scale * x A^T             (M, I) x (R, I) -> (M, R)
    add_up(y, d, B)   y += scale * d B^T        (M, O) += (M, R) x (O, R)
    gradient(u, x)    scale * u^T x             (M, R) x (M, I) -> (R, I)

With dropout x, or what is added to y, is 0 where the mask drops and divided by (1 - share)
elsewhere. The compiled kernels apply the mask as they read, and divide the sums.

Compiled for bf16 on processors that multiply pairs of it (native/layers/rank.c); sums are float32
and rounded once. Elsewhere torch's matrix products compute it, which are made for squarer shapes.
Factors are float32 or have the type of the products. The compiled kernels round them as they read.
Shapes: M rows, I and O widths, R rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.kernels.bindings import rank_calls
from veneer.kernels.bindings.library import has_bf16, on_cpu
from veneer.kernels.dense import products
from veneer.kernels.dense.dropout import Dropout
from veneer.kernels.dense.fused import compiled

MOST_RANK = rank_calls.MOST_RANK
_HALVES = (torch.bfloat16, torch.float16)


def is_compiled(rank: int, width: int, *tensors: Tensor) -> bool:
    """True if a kernel computes these: rank and width fill registers, and there are enough rows."""
    if rank % 16 or width % 16 or not 0 < rank <= MOST_RANK or tensors[0].shape[0] < 16:
        return False
    return compiled(*tensors)


def typed(factor: Tensor, x: Tensor) -> Tensor:
    """Returns a factor for products of x: itself if a kernel rounds it, else in x's type."""
    mixed = factor.dtype is torch.float32 and x.dtype is torch.bfloat16
    fits = not factor.shape[0] % 16 and not factor.shape[1] % 16 and factor.is_contiguous()
    return factor if mixed and fits and on_cpu(x) and has_bf16() else factor.to(x.dtype)


def _readable(factor: Tensor) -> Tensor:
    """Returns the factor as the kernels read it: contiguous, or a transpose of such a tensor."""
    return factor if factor.is_contiguous() or factor.T.is_contiguous() else factor.contiguous()


def _has_pairs(side: Tensor) -> bool:
    """True if the rows of R columns are whole pairs; they may be columns of a wider matrix."""
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
    """Returns scale * x A^T (M, R).

    out: columns of a wider matrix, which are written instead of a fresh tensor.
    """
    rank, width = A.shape
    out = x.new_empty(x.shape[0], rank) if out is None else out
    if not rank:
        return out
    if not is_compiled(rank, width, x) or not _has_pairs(out):
        products.multiply(x if dropout is None else dropout.apply(x), A.to(x.dtype).T, out)
        return out if scale == 1.0 else out.mul_(scale)
    rank_calls.rank_down(x, _readable(A), out, scale, _mask(dropout))
    return out


def add_up(
    y: Tensor, d: Tensor, B: Tensor, scale: float = 1.0, *, dropout: Dropout | None = None
) -> None:
    """Adds scale * d B^T to y (M, O), in place."""
    width, rank = B.shape
    if not rank:
        return
    if is_compiled(rank, width, y) and _has_pairs(d):
        rank_calls.rank_up(d, _readable(B), y, scale, _mask(dropout))
    elif dropout is None:
        products.multiply(d, B.to(y.dtype).T, y, factor=scale)
    else:
        y.add_(dropout.apply(d @ B.to(y.dtype).T), alpha=scale)


def gradient(u: Tensor, x: Tensor, scale: float = 1.0, *, dropout: Dropout | None = None) -> Tensor:
    """Returns scale * u^T x (R, I).

    In float32 if it is compiled or on CUDA, where products keep float32 sums, else in the inputs'
    type.
    """
    rank = u.shape[1]
    if not rank:
        return x.new_empty(0, x.shape[1])
    if not is_compiled(rank, x.shape[1], x) or not _has_pairs(u):
        x = x if dropout is None else dropout.apply(x)
        wide = x.is_cuda and x.dtype in _HALVES
        if wide:
            product = torch.mm(u.T, x, out_dtype=torch.float32)
        else:
            rows = u.T.contiguous() if u.is_cpu else u.T  # compiled products read rows
            product = products.multiply(rows, x, x.new_empty(rank, x.shape[1]))
        return product if scale == 1.0 else product.mul_(scale)
    out = torch.empty(rank, x.shape[1], dtype=torch.float32, device=x.device)
    rank_calls.rank_gradient(u, x, [out], scale, _mask(dropout), transposed=False, add=False)
    return out


def together(sizes: Sequence[int], dropouts: Sequence[Dropout | None]) -> bool:
    """True if factors of these ranks, of layers of one input, are computed as one factor.

    They must have no dropout, and no more ranks than a kernel takes.
    """
    return not any(dropouts) and (len(sizes) == 1 or sum(sizes) <= MOST_RANK)


def gradients(
    u: Tensor, x: Tensor, sizes: Sequence[int], dropouts: Sequence[Dropout | None]
) -> Sequence[Tensor]:
    """Returns `gradient` of several factors, (R, I) each; u (M, R) holds them side by side.

    If all ranks are 0, x may have no rows.
    """
    if not u.shape[1]:
        return [x.new_empty(0, x.shape[1]) for _ in sizes]
    if together(sizes, dropouts):
        return gradient(u, x).split(list(sizes))
    parts = zip(u.split(list(sizes), dim=1), dropouts, strict=True)
    return [gradient(part, x, dropout=dropout) for part, dropout in parts]


def put_gradients(
    outs: Sequence[Tensor],
    u: Tensor,
    x: Tensor,
    dropouts: Sequence[Dropout | None],
    scale: float = 1.0,
    *,
    transposed: bool = False,
    add: bool = False,
) -> None:
    """Writes compiled `gradients`, times scale, into float32 outs (R, I).

    transposed  outs are (I, R)
    add     adds to what outs hold
    """
    sizes = [out.shape[int(transposed)] for out in outs]
    if together(sizes, dropouts):
        rank_calls.rank_gradient(u, x, outs, scale, transposed=transposed, add=add)
        return
    for out, part, dropout in zip(outs, u.split(sizes, dim=1), dropouts, strict=True):
        rank_calls.rank_gradient(
            part, x, [out], scale, _mask(dropout), transposed=transposed, add=add
        )
