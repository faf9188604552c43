"""The calls into the kernels between the products of a decoder layer
(native/layers/decoder_step.c).

Each function states the shapes that C takes for granted; arguments.py refuses everything else. All
values of a call are of one type, float32 or bf16. Shapes: N rows, D width, H query heads, K key
heads, E head size.
"""

import ctypes

from torch import Tensor

from veneer.kernels.bindings.arguments import (
    INT64,
    CallError,
    at,
    call,
    number,
    numbers,
    pointers,
    type_number,
    whole,
)

ANY_LEVEL = 3


class _StepNorm(ctypes.Structure):
    _fields_ = [
        *pointers("x delta weight sum out"),
        *numbers("rows width"),
        ("epsilon", ctypes.c_float),
    ]


class _Rotate(ctypes.Structure):
    _fields_ = [*pointers("q k cos sin"), *numbers("rows q_heads k_heads size")]


class _StepGate(ctypes.Structure):
    _fields_ = [*pointers("gate up out"), *numbers("rows width")]


class _Inputs(ctypes.Structure):
    _fields_ = [
        *pointers("ids spans table cos_table sin_table h cos sin"),
        *numbers("rows width size"),
    ]
    kept: object


def _bf16(tensor: Tensor) -> int:
    if (kind := type_number(tensor.dtype)) > 1:
        raise CallError(f"{tensor.dtype} where C takes float32 or bf16")
    return kind


def step_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    sum_: Tensor | None,
    out: Tensor,
    epsilon: float,
    level: int = ANY_LEVEL,
) -> None:
    """sum_ (N, D) = x + delta, out = weight * normalised sum_; without a delta of x, and there is
    no sum_."""
    (rows, width), dtype = x.shape, x.dtype
    if (delta is None) != (sum_ is None):
        raise CallError("a sum of one")
    added = None if delta is None else at(delta, dtype, rows, width)
    made = None if sum_ is None else at(sum_, dtype, rows, width), at(out, dtype, rows, width)
    given = _StepNorm(
        at(x, dtype, rows, width),
        added,
        at(weight, dtype, number(width, 1)),
        *made,
        rows,
        width,
        epsilon,
    )
    call("veneer_step_norm", ctypes.byref(given), _bf16(x), number(level, 0, 3))


def step_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, level: int = ANY_LEVEL) -> None:
    """q (N, H E) and k (N, K E), each head of them turned in place; cos and sin (N, E)."""
    (rows, size), dtype = cos.shape, cos.dtype
    heads = [x.shape[1] // number(size, 2) for x in (q, k)]
    if size % 2:
        raise CallError(f"heads of {size} where C turns pairs")
    turned = [at(x, dtype, rows, own * size) for x, own in zip((q, k), heads, strict=True)]
    given = _Rotate(
        *turned, at(cos, dtype, rows, size), at(sin, dtype, rows, size), rows, *heads, size
    )
    call("veneer_step_rotate", ctypes.byref(given), _bf16(cos), number(level, 0, 3))


def step_gate(gate: Tensor, up: Tensor, out: Tensor, level: int = ANY_LEVEL) -> None:
    """out (N, D) = silu(gate) * up."""
    (rows, width), dtype = gate.shape, gate.dtype
    given = _StepGate(
        at(gate, dtype, rows, width),
        whole(up, dtype, rows * width),
        at(out, dtype, rows, width),
        rows,
        width,
    )
    call("veneer_step_gate", ctypes.byref(given), _bf16(gate), number(level, 0, 3))


def step_inputs(
    ids: Tensor,
    spans: Tensor,
    table: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    h: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """h (N, D) = table (V, D) at ids (N); cos and sin (N, E) = their tables (P, E) at the fourth of
    each of spans (N, 5), where its row stands (paged_calls.py); all of one type."""
    (rows, width), dtype, size = h.shape, h.dtype, cos.shape[1]
    starts = [at(ids, INT64, number(rows, 1)), at(spans, INT64, rows, 5)]
    for of, table_of in ((ids, table), (spans[:, 3], cos_table)):
        for each in of.tolist():
            number(each, 0, len(table_of) - 1)
    tables = [
        at(table, dtype, len(table), width),
        *(at(t, dtype, len(cos_table), size) for t in (cos_table, sin_table)),
    ]
    made = [at(h, dtype, rows, width), *(at(t, dtype, rows, size) for t in (cos, sin))]
    given = _Inputs(*starts, *tables, *made, rows, width * dtype.itemsize, size * dtype.itemsize)
    given.kept = ids, spans, cos_table, sin_table
    call("veneer_step_inputs", ctypes.byref(given))
