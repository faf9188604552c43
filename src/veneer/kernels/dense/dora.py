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

Compiled as kernels/dense/rank.py is (native/dora.c): the factor joins the pass that adds the
update; in backward one pass over g and y gives g', its product with B and the magnitude's sums.

Shapes: M rows, I in_features, O out_features, R rank. Source: Liu et al. 2024, arXiv:2402.09353,
equations 5 and 11.
"""

from typing import Any

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.kernels.bindings import calls
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
    dense = isinstance(base, DenseLinear)
    cross_OR = (
        rank.down(base.dense_weight(base.dtype), A_RI) if dense else base.product(A_RI, None).T
    )
    if rank.is_compiled(A.shape[0], len(squares), B_OR):
        wide, norm = A.to(torch.float32), torch.empty_like(squares)
        calls.dora_norms(cross_OR.contiguous(), B_OR, wide @ wide.T, squares, norm, scaling)
        return norm
    cross_OR, A_RI, B_OR = (t.to(squares.dtype) for t in (cross_OR, A_RI, B_OR))
    inner = 2 * scaling * (cross_OR * B_OR).sum(1) + scaling**2 * (
        (B_OR @ (A_RI @ A_RI.T)) * B_OR
    ).sum(1)
    return (squares + inner).clamp_min(0).sqrt()


def row_squares(base: FrozenLinear) -> Tensor:
    """||W||^2 by rows, (O) float32."""
    weight = base.dense_weight(base.dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=wide).float().square()


def row_factor(magnitude: Tensor, norm: Tensor) -> Tensor:
    """magnitude / norm, (O); 1 where a row has no length."""
    real = norm > 0
    return torch.where(real, magnitude / torch.where(real, norm, 1.0), 1.0)


def _across(matrix: Tensor) -> Tensor:
    """(R, K) -> (K / 2, R) words of two neighbours of a row."""
    return matrix.contiguous().view(torch.int32).T.contiguous()


def _turn_forward(
    y_MO: Tensor,
    down_MR: Tensor,
    B_OR: Tensor,
    bias: Tensor | None,
    magnitude: Tensor,
    norm: Tensor,
    scaling: float,
) -> None:
    """y, the base's product with the bias in it, becomes factor * (y - bias + scaling * down B^T) +
    bias.

    A fresh layer's factor is 1 and its update 0: then no bit of y changes.
    """
    width, size = B_OR.shape
    given = [y_MO, down_MR, *([] if bias is None else [bias])]
    if rank.is_compiled(size, width, *given):
        calls.dora_forward(y_MO, down_MR, _across(B_OR), bias, magnitude, norm, scaling)
        return
    factor = row_factor(magnitude, norm)
    if bias is None:
        y_MO.mul_(factor.to(y_MO.dtype))
    else:
        y_MO.addcmul_(y_MO - bias, (factor - 1).to(y_MO.dtype))
    y_MO.addmm_(down_MR, (B_OR * (scaling * factor[:, None])).to(y_MO.dtype).T)


def _turn_backward(
    g_MO: Tensor,
    y_MO: Tensor,
    B_OR: Tensor,
    bias: Tensor | None,
    magnitude: Tensor,
    norm: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """factor * g (M, O), scaling * (factor * g) B (M, R), the magnitude's gradient (O), and whether
    a row is lost: magnitude 0 wiped it out of y, and its gradient is still to be computed. Rows of
    length 0 have none."""
    width, size = B_OR.shape
    given = [g_MO, y_MO, *([] if bias is None else [bias])]
    if rank.is_compiled(size, width, *given):
        turned, up = torch.empty_like(g_MO), g_MO.new_empty(len(g_MO), size)
        blocks, grad = calls.dora_blocks(len(g_MO)), torch.empty_like(magnitude)
        partial = torch.empty(blocks, width, dtype=torch.float32, device=g_MO.device)
        calls.dora_backward(
            g_MO,
            y_MO,
            _across(B_OR.T),
            bias,
            magnitude,
            norm,
            scaling,
            up=up,
            turned=turned,
            partial=partial,
        )
        return turned, up, grad, bool(calls.dora_magnitudes(partial, magnitude, norm, grad))
    turned = g_MO * row_factor(magnitude, norm).to(g_MO.dtype)
    without_bias = y_MO if bias is None else y_MO - bias
    total = (g_MO * without_bias).sum(0, dtype=norm.dtype)
    counts = (norm > 0) & (magnitude != 0)
    grad = torch.where(counts, total / torch.where(counts, magnitude, 1.0), 0.0).to(magnitude.dtype)
    lost = not magnitude.is_meta and bool(((magnitude == 0) & (norm > 0)).any())
    return turned, rank.down(turned, B_OR.T, scaling), grad, lost


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
        _turn_forward(y.view(-1, base.out_features), down_MR, B_OR, bias, magnitude, norm, scaling)
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
        turned_MO, up_MR, grad_m, lost = _turn_backward(
            g_MO, y_MO, B_OR, bias, magnitude, norm, scaling
        )
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
    """ConfigError where the model added into y, which belongs to backward too."""
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
    """x (..., I), A (R, I), B (O, R), magnitude (O), norm (O) by row_norms, bias (O) or None ->
    (..., O)."""
    apply: Any = _DoRALinear.apply
    return apply(x, A, B, magnitude, norm, bias, base, scaling, dropout)


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
    """The same under torch's own autograd, W dense: the meaning of dora_linear."""
    x_MI = x.reshape(-1, x.shape[-1])
    dropped = x_MI if dropout is None else dropout.apply_reference(x_MI)
    y_MO = (
        x_MI @ base.dense_weight(x.dtype).T
        + scaling * (dropped @ A.to(x.dtype).T) @ B.to(x.dtype).T
    )
    y_MO = y_MO * row_factor(magnitude, norm).to(x.dtype)
    y_MO = y_MO if bias is None else y_MO + bias
    return y_MO.view(*x.shape[:-1], -1)
