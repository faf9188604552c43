"""The calls into the kernels that pass states on by one token (native/layers/states.c).

Shapes: N rows, S slots, C channels, L values of a window, K taps, H heads, G groups of heads, P
size and W width of a head's state.
"""

from typing import Any

from torch import Tensor

from veneer.kernels.bindings.arguments import at, number
from veneer.kernels.bindings.checks import Values
from veneer.kernels.bindings.declarations import declare
from veneer.kernels.bindings.step_calls import ANY_LEVEL

FUNCTIONS = ("veneer_state_window", "veneer_state_space", "veneer_state_delta")
MOST_WIDTH = 512
"""Also in native/layers/states.c."""


@declare(
    "veneer_state_window(*, T, level: int32 0..3)",
    """
    x: T[rows@x_row, channels]
    before: T[rows@before_row, channels]?
    behind: T[rows@behind_row, channels]?
    weight: T[channels, taps]
    bias: T[channels]?
    stored: T[slots, channels, length]
    read, written: i64[rows] below slots
    out: T[rows, channels]
    rows: 1..
    x_row, before_row, behind_row: 0..2**40
    slots
    channels: 1..
    length
    taps: 1..
    has_silu: flag
    kept places: object
    check unseen = length + 1 - taps: 0..
    body places
    """,
)
def state_window(
    x: Tensor,
    before: Tensor | None,
    behind: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stored: Tensor,
    read: Tensor,
    written: Tensor,
    out: Tensor,
    has_silu: bool,
    level: int = ANY_LEVEL,
) -> Values:
    """Computes out (N, C) = behind * silu(bias + sums of weight (C, K) * the last K values), of
    which before * x is the newest. The windows stored (S, C, L) in the slots `read` (N), moved on
    by this value, are written to the slots `written`. Without has_silu there is no silu."""
    return {"places": (read, written)}


@declare(
    "veneer_state_space(*, T, level: int32 0..3)",
    f"""
    stored: f32[slots, heads, size, width]
    x: T[rows@x_row, heads * size]
    b: T[rows@b_row, groups * width]
    c: T[rows@c_row, groups * width]
    step: T[rows@step_row, heads]
    gate: T[rows@gate_row, heads * size]?
    log_rate, skip, bias: F[heads]
    read, written: i64[rows] below slots
    out: T[rows, heads * size]
    rows: 1..
    x_row, b_row, c_row, step_row, gate_row: 0..2**40
    slots
    heads: 1..
    size: 1..
    groups: 1..heads
    width: 1..{MOST_WIDTH}
    narrow = F
    kept places: object
    check rest = heads - groups * share: 0..0
    body places, share
    """,
)
def state_space(
    stored: Tensor,
    x: Tensor,
    b: Tensor,
    c: Tensor,
    step: Tensor,
    gate: Tensor | None,
    log_rate: Tensor,
    skip: Tensor,
    bias: Tensor,
    read: Tensor,
    written: Tensor,
    out: Tensor,
    groups: int,
    level: int = ANY_LEVEL,
) -> Values:
    """Computes t = softplus(step + bias) of each head, S' = exp(-exp(log_rate) t) S + t x b^T and
    out (N, H P) = (S' c + skip x) * silu(gate). S are the states stored (S, H, P, W) in the slots
    `read` (N); S' are written to the slots `written`. b, c (N, G W)."""
    return {"places": (read, written), "share": step.shape[1] // max(number(groups), 1)}


@declare(
    "veneer_state_delta(*, T, level: int32 0..3)",
    f"""
    stored: f32[slots, heads, size, width]
    step: T[rows@step_row, groups@step_group, share]
    strength: T[rows@strength_row, groups@strength_group, share]
    x: T[rows@x_row, 2 * groups * size + heads * width]
    log_rate, bias: F[heads]
    read, written: i64[rows] below slots
    out: T[rows, heads * width]
    rows: 1..
    step_row, step_group, strength_row, strength_group, x_row: 0..2**40
    slots
    heads: 1..
    groups: 1..heads
    size: 1..{MOST_WIDTH}
    width: 1..
    narrow = F
    most_strength, epsilon: float
    kept places: object
    check rest = heads - groups * share: 0..0
    body places
    """,
)
def state_delta(
    stored: Tensor,
    step: Tensor,
    strength: Tensor,
    x: Tensor,
    log_rate: Tensor,
    bias: Tensor,
    read: Tensor,
    written: Tensor,
    out: Tensor,
    most_strength: float,
    epsilon: float,
    level: int = ANY_LEVEL,
) -> Values:
    """Computes S = exp(-exp(log_rate) softplus(step + bias)) S0, S' = S + k (b (v - k^T S))^T and
    out (N, H W) = q^T S' of each head, b = most_strength * sigmoid(strength). x is q and k of each
    group, then v of each head; q and k are brought to length 1, and q is divided by sqrt(P). S0 are
    the states stored (S, H, P, W) in the slots `read` (N); S' are written to the slots `written`.
    step, strength (N, G, H / G)."""
    return {"places": (read, written)}


def point_at(struct: Any, stored: Tensor, like: Tensor, read: Tensor, written: Tensor) -> None:
    """Replaces the states of a recorded call by others of the type and shape of `like`, and its
    slots by others, which exist."""
    struct.stored = at(stored, like.dtype, len(stored), *like.shape[1:])
    struct.slots, struct.kept = len(stored), (read, written)
    struct.read, struct.written = read.data_ptr(), written.data_ptr()
