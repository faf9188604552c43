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
from veneer.linear import FrozenLinear, writable


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
        x_MI = x.reshape(-1, base.in_features)
        if dropout is not None:
            x_MI = dropout.apply(x_MI)
        down_MR = rank.down(x_MI, A_RI)
        rank.add_up(y.view(-1, base.out_features), down_MR, B_OR, scaling)
        ctx.save_for_backward(x, A_RI, B_OR, down_MR)
        ctx.base, ctx.scaling, ctx.dropout = base, scaling, dropout
        ctx.types = A.dtype, B.dtype, None if bias is None else bias.dtype
        return writable(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A_RI, B_OR, down_MR = ctx.saved_tensors
        base, scaling = ctx.base, ctx.scaling
        g_MO = grad.reshape(-1, base.out_features)
        x_MI = x.reshape(-1, base.in_features)
        up_MR = rank.down(g_MO, B_OR.T, scaling)
        dropped = x_MI if ctx.dropout is None else ctx.dropout.apply(x_MI)
        grad_A = rank.gradient(up_MR, dropped).to(ctx.types[0])
        grad_B = rank.gradient(down_MR, g_MO, scaling).T.to(ctx.types[1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = base.input_gradient(g_MO)
            if ctx.dropout is None:
                rank.add_up(grad_x, up_MR, A_RI.T)
            else:
                grad_x += ctx.dropout.apply(up_MR @ A_RI)
            grad_x = grad_x.view(x.shape)
        grad_bias = None
        if ctx.needs_input_grad[3]:
            grad_bias = g_MO.sum(0, dtype=torch.promote_types(g_MO.dtype, torch.float32)).to(ctx.types[2])
        return grad_x, grad_A, grad_B, grad_bias, None, None, None


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
