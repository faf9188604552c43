"""Products of few rows with a dense weight, as in decoding, where reading W takes the time.

    product(x, W, bias)        x W^T + bias                (M, I) x (O, I) -> (M, O)
    products(x, [(W, bias)])   the same of several W, which share one x, in one call
    updated(x, [(W, bias, u)]) the same, with updates y[rows] += scale * (x[rows] A^T) B^T; each
        factor is read once
    any_rows()                 a block in which these take any number of rows

Compiled for bf16 and float32, and for float32 with W in bf16, which becomes float32 as it is read
(native/dense/few_rows.c; with AMX few_rows_tiles.c). W is read once; sums are float32 and rounded
once, with the bias included. The bits of a row do not depend on other rows or on the number of
threads. Above MOST_ROWS other products may be faster, so these are used only where equal bits
matter. Shapes: M rows, I in_features, O out_features; A (R, I), B (O, R).
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.bindings import dense_calls
from veneer.kernels.bindings import library as native
from veneer.kernels.bindings.arguments import BF16, FP32
from veneer.kernels.bindings.dense_calls import Factors as Factors
from veneer.kernels.bindings.dense_calls import Updates as Updates
from veneer.kernels.bindings.dense_calls import laid_out as laid_out

MOST_ROWS = 64
"""For more rows other products may be faster."""
MOST_UPDATES = dense_calls.MOST_UPDATES
LEAST_VALUES = 2**16
"""Smallest W, in values: below, the call costs as much as the product."""
ANY_LEVEL = 5
"""Highest level of native.level(): 4 has products of bf16 pairs, 5 tiles. Tests lower it."""


class _ThreadFlags(threading.local):
    """Flags of this thread. torch.compile can trace these, but no context variables."""

    any_rows = False


_FLAGS = _ThreadFlags()


@contextmanager
def any_rows() -> Iterator[None]:
    """Within the block, this thread computes all products and updates here, packed ones too
    (packed/nf4.py, packed/gguf.py), so a row has the bits that it has alone. 4-bit weights: from 7
    rows on."""
    before, _FLAGS.any_rows = _FLAGS.any_rows, True
    try:
        yield
    finally:
        _FLAGS.any_rows = before


def takes(rows: int, most: int) -> bool:
    """Whether a function that is fast up to `most` rows should compute so many."""
    return 0 < rows <= (dense_calls.MOST_ROWS if _FLAGS.any_rows else most)


@cache
def _is_compiled() -> bool:
    """Whether the compiled functions have vectors of this processor."""
    return native.has_vectors()


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether the types of x and W have compiled products: one type, or W in bf16 with float32."""
    return weight.dtype is x.dtype or (x.dtype is FP32 and weight.dtype is BF16)


def widened(weight: Tensor, x: Tensor) -> Tensor:
    """Returns W for torch's products with x, which take one type alone: a copy in float32 if W is
    in bf16 and x in float32."""
    return weight.float() if weight.dtype is not x.dtype and multiplies(x, weight) else weight


def usable(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `product` is the fast way for contiguous x (..., I) with W (O, I) and bias."""
    if not x.is_cpu or (weight.numel() < LEAST_VALUES and not _FLAGS.any_rows):
        return False
    if not takes(x.numel() // weight.shape[1], MOST_ROWS):
        return False
    if (x.dtype is not BF16 and x.dtype is not FP32) or not multiplies(x, weight):
        return False
    tensors = (weight,) if bias is None else (weight, bias)
    fits = all(t.is_cpu and t.is_contiguous() for t in tensors)
    fits = fits and (bias is None or bias.dtype is x.dtype) and x.shape[-1] == weight.shape[1]
    return fits and x.is_contiguous() and _is_compiled()


def product(x_MI: Tensor, weight: Tensor, bias: Tensor | None, *, level: int = ANY_LEVEL) -> Tensor:
    """Computes x W^T + bias, (M, O) in x's type. Requires `usable`, for any number of rows."""
    y_MO = torch.empty(x_MI.shape[0], weight.shape[0], dtype=x_MI.dtype)
    dense_calls.few_rows(x_MI, ((weight, bias, y_MO),), level)
    return y_MO


def products(
    x_MI: Tensor, parts: Sequence[tuple[Tensor, Tensor | None]], *, level: int = ANY_LEVEL
) -> list[Tensor]:
    """Computes `product` with each (W, bias), in one call."""
    outputs = [torch.empty(x_MI.shape[0], weight.shape[0], dtype=x_MI.dtype) for weight, _ in parts]
    dense_calls.few_rows(x_MI, [(*part, y) for part, y in zip(parts, outputs, strict=True)], level)
    return outputs


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes x W^T + bias by `product` if that is fast and needs no gradient, else by torch."""
    if not usable(x, weight, bias) or (torch.is_grad_enabled() and wants_gradient(x, weight, bias)):
        return F.linear(x, widened(weight, x), bias)
    y_MO = product(x.view(-1, weight.shape[1]), weight, bias)
    return y_MO.view(*x.shape[:-1], weight.shape[0])


def wants_gradient(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def takes_updates(count: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled function takes so many updates."""
    fits = device.type == "cpu" and dtype in dense_calls.TYPE_NUMBERS and 0 < count <= MOST_UPDATES
    return fits and _is_compiled()


UpdatedWeight = tuple[Tensor, Tensor | None, Updates | None]
"""W (O, I), bias (O) or None, and updates of some rows or None."""


def updated(
    x_MI: Tensor, parts: Sequence[UpdatedWeight], *, level: int = ANY_LEVEL
) -> list[Tensor]:
    """Computes the product with each part and its updates, (M, O). Requires `usable`, updates of
    x's type, at most MOST_UPDATES. x A^T is rounded to that type. Rows without updates have
    `product`'s bits."""
    outputs = [
        torch.empty(x_MI.shape[0], weight.shape[0], dtype=x_MI.dtype) for weight, *_ in parts
    ]
    dense_calls.few_rows_updated(
        x_MI, [(*part, y) for part, y in zip(parts, outputs, strict=True)], level
    )
    return outputs


def add_updates(y_MO: Tensor, x_MI: Tensor, updates: Updates, *, level: int = ANY_LEVEL) -> None:
    """Adds updates to y, for any number of rows."""
    x_MI = x_MI if x_MI.stride(1) == 1 else x_MI.contiguous()
    dense_calls.few_rows_updated(x_MI, [(None, None, updates, y_MO)], level)


def product_reference(x_MI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes `product` plainly."""
    y_MO = x_MI.double() @ weight.double().T
    return (y_MO if bias is None else y_MO + bias.double()).to(x_MI.dtype)
