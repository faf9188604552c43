"""DoRA's linear layer as one autograd node: the rows of W + scaling * B A, brought to a trained
length.

    y = factor * (x W^T + scaling * (drop(x) A^T) B^T) + bias,
        factor = magnitude / norm, per output

`norm` is the length of each row of W + scaling * B A and a constant in backward, as in the paper
(section 4.3), so the gradient needs no weight of its own. A row of length 0 keeps its factor at 1.
Saved for backward: x (by reference), x A^T (M, R) and y (by reference: what follows often keeps it
too). With g' = factor * g everything but the magnitude is LoRA's backward on g':

    dmagnitude = sum over M of g * (y - bias) / magnitude
        (y - bias is magnitude / norm times the plain product)

The factor is a pass of its own over y, and over g in backward: a step takes 1.20 times LoRA's. With
a compiled pass it took 1.06 (docs/log.md), which did not pay for its code.

Shapes: M rows, I in_features, O out_features, R rank. Source: Liu et al. 2024, arXiv:2402.09353,
equations 5 and 11.
"""

from typing import Any

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.kernels.dense import rank
from veneer.kernels.dense.dropout import Dropout
from veneer.kernels.dense.frozen import DenseLinear, FrozenLinear, bias_gradient, writable
from veneer.kernels.dense.lora import update_gradients


def row_norms(
    A: Tensor, B: Tensor, squares: Tensor, base: FrozenLinear, *, scaling: float
) -> Tensor:
    """Length of each row of W + scaling * B A, (O) float32; neither the sum nor B A is formed.

    ||W||^2 + 2 s rowsum(W A^T * B) + s^2 rowsum(B (A A^T) * B); squares: the first term, (O), which
    never changes.
    W A^T costs what R tokens cost; a weight that is no dense matrix forms it as its own product
    with A's rows as
    tokens.
    """
    A_RI, B_OR = A.to(base.dtype), B.to(base.dtype)
    dense = isinstance(base, DenseLinear) and base.weight.is_contiguous()
    cross_OR = (
        rank.down(base.dense_weight(base.dtype), A_RI) if dense else base.product(A_RI, None).T
    )
    cross_OR, A_RI, B_OR = (t.to(squares.dtype) for t in (cross_OR, A_RI, B_OR))
    inner = 2 * scaling * (cross_OR * B_OR).sum(1) + scaling**2 * (
        (B_OR @ (A_RI @ A_RI.T)) * B_OR
    ).sum(1)
    return (squares + inner).clamp_min(0).sqrt()


def row_squares(base: FrozenLinear) -> Tensor:
    """Computes ||W||^2 by rows, (O) float32."""
    weight = base.dense_weight(base.dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=wide).float().square()


def row_factor(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Returns magnitude / norm, (O); 1 where a row has no length."""
    real = norm > 0
    return torch.where(real, magnitude / torch.where(real, norm, 1.0), 1.0)


def _apply_factor(
    y_MO: Tensor, down_MR: Tensor, B_OR: Tensor, bias: Tensor | None, factor: Tensor, scaling: float
) -> None:
    """Turns y, the base's product with the bias in it, into factor * (y - bias + scaling * down
    B^T) + bias.

    A fresh layer's factor is 1 and its update 0: then no bit of y changes. The factor less 1 is
    what is rounded to y's type: bf16 has no numbers between 1 and 1.0078.
    """
    without_bias = y_MO if bias is None else y_MO - bias
    y_MO.addcmul_(without_bias, (factor - 1).to(y_MO.dtype))
    y_MO.addmm_(down_MR, (B_OR * (scaling * factor[:, None])).to(y_MO.dtype).T)


def _magnitude_gradient(
    g_MO: Tensor, y_MO: Tensor, bias: Tensor | None, magnitude: Tensor, norm: Tensor
) -> tuple[Tensor, bool]:
    """Returns the magnitude's gradient (O), and whether a row is lost: magnitude 0 wiped it out of
    y, and its gradient is still to be computed. Rows of length 0 have none."""
    without_bias = y_MO if bias is None else y_MO - bias
    total = (g_MO * without_bias).sum(0, dtype=norm.dtype)
    counts = (norm > 0) & (magnitude != 0)
    grad = torch.where(counts, total / torch.where(counts, magnitude, 1.0), 0.0).to(magnitude.dtype)
    return grad, not magnitude.is_meta and bool(((magnitude == 0) & (norm > 0)).any())


class _DoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        bias: Tensor | None,
        base: FrozenLinear,
        scaling: float,
        dropout: Dropout | None,
    ) -> Tensor:
        A_RI, B_OR = A.to(x.dtype), B.to(x.dtype)
        y = writable(base.product(x, bias))
        x_MI = x.reshape(-1, base.in_features)
        down_MR = rank.down(x_MI, A_RI, dropout=dropout)
        y_MO, factor = y.view(-1, base.out_features), row_factor(magnitude, norm)
        _apply_factor(y_MO, down_MR, B_OR, bias, factor, scaling)
        ctx.save_for_backward(x, A_RI, B_OR, down_MR, y, bias, magnitude, norm)
        ctx.base, ctx.scaling, ctx.dropout = base, scaling, dropout
        ctx.types = A.dtype, B.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A_RI, B_OR, down_MR, y, bias, magnitude, norm = _saved(ctx)
        base, scaling = ctx.base, ctx.scaling
        x_MI, y_MO = x.reshape(-1, base.in_features), y.reshape(-1, base.out_features)
        g_MO = grad.reshape(-1, base.out_features)
        grad_m, lost = _magnitude_gradient(g_MO, y_MO, bias, magnitude, norm)
        turned_MO = torch.addcmul(g_MO, g_MO, (row_factor(magnitude, norm) - 1).to(g_MO.dtype))
        up_MR = rank.down(turned_MO, B_OR.T, scaling)
        if lost:
            rows = ((magnitude == 0) & (norm > 0)).nonzero().flatten()
            plain = x_MI @ base.dense_weight(x.dtype)[rows].T + scaling * down_MR @ B_OR[rows].T
            grad_m[rows] = (g_MO[:, rows] * plain).sum(0, dtype=norm.dtype) / norm[rows]
        grad_x = base.input_gradient(turned_MO) if ctx.needs_input_grad[0] else None
        grad_A, grad_B = update_gradients(
            up_MR, turned_MO, x_MI, A_RI, down_MR, scaling, ctx.dropout, grad_x
        )
        grad_A, grad_B = grad_A.to(ctx.types[0]), grad_B.to(ctx.types[1])
        grad_x = None if grad_x is None else grad_x.view(x.shape)
        grad_bias = bias_gradient(g_MO, bias.dtype) if ctx.needs_input_grad[5] else None
        return grad_x, grad_A, grad_B, grad_m, None, grad_bias, None, None, None


def _saved(ctx: Any) -> tuple[Any, ...]:
    """Returns the saved tensors. Raises ConfigError if the model added into y, which is one."""
    try:
        saved: tuple[Any, ...] = ctx.saved_tensors
    except RuntimeError as fault:
        if "modified by an inplace operation" not in str(fault):
            raise
        raise ConfigError(
            f"DoRA keeps what a layer gives for backward, and the model writes into what one of "
            f"{ctx.base.in_features} to"
            f" {ctx.base.out_features} features gave it",
            next_step="Take method lora, or leave that layer out (method.exclude).",
        ) from fault
    return saved


def dora_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    base: FrozenLinear,
    *,
    scaling: float,
    dropout: Dropout | None = None,
) -> Tensor:
    """Computes DoRA: x (..., I), A (R, I), B (O, R), magnitude (O), norm (O) by row_norms, bias (O)
    or None -> (..., O)."""
    return _DoRALinear.apply(x, A, B, magnitude, norm, bias, base, scaling, dropout)


def dora_linear_reference(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    base: FrozenLinear,
    *,
    scaling: float,
    dropout: Dropout | None = None,
) -> Tensor:
    """Computes the same under torch's own autograd, W dense: the meaning of dora_linear."""
    x_MI = x.reshape(-1, x.shape[-1])
    dropped = x_MI if dropout is None else dropout.apply_reference(x_MI)
    y_MO = (
        x_MI @ base.dense_weight(x.dtype).T
        + scaling * (dropped @ A.to(x.dtype).T) @ B.to(x.dtype).T
    )
    y_MO = y_MO * row_factor(magnitude, norm).to(x.dtype)
    y_MO = y_MO if bias is None else y_MO + bias
    return y_MO.view(*x.shape[:-1], -1)
