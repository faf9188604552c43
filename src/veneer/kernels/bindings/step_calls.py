"""The calls into the kernels between the products of a decoder layer, and before and behind the
layers (native/layers/decoder_step.c).

All values of a call are of one type, float32 or bf16. Shapes: N rows, D width, H query heads, K key
heads, E head size, V ids, P positions.
"""

from torch import Tensor

from veneer.kernels.bindings.arguments import CallError, is_narrow, number
from veneer.kernels.bindings.checks import Values
from veneer.kernels.bindings.declarations import declare
from veneer.kernels.bindings.row_calls import SILU

ANY_LEVEL = 3


@declare(
    "veneer_step_norm(*, T, level: int32 0..3)",
    """
    x: T[rows, width]
    delta: T[rows, width]?
    sum_: T[rows, width]?
    out: T[rows, width]?
    rows
    width: 1..
    weight, bias: T[width]?
    is_wide, is_centred: flag
    epsilon, offset: float
    after_weight, after_bias: T[width]?
    after_is_wide, after_is_centred: flag
    after_epsilon, after_offset, scale: float
    """,
)
def step_norm(
    x: Tensor,
    delta: Tensor | None,
    sum_: Tensor | None,
    out: Tensor | None,
    scale: float,
    weight: Tensor | None,
    epsilon: float,
    offset: float,
    is_wide: bool,
    is_centred: bool,
    bias: Tensor | None,
    after_weight: Tensor | None,
    after_epsilon: float,
    after_offset: float,
    after_is_wide: bool,
    after_is_centred: bool,
    after_bias: Tensor | None,
    level: int = ANY_LEVEL,
) -> None:
    """Computes sum_ (N, D) = x + scale * norm(delta) by the weight behind it, or x + scale * delta
    without that weight, and out = norm(sum_). Without a delta, and so without sum_,
    out = norm(x)."""
    if (delta is None) != (sum_ is None):
        raise CallError("a delta requires a sum, and a sum a delta")
    if (weight is None) != (out is None):
        raise CallError("a weight requires an output, and an output a weight")
    if delta is None and (weight is None or after_weight is not None):
        raise CallError("neither a sum nor a norm of x")


@declare(
    "veneer_step_rotate(*, T, level: int32 0..3)",
    """
    q: T[rows@q_row, q_heads@q_head, size]
    k: T[rows@k_row, k_heads@k_head, size]
    cos, sin: F[rows, rotated]
    rows
    q_row, k_row, q_head, k_head: 0..2**40
    q_heads, k_heads
    rotated: 2..size % 2
    is_wide = T * (1 - F)
    neighbours: flag
    check difference = T - F: 0..
    """,
)
def step_rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False, level: int = ANY_LEVEL
) -> None:
    """Rotates the first R of the E values of each head of q (N, H, E) and k (N, K, E), in place.
    cos and sin (N, R) are of their type, or float32. neighbours: a pair is 2 i and 2 i + 1;
    otherwise i and R / 2 + i."""


@declare(
    "veneer_step_gate(*, T, level: int32 0..3)",
    """
    gate: T[rows@gate_row, gates]
    up: T[rows@up_row, width]?
    out: T[rows, width]
    rows
    gate_row: 0..2**40
    gates: 0..width
    up_row: 0..2**40
    width
    activation: 0..5
    check other_widths = (gates - 1) * (width - gates): 0..0
    """,
)
def step_gate(
    gate: Tensor, up: Tensor | None, out: Tensor, activation: int = SILU, level: int = ANY_LEVEL
) -> None:
    """Computes out (N, D) = activation(gate) * up; without up activation(gate). gate (N, D), or
    (N, 1) for all values of a row.

    activation: a number of row_calls.py
    """


@declare(
    "veneer_step_copy(*, T, level: int32 0..3)",
    """
    x: T[rows@row, groups@group, width]
    out: T[rows@out_row, groups@out_group, width]
    rows
    row: 0..2**40
    groups
    group: 0..2**40
    width
    out_row: 0..2**40
    check gap = out_group - width: 0..0
    """,
)
def step_copy(x: Tensor, out: Tensor, level: int = ANY_LEVEL) -> None:
    """Copies x (N, K, W), which may have gaps between its rows and groups, to out, which may have
    gaps between its rows."""


@declare(
    "veneer_step_cap(*, T, level: int32 0..3)",
    "x: T[rows, width]; factors: T[width]?; rows, width; scale, cap: float",
)
def step_cap(
    x: Tensor, factors: Tensor | None, scale: float, cap: float, level: int = ANY_LEVEL
) -> None:
    """Computes x (N, D) = scale * factors (D) * x, and then x = cap * tanh(x / cap) unless cap is
    0, in place."""


@declare(
    "veneer_step_embed(*, T, level: int32 0..3)",
    """
    ids: i64[rows] below entries
    table: W[entries, width]
    h: T[rows, width]
    rows: 1..
    width
    narrow: flag
    scale: float
    kept tensors: object
    body tensors, narrow
    """,
)
def step_embed(
    ids: Tensor, table: Tensor, h: Tensor, scale: float, level: int = ANY_LEVEL
) -> Values:
    """Computes h (N, D) = scale * the rows of table (V, D) with these ids (N). The table may be
    bf16 where h is float32."""
    return {"tensors": (ids, table), "narrow": is_narrow(h, table)}


@declare(
    "veneer_step_angles(*)",
    """
    spans: i64[rows, 5]
    cos_table, sin_table: T[positions, size]
    cos, sin: T[rows, size]
    rows: 1..
    row_bytes = size * item_bytes
    kept tensors: object
    body tensors, item_bytes
    """,
)
def step_angles(
    spans: Tensor, cos_table: Tensor, sin_table: Tensor, cos: Tensor, sin: Tensor
) -> Values:
    """Looks up cos and sin (N, E) in their tables (P, E) by position: the fourth column of spans
    (N, 5) (paged_calls.py)."""
    if spans.is_cpu:
        for position in spans[:, 3].tolist():
            number(position, 0, len(cos_table) - 1)
    return {"tensors": (spans, cos_table, sin_table), "item_bytes": cos.itemsize}
