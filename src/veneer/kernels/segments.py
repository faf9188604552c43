"""One frozen linear layer whose rows have adapters of their own: the base's product of all rows, and on some of them updates.

    y = x W^T + bias,    y[rows] += scaling * (drop(x[rows]) A^T) B^T     for every update

Rows that no update names are the base's to the bit; rows that several name get all of them. As in kernels/lora.py W is
never copied, its gradient never formed, and what is kept for backward is x, by reference, and each x A^T.
Shapes: M rows, m of an update, I in_features, O out_features, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.kernels import rank
from veneer.kernels.lora import Dropout
from veneer.linear import FrozenLinear, frozen_product


@dataclass(frozen=True)
class Update:
    """rows: which, from 0 <= start < stop <= M; A (R, I), B (O, R); dropout: with a key for each of the m rows."""

    rows: slice
    A: Tensor
    B: Tensor
    scaling: float
    dropout: Dropout | None = None


class _WithUpdates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MI: Tensor, bias: Tensor | None, base: FrozenLinear, updates: Sequence[Update], *factors: Tensor
    ) -> Tensor:  # fmt: skip
        y_MO = base.product(x_MI, bias)
        kept: list[Tensor] = []
        for update in updates:
            A_RI, B_OR = update.A.to(x_MI.dtype), update.B.to(x_MI.dtype)
            x = x_MI[update.rows]
            down = rank.down(x if update.dropout is None else update.dropout.apply(x), A_RI)
            rank.add_up(y_MO[update.rows], down, B_OR, update.scaling)
            kept += [A_RI, B_OR, down]
        ctx.save_for_backward(x_MI, *kept)
        ctx.base, ctx.bias_type = base, None if bias is None else bias.dtype
        ctx.updates = [(u.rows, u.scaling, u.dropout, u.A.dtype, u.B.dtype) for u in updates]
        return y_MO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, *kept = ctx.saved_tensors
        grad_x = ctx.base.input_gradient(grad) if ctx.needs_input_grad[0] else None
        grads: list[Tensor] = []
        for number, (rows, scaling, dropout, type_A, type_B) in enumerate(ctx.updates):
            A_RI, B_OR, down = kept[3 * number : 3 * number + 3]
            g, x = grad[rows], x_MI[rows]
            up = rank.down(g, B_OR.T, scaling)
            grads.append(rank.gradient(up, x if dropout is None else dropout.apply(x)).to(type_A))
            grads.append(rank.gradient(down, g, scaling).T.to(type_B))
            if grad_x is None:
                continue
            if dropout is None:
                rank.add_up(grad_x[rows], up, A_RI.T)
            else:
                grad_x[rows] += dropout.apply(up @ A_RI)
        grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias_type)
        return grad_x, grad_bias, None, None, *grads


def linear_with_updates(
    x_MI: Tensor, bias: Tensor | None, base: FrozenLinear, updates: Sequence[Update]
) -> Tensor:
    """(M, I) -> (M, O) in x's type; gradients go to x, bias and every factor."""
    if not updates:
        return frozen_product(x_MI, bias, base)
    apply: Any = _WithUpdates.apply
    factors = [factor for update in updates for factor in (update.A, update.B)]
    return apply(x_MI, bias, base, tuple(updates), *factors)


def linear_with_updates_reference(
    x_MI: Tensor, bias: Tensor | None, base: FrozenLinear, updates: Sequence[Update]
) -> Tensor:
    """The same under torch's own autograd, W dense: the meaning of linear_with_updates."""
    y_MO = x_MI @ base.dense_weight(x_MI.dtype).T
    y_MO = y_MO if bias is None else y_MO + bias
    for update in updates:
        x = x_MI[update.rows]
        seen = x if update.dropout is None else update.dropout.apply_reference(x)
        added = update.scaling * (seen @ update.A.to(x.dtype).T) @ update.B.to(x.dtype).T
        pad = (0, 0, update.rows.start, len(x_MI) - update.rows.stop)
        y_MO = y_MO + torch.nn.functional.pad(added, pad)
    return y_MO
