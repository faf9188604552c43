"""The calls into the kernels for the experts of a decoding step (native/dense/experts.c).

Shapes: N rows of the step, K experts of a row, S = N K sorted rows, E experts, I in_features, O
out_features. A layout (3 S) says where rows are; `expert_sort` writes it and the others read it.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.bindings.arguments import CallError, is_narrow
from veneer.kernels.bindings.checks import Values
from veneer.kernels.bindings.declarations import declare
from veneer.kernels.bindings.dense_calls import NO_ROOM, UpdatedPart, Updates

MOST_EXPERTS = 1024
"""Also in native/dense/experts.c."""


@declare(
    "veneer_expert_route(*)",
    f"""
    logits: T[rows, experts]
    index: i64[rows, chosen]
    weights: F[rows, chosen]
    rows: 1..
    experts: 1..{MOST_EXPERTS}
    chosen: 1..experts
    is_normal: flag
    wide = T - F: 0..1
    type = T: int32
    """,
)
def expert_route(logits: Tensor, index: Tensor, weights: Tensor, is_normal: bool) -> None:
    """Computes the K experts of each row with the largest logits (N, E), largest first and of equal
    ones the first, and the weights softmax(logits) of these. is_normal: divided by their sum. The
    weights are of the type of the logits, or float32."""


@declare(
    "veneer_expert_sort(*)",
    f"""
    x: T[rows, width]
    index: i64[rows, chosen] below experts
    layout: i64{{3 * rows * chosen}}
    out: T[rows * chosen, width]
    rows: 1..
    chosen: 1..
    experts: 1..{MOST_EXPERTS}
    row_bytes = width * T_bytes
    """,
)
def expert_sort(x: Tensor, index: Tensor, layout: Tensor, out: Tensor, experts: int) -> None:
    """Sorts the rows of x (N, I) by their experts (N, K): writes the layout and out (S, I)."""


@declare(
    "veneer_expert_product(*, level: int32 0..5)",
    """
    x: T[rows, width]
    down: T[down_rows, down_width]?
    parts: pointer
    packed: pointer
    layout: i64{3 * rows}
    rows: 1..
    width: 1..
    chosen: 1..rows
    type = T: int32
    check w: W[experts, outs, width]?
    check bias: T[experts, outs]?
    check y: T[rows, outs]
    body down, parts, arrays, packed, w, experts
    kept arrays: pointer
    """,
    fails=MemoryError(NO_ROOM),
)
def expert_product(
    x: Tensor,
    w: Any,
    bias: Tensor | None,
    updates: Updates | None,
    y: Tensor,
    layout: Tensor,
    chosen: int,
    level: int,
) -> Values:
    """Computes y (S, O) = x (S, I) W_e^T + bias_e, e the expert of each row, then adds the updates
    to rows of y. W (E, O, I), or an NF4Weights of as many values; bias (E, O). The updates are
    those of the step's N rows before they are sorted, by the factors of a stack
    (dense_calls.Factors)."""
    rows = len(x) // chosen
    if updates and (
        (updates.dtype, updates.width, updates.outs) != (x.dtype, x.shape[1], y.shape[1])
        or rows < updates.rows
    ):
        raise CallError(
            f"updates of ({updates.rows}, {updates.width}) to {updates.outs} {updates.dtype} where"
            f" x has {rows} rows, {tuple(x.shape)} {x.dtype} and y {tuple(y.shape)}"
        )
    room = chosen * updates.room if updates else 0
    part = UpdatedPart(None, bias.data_ptr() if bias is not None else None, y.data_ptr())
    part.outs, packed = y.shape[1], None if isinstance(w, Tensor) else w
    if packed is None:
        part.w, part.narrow, experts = w.data_ptr(), is_narrow(x, w), len(w)
    else:
        experts, rest = divmod(packed.count, size := y.shape[1] * x.shape[1])
        if rest:
            raise CallError(f"{packed.count} packed values where an expert has {size}")
    if updates:
        part.updates, part.count = updates.address, len(updates)
    array = (UpdatedPart * 1)(part)
    return {
        "down": torch.empty(rows, -(-room // rows), dtype=x.dtype) if room else None,
        "parts": ctypes.addressof(array),
        "arrays": (array, [updates], packed),
        "packed": None if packed is None else ctypes.addressof(packed),
        "w": w if packed is None else None,
        "experts": experts,
    }


@declare(
    "veneer_expert_sum(*)",
    """
    y: T[rows * chosen, width]
    weights: F[rows, chosen]
    layout: i64{3 * rows * chosen}
    out: T[rows, width]
    rows: 1..
    chosen: 1..
    width: 1..
    wide = T - F: 0..1
    type = T: int32
    """,
)
def expert_sum(y: Tensor, weights: Tensor, layout: Tensor, out: Tensor) -> None:
    """Computes the sum (N, I) of the sorted rows y (S, I) of each row, times its weights (N, K),
    which are of y's type or float32. Sums are float32 and rounded once."""
