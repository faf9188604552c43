"""A linear layer with LoRA, or several with the same x, as one node of the graph.

    y = x W^T + bias + scaling * (drop(x) A^T) B^T

    U = scaling * (g B)     dB = scaling * g^T (x A^T)     dA = U^T drop(x)     dx = g W + drop(U A)

g is the gradient of y, and U that of drop(x) A^T. Backward needs x A^T (M, R) and x, saved by
reference in its own type, so that q, k and v share one x. Several layers have their A joined, so
that x is read once and its gradient summed in one place. W is not copied and its gradient is not
formed. Products with the rank come first, so every extra product costs M * D * R. Shapes: M rows, I
in_features, O out_features, R rank. Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.dense import rank
from veneer.kernels.dense.dropout import Dropout
from veneer.kernels.dense.frozen import DivisibleLinear, FrozenLinear, bias_gradient, writable


class _DropoutFunction(torch.autograd.Function):
    """Dropout that computes its mask again in backward instead of saving it."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, dropout: Dropout) -> Tensor:
        ctx.dropout = dropout
        return dropout.apply(x_MI)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.dropout.apply(grad), None


def dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    """Returns x (..., I) after dropout: a new tensor, or x itself without dropout."""
    if dropout is None:
        return x
    y: Tensor = _DropoutFunction.apply(x.reshape(-1, x.shape[-1]), dropout)
    return y.view(x.shape)


def add_update(
    y_MO: Tensor, x_MI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float, dropout: Dropout | None
) -> Tensor:
    """Adds scaling * (drop(x) A^T) B^T to y. Returns drop(x) A^T, (M, R), for backward."""
    down_MR = rank.down(x_MI, A_RI, dropout=dropout)
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
    """Returns the gradients dA (R, I) and dB (O, R); up_MR is U. Adds drop(U A) to grad_x (M, I)
    unless it is None."""
    if grad_x is not None:
        rank.add_up(grad_x, up_MR, A_RI.T, dropout=dropout)
    return rank.gradient(up_MR, x_MI, dropout=dropout), rank.gradient(down_MR, g_MO, scaling).T


@dataclass(frozen=True)
class LoRALinear:
    """A frozen linear layer with an update: A (R, I), B (O, R), bias (O) or None."""

    A: Tensor
    B: Tensor
    bias: Tensor | None
    base: FrozenLinear
    scaling: float
    dropout: Dropout | None = None


def unadapted(base: FrozenLinear) -> LoRALinear:
    """Returns the layer with an update of rank 0."""
    A = torch.empty(0, base.in_features, device=base.device)
    return LoRALinear(A, A.new_empty(base.out_features, 0), base.own_bias(), base, 1.0)


def output_rows(layer: LoRALinear, rows: slice) -> LoRALinear | None:
    """Returns the layer that computes these outputs alone, by views of weight, bias and B. Returns
    None for a weight without such views."""
    base = layer.base.output_rows(rows) if isinstance(layer.base, DivisibleLinear) else None
    if base is None:
        return None
    bias = None if layer.bias is None else layer.bias[rows]
    return replace(layer, B=layer.B.detach()[rows], bias=bias, base=base)


def filled(layer: LoRALinear, x: Tensor) -> LoRALinear:
    """Pads the rank with zeros to a multiple of 16, if the kernels can then compute the layer for
    x (..., I)."""
    missing, width = -len(layer.A) % 16, x.shape[-1]
    if not missing or layer.A.dtype is not torch.float32:
        return layer
    rows, size = x.reshape(-1, width), len(layer.A) + missing
    if not (rank.is_compiled(size, width, rows) and rank.is_compiled(size, len(layer.B), rows)):
        return layer
    return replace(layer, A=F.pad(layer.A, (0, 0, 0, missing)), B=F.pad(layer.B, (0, missing)))


class _LoRALinears(torch.autograd.Function):
    """layers: (base, scaling, dropout) of each; factors: A, B and bias of each, in one list."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layers: tuple[tuple[FrozenLinear, float, Dropout | None], ...],
        *factors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        x_MI = x.reshape(-1, x.shape[-1])
        # Factors are rounded, never x: a float32 copy of x would live until backward.
        A = [rank.typed(_required(A), x) for A in factors[0::3]]
        B = [rank.typed(_required(B), x) for B in factors[1::3]]
        down_MR = x.new_empty(x_MI.shape[0], sum(len(A_RI) for A_RI in A))
        downs = down_MR.split([len(A_RI) for A_RI in A], dim=1)
        joint = rank.together([len(A_RI) for A_RI in A], [dropout for *_, dropout in layers])
        if joint:
            rank.down(x_MI, _joined(A), out=down_MR)
        outputs = []
        for (base, scaling, dropout), A_RI, B_OR, bias, down in zip(
            layers, A, B, factors[2::3], downs, strict=True
        ):
            y = base.product(x, bias)
            if not joint:
                rank.down(x_MI, A_RI, out=down, dropout=dropout)
            rank.add_up(y.view(-1, base.out_features), down, B_OR, scaling)
            outputs.append(writable(y))
        ctx.save_for_backward(x, down_MR, *A, *B)
        ctx.layers, ctx.joint = layers, joint
        ctx.types = [None if factor is None else factor.dtype for factor in factors]
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, down_MR, *factors), layers, types = ctx.saved_tensors, ctx.layers, ctx.types
        A, B = factors[: len(layers)], factors[len(layers) :]
        x_MI, sizes = x.reshape(-1, x.shape[-1]), [len(A_RI) for A_RI in A]
        up_MR, grad_x = torch.empty_like(down_MR), None
        sides = zip(down_MR.split(sizes, dim=1), up_MR.split(sizes, dim=1), strict=True)
        gradients: list[Tensor | None] = []
        for number, ((base, scaling, _), (down, up), grad) in enumerate(
            zip(layers, sides, grads, strict=True)
        ):
            g_MO = grad.reshape(-1, base.out_features)
            rank.down(g_MO, B[number].T, scaling, out=up)
            if ctx.needs_input_grad[0]:
                grad_x = base.input_gradient(g_MO, grad_x)
            grad_B = rank.gradient(down, g_MO, scaling).T
            wants_bias = ctx.needs_input_grad[2 + 3 * number + 2]
            gradients += [
                None,
                grad_B,
                bias_gradient(g_MO, types[3 * number + 2]) if wants_bias else None,
            ]
        dropouts = [dropout for *_, dropout in layers]
        gradients[0::3] = rank.gradients(up_MR, x_MI, sizes, dropouts)
        if grad_x is not None and ctx.joint:
            rank.add_up(grad_x, up_MR, _joined(A).T)
        elif grad_x is not None:
            for up, A_RI, dropout in zip(up_MR.split(sizes, dim=1), A, dropouts, strict=True):
                rank.add_up(grad_x, up, A_RI.T, dropout=dropout)
        typed = (
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, types, strict=True)
        )
        return None if grad_x is None else grad_x.view(x.shape), None, *typed


def _required(factor: Tensor | None) -> Tensor:
    assert factor is not None
    return factor


def _joined(A: Sequence[Tensor]) -> Tensor:
    return A[0] if len(A) == 1 else torch.cat(list(A))


def lora_linears(x: Tensor, layers: Sequence[LoRALinear]) -> tuple[Tensor, ...]:
    """Computes each layer of x (..., I): (..., O) in x's type. One node: x is read once, and its
    gradient is summed in place."""
    layers = [filled(layer, x) for layer in layers]
    factors = (factor for layer in layers for factor in (layer.A, layer.B, layer.bias))
    constants = tuple((layer.base, layer.scaling, layer.dropout) for layer in layers)
    return _LoRALinears.apply(x, constants, *factors)


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
    """lora_linears of one layer: x (..., I) -> (..., O) in x's type."""
    return lora_linears(x, [LoRALinear(A, B, bias, base, scaling, dropout)])[0]


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
    """Computes lora_linear plainly: dense W, torch's autograd."""
    x_MI = x.reshape(-1, x.shape[-1])
    dropped = x_MI if dropout is None else dropout.apply_reference(x_MI)
    y_MO = (
        x_MI @ base.dense_weight(x.dtype).T
        + scaling * (dropped @ A.to(x.dtype).T) @ B.to(x.dtype).T
    )
    y_MO = y_MO if bias is None else y_MO + bias
    return y_MO.view(*x.shape[:-1], -1)
