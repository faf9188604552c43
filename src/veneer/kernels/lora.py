"""The adapted linear layer as one node of the graph.

    y = x W^T + bias + scaling * (drop(x) A^T) B^T

Saved for backward: x (by reference, in its own type: q, k and v keep one between them) and x A^T (M, R).
W is never copied, its gradient never formed. Rank-side products first, so every extra product costs M * D * R:

    U = scaling * (g B)     dB = scaling * g^T (x A^T)     dA = U^T drop(x)     dx = g W + drop(U A)

Shapes: M rows, I in_features, O out_features, R rank. Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.kernels import rank
from veneer.kernels.dropout import drop_out, drop_out_reference
from veneer.kernels.frozen import FrozenLinear, bias_gradient, writable


@dataclass(frozen=True)
class Dropout:
    """rows: (M) row keys; key: step and module; share: probability that an input of A is dropped."""

    rows: Tensor
    key: int
    share: float

    def apply(self, x_MI: Tensor) -> Tensor:
        return drop_out(x_MI, self.rows, key=self.key, dropout=self.share)

    def apply_reference(self, x_MI: Tensor) -> Tensor:
        return drop_out_reference(x_MI, self.rows, key=self.key, dropout=self.share)


class _Dropped(torch.autograd.Function):
    """The mask is computed again in backward, not kept."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, dropout: Dropout) -> Tensor:
        ctx.dropout = dropout
        return dropout.apply(x_MI)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.dropout.apply(grad), None


def dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    """x (..., I) with the mask on it; a fresh tensor, or x itself without one."""
    if dropout is None:
        return x
    apply: Any = _Dropped.apply
    y: Tensor = apply(x.reshape(-1, x.shape[-1]), dropout)
    return y.view(x.shape)


def add_update(
    y_MO: Tensor, x_MI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float, dropout: Dropout | None
) -> Tensor:
    """y += scaling * (drop(x) A^T) B^T. Returns drop(x) A^T, (M, R), which backward wants."""
    down_MR = rank.down(x_MI if dropout is None else dropout.apply(x_MI), A_RI)
    rank.add_up(y_MO, down_MR, B_OR, scaling)
    return down_MR


def update_gradients(
    up_MR: Tensor,
    g_MO: Tensor,
    x_MI: Tensor,
    A_RI: Tensor,
    down_MR: Tensor,
    scaling: float,
    dropout: Dropout | None,
    grad_x: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dA (R, I) and dB (O, R) of an update whose U is up_MR; to grad_x (M, I), if wanted, drop(U A) is added."""
    grad_A = rank.gradient(up_MR, x_MI if dropout is None else dropout.apply(x_MI))
    grad_B = rank.gradient(down_MR, g_MO, scaling).T
    if grad_x is not None:
        if dropout is None:
            rank.add_up(grad_x, up_MR, A_RI.T)
        else:
            grad_x += dropout.apply(up_MR @ A_RI)
    return grad_A, grad_B


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        base: FrozenLinear,
        scaling: float,
        dropout: Dropout | None,
    ) -> Tensor:
        # A and B are cast, never x: a float32 copy of x would live until backward.
        A_RI, B_OR = A.to(x.dtype), B.to(x.dtype)
        y = base.product(x, bias)
        y_MO, x_MI = y.view(-1, base.out_features), x.reshape(-1, base.in_features)
        down_MR = add_update(y_MO, x_MI, A_RI, B_OR, scaling, dropout)
        ctx.save_for_backward(x, A_RI, B_OR, down_MR)
        ctx.base, ctx.scaling, ctx.dropout = base, scaling, dropout
        ctx.types = A.dtype, B.dtype, None if bias is None else bias.dtype
        return writable(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A_RI, B_OR, down_MR = ctx.saved_tensors
        base, scaling, (A_type, B_type, bias_type) = ctx.base, ctx.scaling, ctx.types
        g_MO, x_MI = grad.reshape(-1, base.out_features), x.reshape(-1, base.in_features)
        grad_x = base.input_gradient(g_MO) if ctx.needs_input_grad[0] else None
        up_MR = rank.down(g_MO, B_OR.T, scaling)
        grad_A, grad_B = update_gradients(up_MR, g_MO, x_MI, A_RI, down_MR, scaling, ctx.dropout, grad_x)
        grad_x = None if grad_x is None else grad_x.view(x.shape)
        grad_bias = bias_gradient(g_MO, bias_type) if ctx.needs_input_grad[3] else None
        return grad_x, grad_A.to(A_type), grad_B.to(B_type), grad_bias, None, None, None


def lora_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    base: FrozenLinear,
    *,
    scaling: float,
    dropout: Dropout | None = None,
) -> Tensor:
    """x (..., I), A (R, I), B (O, R), bias (O) or None -> (..., O) in x's type."""
    apply: Any = _LoRALinear.apply
    return apply(x, A, B, bias, base, scaling, dropout)


def lora_linear_reference(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    base: FrozenLinear,
    *,
    scaling: float,
    dropout: Dropout | None = None,
) -> Tensor:
    """The same under torch's own autograd, W dense: the meaning of lora_linear."""
    x_MI = x.reshape(-1, x.shape[-1])
    dropped = x_MI if dropout is None else dropout.apply_reference(x_MI)
    y_MO = x_MI @ base.dense_weight(x.dtype).T + scaling * (dropped @ A.to(x.dtype).T) @ B.to(x.dtype).T
    y_MO = y_MO if bias is None else y_MO + bias
    return y_MO.view(*x.shape[:-1], -1)
