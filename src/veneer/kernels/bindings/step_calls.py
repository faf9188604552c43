"""The calls into the kernels between the products of a decoder layer
(native/layers/decoder_step.c).

All values of a call are of one type, float32 or bf16. Shapes: N rows, D width, H query heads, K key
heads, E head size.
"""

from torch import Tensor

from veneer.kernels.bindings.arguments import CallError, number
from veneer.kernels.bindings.checks import Values
from veneer.kernels.bindings.declarations import declare

ANY_LEVEL = 3


@declare(
    "veneer_step_norm(*, T, level: int32 0..3)",
    """
    x: T[rows, width]
    delta: T[rows, width]?
    weight: T[width]
    sum_: T[rows, width]?
    out: T[rows, width]
    rows
    width: 1..
    epsilon: float
    """,
)
def step_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    sum_: Tensor | None,
    out: Tensor,
    epsilon: float,
    level: int = ANY_LEVEL,
) -> None:
    """Computes sum_ (N, D) = x + delta, and out = weight * the normalised sum_. Without a delta,
    and so without sum_, out = weight * the normalised x."""
    if (delta is None) != (sum_ is None):
        raise CallError("a delta requires a sum, and a sum a delta")


@declare(
    "veneer_step_rotate(*, T, level: int32 0..3)",
    """
    q: T[rows, q_width]
    k: T[rows, k_width]
    cos, sin: T[rows, size]
    rows
    q_heads = q_width / size
    k_heads = k_width / size
    size: 2.. % 2
    """,
)
def step_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, level: int = ANY_LEVEL) -> None:
    """Turns each head of q (N, H E) and k (N, K E) in place; cos and sin (N, E)."""


@declare("veneer_step_gate(*, T, level: int32 0..3)", "gate, up, out: T[rows, width]; rows, width")
def step_gate(gate: Tensor, up: Tensor, out: Tensor, level: int = ANY_LEVEL) -> None:
    """out (N, D) = silu(gate) * up."""


@declare(
    "veneer_step_inputs(*)",
    """
    ids: i64[rows] below entries
    spans: i64[rows, 5]
    table: T[entries, columns]
    cos_table, sin_table: T[positions, head_size]
    h: T[rows, columns]
    cos, sin: T[rows, head_size]
    rows: 1..
    width = columns * item_bytes
    size = head_size * item_bytes
    kept tensors: object
    body tensors, item_bytes
    """,
)
def step_inputs(
    ids: Tensor,
    spans: Tensor,
    table: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    h: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Values:
    """Looks up h (N, D) in table (V, D) by ids (N), and cos and sin (N, E) in their tables (P, E)
    by position: the fourth column of spans (N, 5) (paged_calls.py)."""
    if spans.is_cpu:
        for position in spans[:, 3].tolist():
            number(position, 0, len(cos_table) - 1)
    return {"tensors": (ids, spans, cos_table, sin_table), "item_bytes": h.itemsize}
