"""Products of many rows with a dense weight: in bf16 on processors that multiply pairs or tiles of
it (AVX512_BF16, AMX, BFMMLA), in float32 on those with AVX2 alone.

    product(x, W, bias)       x W^T + bias        (M, I) x (O, I) -> (M, O)
    times(g, W, so_far)       so_far + g W        (M, O) x (O, I) -> (M, I)
    linear(x, W, bias)        the first, by this file, by few_rows.py or by torch
    multiply(x, W, y)         y = x W, or y += factor * x W, of any matrices

Compiled for bf16 (native/dense/products.c, products_arm.c) and float32 (float_products.c), where W
may be bf16 and becomes float32 as it is read; sums are float32 and rounded once. A row's bits
depend neither on its neighbours nor on the number of threads, and on tiles (AMX) they equal those
of few_rows.py.
oneDNN's product leaves all threads but one idle for many shapes on tiles (with two threads: 640
rows of 576 to 576, or of 1,536 to 576) and shares the rows of other shapes unevenly. Shapes: M
rows, I in_features, O out_features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from veneer.kernels.bindings import dense_calls
from veneer.kernels.bindings.library import (
    counted_as_kernel,
    has_amx,
    has_bf16_products,
    has_float_products,
    on_cpu,
)
from veneer.kernels.dense import few_rows

MAX_WIDTH_ON_TILES = 2048
"""Largest width of a sum on tiles: beyond it the second-level cache holds too few columns of W."""
LEAST_ROWS = 16
"""Rows from which `multiply` computes float32 products with compiled code instead of torch."""


def usable(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """True if `product` is the fast path for contiguous x (..., I), W (O, I) and bias."""
    others = () if bias is None else (bias,)
    return x.shape[-1] == weight.shape[1] and _fits(x, weight, weight.shape[1], others)


def times_usable(grad: Tensor, weight: Tensor, so_far: Tensor | None) -> bool:
    """True if `times` is the fast path for these."""
    others = () if so_far is None else (so_far,)
    return grad.dim() == 2 and _fits(grad, weight, weight.shape[0], others)


def _fits(x: Tensor, weight: Tensor, width: int, others: tuple[Tensor, ...]) -> bool:
    # For few rows too, torch would need a copy of W in x's type.
    above = few_rows.MOST_ROWS if weight.dtype is x.dtype else 0
    if not above * width < x.numel() <= dense_calls.MOST_PRODUCT_ROWS * width:
        return False
    if weight.numel() < few_rows.LEAST_VALUES or torch.compiler.is_compiling():
        return False
    tensors = (x, weight, *others)
    if not all(on_cpu(t) and t.is_contiguous() for t in tensors):
        return False
    if not few_rows.multiplies(x, weight) or any(t.dtype is not x.dtype for t in others):
        return False
    if x.dtype is torch.float32:
        return has_float_products()
    if x.dtype is not torch.bfloat16 or width % 2 or (width > MAX_WIDTH_ON_TILES and has_amx()):
        return False
    return has_bf16_products()


def product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Computes x W^T + bias, (..., O), of usable tensors without a gradient.

    out: (M, O), which is written instead of a fresh tensor.
    """
    rows = x.view(-1, weight.shape[1])
    y = x.new_empty(len(rows), len(weight)) if out is None else out
    write(rows, weight, bias, y)
    return y.view(*x.shape[:-1], len(weight))


def times(grad: Tensor, weight: Tensor, so_far: Tensor | None) -> Tensor:
    """Returns so_far (M, I) + g (M, O) W (O, I), added in place and rounded once.

    Without `so_far` the result is a fresh tensor.
    """
    out = grad.new_empty(len(grad), weight.shape[1]) if so_far is None else so_far
    write(grad, weight, None, out, along=True, add=so_far is not None)
    return out


def write(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    along: bool = False,
    add: bool = False,
) -> None:
    """Writes x W^T + bias to y, with `along` x W + bias, for any number of rows. add: adds it."""
    if y.is_meta:
        _count_in_plan(x, weight if along else weight.t(), y if add else bias, y)
    else:
        _call_of(x)(x, weight, bias, y, along=along, add=add)


def _call_of(x: Tensor) -> Callable[..., None]:
    return dense_calls.float_product if x.dtype is torch.float32 else dense_calls.product


def multiply(x: Tensor, matrix: Tensor, out: Tensor, *, factor: float | None = None) -> Tensor:
    """Computes out (M, O) = x (M, I) matrix (I, O), or adds that product to out, multiplied by the
    factor. All have the same type."""
    if not _takes_floats(x, matrix, out):
        if factor is None:
            return torch.mm(x, matrix, out=out)
        return out.addmm_(x, matrix, alpha=factor)
    transposed = matrix.T.is_contiguous()
    weight = matrix.T if transposed else matrix
    x = x if factor in (None, 1.0) else x * factor
    adds = factor is not None
    dense_calls.float_product(x, weight, None, out, along=not transposed, add=adds)
    return out


def _takes_floats(x: Tensor, matrix: Tensor, out: Tensor) -> bool:
    """Returns whether compiled code computes this float32 product faster than torch."""
    if len(x) < LEAST_ROWS or not matrix.numel() or not has_float_products():
        return False
    floats = all(t.dtype is torch.float32 and t.is_cpu for t in (x, matrix, out))
    readable = matrix.is_contiguous() or matrix.T.is_contiguous()
    return floats and readable and x.stride(1) == out.stride(1) == 1


def _count_in_plan(x: Tensor, matrix: Tensor, added: Tensor | None, out: Tensor) -> None:
    """Computes on tensors without storage, so that a plan counts the product of a call."""
    with counted_as_kernel():
        torch.mm(x, matrix, out=out) if added is None else torch.addmm(added, x, matrix, out=out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes x (..., I) W^T + bias by the fastest path.

    `product` takes it only where no gradient is needed. Rows with gaps between them, such as the
    last one of each text, become contiguous first. torch (2.13) would make a batched product of
    them, which reads W once for each row, and in bf16 copies it as often.
    """
    if not torch.compiler.is_compiling() and on_cpu(x):
        x = x.contiguous()
    if not usable(x, weight, bias) or few_rows.usable(x, weight, bias):
        return few_rows.linear(x, weight, bias)
    graded = torch.is_grad_enabled() and few_rows.wants_gradient(x, weight, bias)
    return few_rows.linear(x, weight, bias) if graded else product(x, weight, bias)


def times_reference(grad: Tensor, weight: Tensor, so_far: Tensor | None) -> Tensor:
    """Defines `times`, in plain torch; few_rows.product_reference defines `product`."""
    exact = grad.double() @ weight.double()
    return (exact if so_far is None else exact + so_far.double()).to(grad.dtype)
