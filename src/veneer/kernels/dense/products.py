"""Products of many rows with a dense weight, on processors that multiply bf16 pairs, or tiles of
them (AMX).

    product(x, W, bias)       x W^T + bias        (M, I) x (O, I) -> (M, O)
    times(g, W, so_far)       so_far + g W        (M, O) x (O, I) -> (M, I)
    linear(x, W, bias)        the first, or few_rows.py's, or torch's

Compiled for bf16 (native/dense/products.c), sums in float32 rounded once. A row's bits depend
neither on what stands beside it nor on the number of threads; on tiles they are those that
few_rows.py gives it. oneDNN's product leaves all threads but one idle for many shapes on tiles (two
threads: 640 rows of 576 to 576 or of 1,536 to 576), and shares the rows of others unevenly. Shapes:
M rows, I in_features, O out_features.
"""

import torch
from torch import Tensor

from veneer.kernels.bindings import dense_calls
from veneer.kernels.bindings.library import has_amx, has_bf16, on_cpu, own_product
from veneer.kernels.dense import few_rows

MOST_WIDTH_ON_TILES = 2048
"""Of a sum: beyond, too few columns of W stay in the second cache beside one another."""


def usable(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `product` is the fast way for x (..., I), whose rows lie behind one another, with W
    (O, I) and bias."""
    given = (x, weight) if bias is None else (x, weight, bias)
    return x.shape[-1] == weight.shape[1] and _taken(x, weight.shape[1], weight.numel(), given)


def times_usable(grad: Tensor, weight: Tensor, so_far: Tensor | None) -> bool:
    """Whether `times` is the fast way for these."""
    given = (grad, weight) if so_far is None else (grad, weight, so_far)
    return grad.dim() == 2 and _taken(grad, weight.shape[0], weight.numel(), given)


def _taken(x: Tensor, width: int, values: int, given: tuple[Tensor, ...]) -> bool:
    if not few_rows.MOST_ROWS * width < x.numel() <= dense_calls.MOST_PRODUCT_ROWS * width:
        return False
    if width % 2 or values < few_rows.LEAST_VALUES or torch.compiler.is_compiling():
        return False
    if width > MOST_WIDTH_ON_TILES and has_amx():
        return False
    return (
        all(t.dtype is torch.bfloat16 and on_cpu(t) and t.is_contiguous() for t in given)
        and has_bf16()
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """(..., O) of a usable x (..., I). out: (M, O) that is written instead of a fresh one. Without
    a gradient."""
    rows = x.view(-1, weight.shape[1])
    y = x.new_empty(len(rows), len(weight)) if out is None else out
    if y.is_meta:
        _planned(rows, weight.t(), bias, y)
    else:
        dense_calls.product(rows, weight, bias, y, along=False, add=False)
    return y.view(*x.shape[:-1], len(weight))


def times(grad: Tensor, weight: Tensor, so_far: Tensor | None) -> Tensor:
    """so_far (M, I) + g (M, O) W (O, I), in place and rounded once; None: a fresh tensor."""
    found = grad.new_empty(len(grad), weight.shape[1]) if so_far is None else so_far
    if found.is_meta:
        _planned(grad, weight, so_far, found)
    else:
        dense_calls.product(grad, weight, None, found, along=True, add=so_far is not None)
    return found


def _planned(x: Tensor, matrix: Tensor, added: Tensor | None, out: Tensor) -> None:
    """What a plan counts in the place of a call."""
    with own_product():
        torch.mm(x, matrix, out=out) if added is None else torch.addmm(added, x, matrix, out=out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., I) W^T + bias, by `product` or few_rows.py's where these are the fast way and nobody
    asks for its gradient."""
    if not usable(x, weight, bias) or few_rows.usable(x, weight, bias):
        return few_rows.linear(x, weight, bias)
    graded = torch.is_grad_enabled() and few_rows.wants_gradient(x, weight, bias)
    return few_rows.linear(x, weight, bias) if graded else product(x, weight, bias)


def times_reference(grad: Tensor, weight: Tensor, so_far: Tensor | None) -> Tensor:
    """The meaning of `times`, in plain torch; that of `product` is few_rows.product_reference."""
    found = grad.double() @ weight.double()
    return (found if so_far is None else found + so_far.double()).to(grad.dtype)
