"""The calls into the kernels that pass over rows once (native/layers/fused.c, dropout.c).

Shapes: M rows, D width, H heads, E head size, V vocabulary.
"""

import torch
from torch import Tensor

from veneer.kernels.bindings.arguments import CallError
from veneer.kernels.bindings.checks import Values
from veneer.kernels.bindings.declarations import declare

_READ = "x: T{rows * width}; weight: T[width];"
_WRITTEN = "out: T{rows * width}; scale: f32[rows]; width: 1..;"
SILU, GELU_TANH, GELU_ERF, RELU, RELU_SQUARED, SIGMOID = range(6)
"""Numbers of activations: GELU by its formula with tanh, and by its definition. C computes gates of
SIGMOID without a gradient alone."""


@declare(
    "veneer_rms_norm_forward|veneer_rms_norm_float_forward(*, rows)",
    f"{_READ} grad: unused; {_WRITTEN} epsilon, offset: float; is_wide: flag",
)
def rms_norm_forward(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    scale: Tensor,
    epsilon: float,
    offset: float = 0.0,
    is_wide: bool = False,
) -> None:
    """out = (weight + offset) * x * scale, scale (rows of x) float32 = 1 / root mean square; x
    (..., D), weight (D). x * scale is rounded before it is multiplied, unless is_wide."""


@declare(
    "veneer_rms_norm_backward|veneer_rms_norm_float_backward(*, rows)",
    f"{_READ} grad: T{{rows * width}}; {_WRITTEN} epsilon = 0: float; offset: float; is_wide = 0",
)
def rms_norm_backward(
    x: Tensor, weight: Tensor, grad: Tensor, out: Tensor, scale: Tensor, offset: float = 0.0
) -> None:
    """Writes the gradient of x to out."""


@declare(
    "veneer_gate_forward|veneer_gate_float_forward(*, registers = count / 16,"
    " activation: int32 0..4)",
    "gate: T{count}; up: T{count}?; grad: unused; out: T{count}; grad_gate, grad_up: unused",
)
def gate_forward(gate: Tensor, up: Tensor | None, out: Tensor, activation: int) -> None:
    """Computes out = activation(gate) * up, or without up activation(gate), of a multiple of 16
    values."""
    _check_gate(gate, up, activation)


@declare(
    "veneer_gate_backward|veneer_gate_float_backward(*, registers = count / 16,"
    " activation: int32 0..4)",
    "gate: T{count}; up: T{count}?; grad: T{count}; out: unused; grad_gate: T{count};"
    " grad_up: T{count}?",
)
def gate_backward(
    gate: Tensor,
    up: Tensor | None,
    grad: Tensor,
    grad_gate: Tensor,
    grad_up: Tensor | None,
    activation: int,
) -> None:
    """Writes the gradients of gate and up to grad_gate and grad_up."""
    _check_gate(gate, up, activation)
    if (up is None) != (grad_up is None):
        raise CallError("a gradient of up without up, or up without its gradient")


def _check_gate(gate: Tensor, up: Tensor | None, activation: int) -> None:
    if gate.dtype is torch.float32 and (up is None or activation >= GELU_ERF):
        raise CallError("a gate that C does not compute in float32")


@declare(
    "veneer_rotary|veneer_rotary_float(*, rows)",
    """
    x: T[rows, heads, size]
    cos, sin: F[rows, turned]
    turned: 2..size % 2
    neighbours: flag
    is_wide = 1 - F
    out: T[rows, heads, size]
    heads
    size: 16.. % 16
    back: flag
    check least_type = F: 0..T
    """,
)
def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, neighbours: bool, back: bool
) -> None:
    """Computes out: x (M, H, E), the first R dimensions of each head turned by cos and sin (M, R),
    of x's type or float32. Dimension i is turned with R / 2 + i; neighbours: 2 i with 2 i + 1.
    back: turned by the transpose."""


@declare(
    "veneer_entropy|veneer_entropy_float(*, rows: 0..logit_rows)",
    """
    logits: T[logit_rows, vocabulary]
    targets: i64[rows] below vocabulary
    loss: f32[rows]
    vocabulary: 1..
    softcap: float
    """,
)
def entropy(logits: Tensor, targets: Tensor, loss: Tensor, softcap: float = 0.0) -> None:
    """Computes loss (M) = -log softmax(logits)[target]. Replaces the first M rows of logits (>= M,
    V) by their gradient, softmax - onehot. softcap: logits are first capped, softcap *
    tanh(logits / softcap); 0: they are not."""


@declare(
    "veneer_dropout(*, count)",
    """
    x, out: T[count, width]
    rows: i64[count]
    width
    row_key, column_key, threshold: uint32
    scale: float
    type = T: int32
    body threshold, scale
    """,
)
def dropout(
    x: Tensor, out: Tensor, rows: Tensor, *, row_key: int, column_key: int, share: float
) -> Values:
    """Computes out (M, D) = x / (1 - share), or 0 where the hash of row key (M), column and both
    keys drops a value."""
    return {"threshold": dropout_threshold(share), "scale": 1 - share}


def dropout_threshold(share: float) -> int:
    if not 0 <= share < 1:
        raise CallError(f"dropout of {share}")
    return int(share * 2**32)
