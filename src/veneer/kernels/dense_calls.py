"""The calls into the kernels over dense weights (native/few_rows.c).

Each function states the shapes that C takes for granted; arguments.py refuses everything else.
Shapes: M rows of x, I in_features, O out_features.
"""

import ctypes
from collections.abc import Sequence

from torch import Tensor

from veneer.kernels.arguments import CallError, at, call, number, numbers, pointers, reachable, type_number

MOST_ROWS = 64
"""Rows of one product. C takes any number: beyond these a product that is made for squarer shapes is quicker."""
MOST_PARTS = 16
"""Weights that share one x."""


class _Part(ctypes.Structure):
    _fields_ = [*pointers("w bias y"), *numbers("outs")]


class _FewRows(ctypes.Structure):
    _fields_ = [*pointers("x parts"), *numbers("count rows width apart"), ("type", ctypes.c_int)]


_ARRAYS = {count: _Part * count for count in range(1, MOST_PARTS + 1)}


def few_rows(x: Tensor, parts: Sequence[tuple[Tensor, Tensor | None, Tensor]], level: int) -> None:
    """parts: (W (O, I), bias (O) or None, y (M, O)) each, y = x (M, I) W^T + bias; all float32 or all bf16.

    x's rows may lie apart from one another; M from 1 to 64. level: the most instructions used (4 bf16 pairs, 3, 2, 0).
    """
    (rows, width), dtype, count = x.shape, x.dtype, number(len(parts), 1, MOST_PARTS)
    number(rows, 1, MOST_ROWS)
    number(width, 1)
    if (kind := type_number(dtype)) > 1:
        raise CallError(f"{dtype} where C takes float32 or bf16")
    across, within = x.stride()
    if (within != 1 and width > 1) or not reachable(x):
        raise CallError(f"x on {x.device} with steps of {within} where C takes whole rows on the CPU")
    source = x.data_ptr()
    if source % dtype.itemsize:
        raise CallError("values at an odd address")
    given = _ARRAYS[count](
        *[
            _Part(
                at(weight, dtype, number(len(weight), 1), width),
                None if bias is None else at(bias, dtype, len(weight)),
                at(y, dtype, rows, len(weight)),
                len(weight),
            )
            for weight, bias, y in parts
        ]
    )
    one = _FewRows(source, ctypes.addressof(given), count, rows, width, across, kind)
    call("veneer_few_rows", ctypes.byref(one), number(level, 0, 4))
