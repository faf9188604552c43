"""Products of a few rows with a dense weight: a decoding step's, whose time is that of reading W.

    product(x, W, bias)        x W^T + bias                (M, I) x (O, I) -> (M, O)
    products(x, [(W, bias)])   the same of several W, which share one x, in one call
    updated(x, [(W, bias, u)]) the same, with updates y[rows] += scale * (x[rows] A^T) B^T; each
        factor is read once
    any_rows()                 within, of any number of rows

Compiled for bf16 and float32 (native/few_rows.c; on AMX few_rows_tiles.c): W is read once, sums are
in float32 and rounded once with the bias in them. What a row gives depends neither on the rows
beside it nor on the number of threads: the same bits alone and among any number. Beyond MOST_ROWS a
product that is made for squarer shapes may be quicker, so these are for those who ask for the same
bits. Shapes: M rows, I in_features, O out_features; A (R, I), B (O, R).
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
from veneer.kernels.bindings.dense_calls import Factors as Factors
from veneer.kernels.bindings.dense_calls import Updates as Updates
from veneer.kernels.bindings.dense_calls import laid_out as laid_out

MOST_ROWS = 64
"""From here on what is made for squarer shapes may be quicker."""
MOST_UPDATES = dense_calls.MOST_UPDATES
LEAST_VALUES = 2**16
"""Of W: below, calling costs as much as the product."""
ANY_LEVEL = 5
"""As native.level() counts them, 4 for products of bf16 pairs, and 5 for those on tiles; tests
lower it."""


class _ThreadFlags(threading.local):
    """Of this thread. torch.compile traces a thread's values, and no context variable."""

    any_rows = False


_HERE = _ThreadFlags()


@contextmanager
def any_rows() -> Iterator[None]:
    """Within, this thread's products and updates are computed here whatever their number of rows
    and size of W, packed ones too (packed/nf4.py, packed/gguf.py): a row's bits are those that it
    has alone. 4-bit weights: from 7 rows on."""
    before, _HERE.any_rows = _HERE.any_rows, True
    try:
        yield
    finally:
        _HERE.any_rows = before


def takes(rows: int, most: int) -> bool:
    """Whether what is the fast way up to `most` rows is to compute so many."""
    return 0 < rows <= (dense_calls.MOST_ROWS if _HERE.any_rows else most)


@cache
def _level() -> int:
    """-1: not compiled here, or a processor whose registers were not measured."""
    return native.level() if native.level() >= 2 else -1


def usable(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `product` is the fast way for x (..., I), whose rows lie behind one another, with W
    (O, I) and bias."""
    if not x.is_cpu or (weight.numel() < LEAST_VALUES and not _HERE.any_rows):
        return False
    if not takes(x.numel() // weight.shape[1], MOST_ROWS):
        return False
    dtype = x.dtype
    if dtype is not torch.bfloat16 and dtype is not torch.float32:
        return False
    given = (weight,) if bias is None else (weight, bias)
    fits = all(t.dtype is dtype and t.is_cpu and t.is_contiguous() for t in given)
    return fits and x.shape[-1] == weight.shape[1] and x.is_contiguous() and _level() >= 0


def product(x_MI: Tensor, weight: Tensor, bias: Tensor | None, *, level: int = ANY_LEVEL) -> Tensor:
    """(M, O) in x's type; all float32 or all bf16 on a CPU. Without a gradient."""
    y_MO = torch.empty(x_MI.shape[0], weight.shape[0], dtype=x_MI.dtype)
    dense_calls.few_rows(x_MI, ((weight, bias, y_MO),), level)
    return y_MO


def products(
    x_MI: Tensor, parts: Sequence[tuple[Tensor, Tensor | None]], *, level: int = ANY_LEVEL
) -> list[Tensor]:
    """(M, O) of each (W, bias)."""
    made = [torch.empty(x_MI.shape[0], weight.shape[0], dtype=x_MI.dtype) for weight, _ in parts]
    dense_calls.few_rows(x_MI, [(*part, y) for part, y in zip(parts, made, strict=True)], level)
    return made


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., I) W^T + bias, by `product` where that is the fast way and nobody asks for its
    gradient."""
    if not usable(x, weight, bias) or (torch.is_grad_enabled() and wants_gradient(x, weight, bias)):
        return F.linear(x, weight, bias)
    y_MO = product(x.view(-1, weight.shape[1]), weight, bias)
    return y_MO.view(*x.shape[:-1], weight.shape[0])


def wants_gradient(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def takes_updates(count: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a kernel for so many updates."""
    fits = device.type == "cpu" and dtype in dense_calls.TYPE_NUMBERS and 0 < count <= MOST_UPDATES
    return fits and _level() >= 0


UpdatedWeight = tuple[Tensor, Tensor | None, Updates | None]
"""W (O, I), bias (O) or None, and updates of some of its rows, or none."""


def updated(
    x_MI: Tensor, parts: Sequence[UpdatedWeight], *, level: int = ANY_LEVEL
) -> list[Tensor]:
    """(M, O) of each where `usable`, the updates' type being x's, MOST_UPDATES at most. What x A^T
    is, is rounded to it; rows without are `product`'s to the bit."""
    made = [torch.empty(x_MI.shape[0], weight.shape[0], dtype=x_MI.dtype) for weight, *_ in parts]
    dense_calls.few_rows_updated(
        x_MI, [(*part, y) for part, y in zip(parts, made, strict=True)], level
    )
    return made


def add_updates(y_MO: Tensor, x_MI: Tensor, updates: Updates, *, level: int = ANY_LEVEL) -> None:
    """To a product that is there, of any M."""
    x_MI = x_MI if x_MI.stride(1) == 1 else x_MI.contiguous()
    dense_calls.few_rows_updated(x_MI, [(None, None, updates, y_MO)], level)


def product_reference(x_MI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The meaning of `product`, in plain torch."""
    y_MO = x_MI.double() @ weight.double().T
    return (y_MO if bias is None else y_MO + bias.double()).to(x_MI.dtype)
