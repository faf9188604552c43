"""DoRA's linear layer as one autograd node: the rows of W + scaling * B A, brought to a trained length.

    y = factor * (x W^T + scaling * (drop(x) A^T) B^T) + bias,     factor = magnitude / norm, per output

`norm` is the length of each row of W + scaling * B A and a constant in backward, as in the paper (section 4.3), so the
gradient needs no weight of its own. A row of length 0 keeps its factor at 1.
Saved for backward: x (by reference), x A^T (M, R) and y (by reference: what follows often keeps it too). With
g' = factor * g everything but the magnitude is LoRA's backward on g':

    dmagnitude = sum over M of g * (y - bias) / magnitude       (y - bias is magnitude / norm times the plain product)

Shapes: M rows, I in_features, O out_features, R rank. Source: Liu et al. 2024, arXiv:2402.09353, equations 5 and 11.
"""

from typing import Any

import torch
from torch import Tensor

from veneer.kernels.lora import Dropout
from veneer.linear import FrozenLinear


def row_norms(A: Tensor, B: Tensor, squares: Tensor, base: FrozenLinear, *, scaling: float) -> Tensor:
    """Length of each row of W + scaling * B A, (O) float32; neither the sum nor B A is formed.

    ||W||^2 + 2 s rowsum(W A^T * B) + s^2 rowsum(B (A A^T) * B); squares: the first term, (O), which never changes.
    W A^T is the base's own product with A's rows as tokens, so it costs what R tokens cost, in any weight format.
    """
    A_RI, B_OR = A.to(base.dtype), B.to(base.dtype)
    cross_OR = base.product(A_RI, None).T.to(squares.dtype)
    A_RI, B_OR = A_RI.to(squares.dtype), B_OR.to(squares.dtype)
    inner = 2 * scaling * (cross_OR * B_OR).sum(1) + scaling**2 * ((B_OR @ (A_RI @ A_RI.T)) * B_OR).sum(1)
    return (squares + inner).clamp_min(0).sqrt()


def row_squares(base: FrozenLinear) -> Tensor:
    """||W||^2 by rows, (O) float32."""
    weight = base.dense_weight(base.dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=wide).float().square()


def _factor(magnitude: Tensor, norm: Tensor) -> Tensor:
    return torch.where(norm > 0, magnitude / norm, torch.ones_like(norm))


class _DoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None,
        base: FrozenLinear, scaling: float, dropout: Dropout | None,
    ) -> Tensor:  # fmt: skip
        A_RI, B_OR = A.to(x.dtype), B.to(x.dtype)
        factor = _factor(magnitude, norm)
        y_MO = base.product(x, bias).view(-1, base.out_features)
        # A fresh layer's factor is 1: the product with the bias in it stays to the bit.
        if bias is None:
            y_MO.mul_(factor.to(x.dtype))
        else:
            y_MO.addcmul_(y_MO - bias, (factor - 1).to(x.dtype))
        x_MI = x.reshape(-1, base.in_features)
        down_MR = (x_MI if dropout is None else dropout.apply(x_MI)) @ A_RI.T
        y_MO.addmm_(down_MR, (B_OR * (scaling * factor[:, None])).to(x.dtype).T)
        y = y_MO.view(*x.shape[:-1], base.out_features)
        ctx.save_for_backward(x, A_RI, B_OR, down_MR, y, bias, magnitude, norm)
        ctx.base, ctx.scaling, ctx.dropout = base, scaling, dropout
        ctx.types = A.dtype, B.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A_RI, B_OR, down_MR, y, bias, magnitude, norm = ctx.saved_tensors
        base, scaling = ctx.base, ctx.scaling
        x_MI, y_MO = x.reshape(-1, base.in_features), y.reshape(-1, base.out_features)
        g_MO = grad.reshape(-1, base.out_features)
        scaled_MO = g_MO * _factor(magnitude, norm).to(x.dtype)
        up_MR = (scaled_MO @ B_OR).mul_(scaling)
        dropped = x_MI if ctx.dropout is None else ctx.dropout.apply(x_MI)
        grad_A = (up_MR.T @ dropped).to(ctx.types[0])
        grad_B = (scaled_MO.T @ down_MR).mul_(scaling).to(ctx.types[1])
        grad_m = _magnitude_gradient(g_MO, y_MO, bias, magnitude, norm)
        lost = ((magnitude == 0) & (norm > 0)).nonzero().flatten()
        if len(lost):  # a row that magnitude 0 wiped out of y is computed again
            plain = x_MI @ base.dense_weight(x.dtype)[lost].T + scaling * down_MR @ B_OR[lost].T
            grad_m[lost] = (g_MO[:, lost] * plain).sum(0, dtype=norm.dtype) / norm[lost]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = base.input_gradient(scaled_MO)
            if ctx.dropout is None:
                grad_x.addmm_(up_MR, A_RI)
            else:
                grad_x += ctx.dropout.apply(up_MR @ A_RI)
            grad_x = grad_x.view(x.shape)
        grad_bias = None
        if ctx.needs_input_grad[5]:
            grad_bias = g_MO.sum(0, dtype=norm.dtype).to(bias.dtype)
        return grad_x, grad_A, grad_B, grad_m, None, grad_bias, None, None, None


def _magnitude_gradient(
    g_MO: Tensor, y_MO: Tensor, bias: Tensor | None, magnitude: Tensor, norm: Tensor
) -> Tensor:
    """Zero where the magnitude has no effect: rows of length 0."""
    without_bias = y_MO if bias is None else y_MO - bias
    total = (g_MO * without_bias).sum(0, dtype=norm.dtype)
    counts = (norm > 0) & (magnitude != 0)
    return torch.where(counts, total / torch.where(counts, magnitude, 1.0), 0.0).to(magnitude.dtype)


def dora_linear(
    x: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, base: FrozenLinear, *,
    scaling: float, dropout: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """x (..., I), A (R, I), B (O, R), magnitude (O), norm (O) by row_norms, bias (O) or None -> (..., O)."""
    apply: Any = _DoRALinear.apply
    return apply(x, A, B, magnitude, norm, bias, base, scaling, dropout)


def dora_linear_reference(
    x: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, base: FrozenLinear, *,
    scaling: float, dropout: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """The same under torch's own autograd, W dense: the meaning of dora_linear."""
    x_MI = x.reshape(-1, x.shape[-1])
    dropped = x_MI if dropout is None else dropout.apply(x_MI)
    y_MO = x_MI @ base.dense_weight(x.dtype).T + scaling * (dropped @ A.to(x.dtype).T) @ B.to(x.dtype).T
    y_MO = y_MO * _factor(magnitude, norm).to(x.dtype)
    y_MO = y_MO if bias is None else y_MO + bias
    return y_MO.view(*x.shape[:-1], -1)
