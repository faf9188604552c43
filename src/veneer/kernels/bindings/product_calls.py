"""The call into the kernel for products of many rows (native/dense/products.c).

It states the shapes that C takes for granted; arguments.py refuses everything else.
Shapes: M rows, I width, O outs.
"""

import ctypes

from torch import Tensor

from veneer.kernels.bindings.arguments import BF16, CallError, at, call, number, numbers, pointers

MOST_ROWS = 2**24


class _Product(ctypes.Structure):
    _fields_ = [*pointers("x w bias y"), *numbers("rows width outs along add")]


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, *, along: bool, add: bool
) -> None:
    """y (M, O) = x (M, I) W^T, W (O, I), or x W where it lies along, W (I, O); + bias (O); add: +
    what y was. All bf16, I even. CallError where there are no tiles."""
    (rows, width), outs = x.shape, y.shape[1]
    if number(width, 2) % 2:
        raise CallError(f"width {width} where C takes pairs")
    given = _Product(
        at(x, BF16, number(rows, 1, MOST_ROWS), width),
        at(weight, BF16, *((width, outs) if along else (outs, width))),
        None if bias is None else at(bias, BF16, outs),
        at(y, BF16, rows, number(outs, 1)),
        rows,
        width,
        outs,
        int(along),
        int(add),
    )
    if call("veneer_product", ctypes.byref(given)):
        raise CallError("no tiles here")
