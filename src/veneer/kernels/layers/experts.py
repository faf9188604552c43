"""The experts of a mixture with LoRA, as one node of the graph.

    y[m] = sum over k of w[m, k] * down_e(gate(gate_up_e(x[m]))),    e = index[m, k]

Both products of an expert carry updates, of several adapters on different rows. The rows of x are
sorted by expert, so each expert's rows are a group, and a group costs no Python of its own
(tape/repeated.py).

Forward saves x, the outputs of gate_up and the narrow products x A^T. Backward gathers the rows of
x again and recomputes the gate. The gradient of a weight w[m, k] needs no output of `down`:

    dw[m, k] = g[m] . down_e(a) = (g[m] W_e) . a + g[m] . bias_e,    a the output of the gate

This runs in bf16 only, on processors that multiply pairs of bf16. Knows nothing of modules. Shapes:
M rows of x, K experts of a row, S = M K rows sorted by expert, E experts, D hidden, F the width of
an expert, R rank.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.bindings import rank_calls
from veneer.kernels.dense import products
from veneer.kernels.dense.fused import gated_reference
from veneer.kernels.layers.expert_operands import (
    Experts,
    ExpertUpdate,
    Matrices,
    StackFactors,
    UpdateScales,
    filled,
)
from veneer.kernels.layers.expert_rows import SortedRows, sort_rows
from veneer.kernels.tape.repeated import Compute, Groups, for_each_group

FACTORS = 4
"""Factors of an update: A and B for gate_up, A and B for down."""


def experts_with_lora(
    x: Tensor, index: Tensor, weights: Tensor, experts: Experts, updates: Sequence[ExpertUpdate]
) -> Tensor:
    """Returns y (M, D) of x (M, D), the experts' numbers and weights (M, K). Gradients go to x,
    weights and factors. Requires `usable`."""
    updates = [
        update._replace(
            gate_up=update.gate_up and filled(update.gate_up),
            down=update.down and filled(update.down),
        )
        for update in updates
    ]
    factors = [factor for update in updates for factor in update.factors]
    scales = [update.scales for update in updates]
    return _Experts.apply(x, weights, index, experts, scales, *factors)


class _Experts(torch.autograd.Function):
    """factors: those of one update after the other. They are saved like x, not in ctx, so that
    backward refuses factors that have changed, and checkpointing frees padded ones."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        index: Tensor,
        experts: Experts,
        scales: Sequence[UpdateScales],
        *factors: Tensor | None,
    ) -> Tensor:
        updates = _updates(scales, factors)
        layout = sort_rows(index, experts.down.count)
        groups = [layout.groups_within(update.rows) for update in updates]
        sorted_x = layout.gather(x)
        outputs = [x.new_empty(len(sorted_x), part.stop - part.start) for part in experts.parts()]
        _multiply(sorted_x, experts.gate_up, experts.parts(), outputs, layout.groups)
        narrow = [
            _add_update(sorted_x, update.gate_up, experts.parts(), outputs, own)
            for update, own in zip(updates, groups, strict=True)
        ]
        inner = experts.gated(outputs).contiguous()
        y = torch.empty_like(sorted_x)
        whole = [slice(0, y.shape[1])]
        _multiply(inner, experts.down, whole, [y], layout.groups)
        narrow += [
            _add_update(inner, update.down, whole, [y], own)
            for update, own in zip(updates, groups, strict=True)
        ]
        ctx.save_for_backward(x, weights, *layout.tensors, *factors, *outputs, *narrow)
        ctx.layout, ctx.groups, ctx.experts, ctx.scales = layout.numbers, groups, experts, scales
        return layout.sum_rows(y, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        experts, parts = ctx.experts, ctx.experts.parts()
        x, weights, slots, places, *saved = ctx.saved_tensors
        num_factors = FACTORS * len(ctx.scales)
        updates, saved = _updates(ctx.scales, saved[:num_factors]), saved[num_factors:]
        layout = SortedRows(slots, places, ctx.layout)
        outputs, saved = saved[: len(parts)], saved[len(parts) :]
        of_gate_up, of_down = saved[: len(updates)], saved[len(updates) :]
        whole = [slice(0, x.shape[1])]
        gradients: list[Tensor | None] = []

        # Unweighted: the gradient of a weight needs its product with the gate's output.
        sorted_grad = layout.gather(grad.contiguous())
        row_weights = weights.reshape(-1)[layout.slots, None]
        grad_inner = x.new_empty(len(sorted_grad), experts.down.sizes[1])
        _multiply_back([sorted_grad], experts.down, whole, grad_inner, layout.groups)
        ups = [
            _add_update_back([sorted_grad], update.down, whole, grad_inner, own)
            for update, own in zip(updates, ctx.groups, strict=True)
        ]
        inner, grad_outputs = _gate_again(experts, outputs)
        grad_weights = (grad_inner * inner).sum(1, dtype=torch.float32)
        if experts.down.bias is not None:
            bias = experts.down.bias.index_select(0, layout.experts)
            grad_weights += (sorted_grad * bias).sum(1, dtype=torch.float32)

        def weighted(values: Tensor) -> Tensor:
            return (values * row_weights).to(x.dtype)

        down_gradients = [
            _factor_gradients(
                inner, [sorted_grad], weighted(narrow), weighted(up), update.down, whole, own
            )
            for update, narrow, up, own in zip(updates, of_down, ups, ctx.groups, strict=True)
        ]
        grads = grad_outputs(weighted(grad_inner))

        sorted_x = layout.gather(x)
        grad_sorted_x = torch.empty_like(sorted_x)
        _multiply_back(grads, experts.gate_up, parts, grad_sorted_x, layout.groups)
        ups = [
            _add_update_back(grads, update.gate_up, parts, grad_sorted_x, own)
            for update, own in zip(updates, ctx.groups, strict=True)
        ]
        for update, narrow, up, own, of_own_down in zip(
            updates, of_gate_up, ups, ctx.groups, down_gradients, strict=True
        ):
            gradients += _factor_gradients(sorted_x, grads, narrow, up, update.gate_up, parts, own)
            gradients += of_own_down
        grad_weights = layout.unsorted(grad_weights, weights)
        return layout.sum_rows(grad_sorted_x), grad_weights, None, None, None, *gradients


def _updates(
    scales: Sequence[UpdateScales], factors: Sequence[Tensor | None]
) -> list[ExpertUpdate]:
    return [
        own.with_factors(factors[FACTORS * number : FACTORS * (number + 1)])
        for number, own in enumerate(scales)
    ]


def _gate_again(
    experts: Experts, outputs: Sequence[Tensor]
) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """Returns the gate's output, and the function from its gradient to those of the gate's
    inputs."""
    inputs = [output.detach().requires_grad_() for output in outputs]
    with torch.enable_grad():
        inner = experts.gated(inputs)

    def gradients(grad: Tensor) -> list[Tensor]:
        return [own.contiguous() for own in torch.autograd.grad(inner, inputs, grad)]

    return inner.detach().contiguous(), gradients


def _multiply(
    x: Tensor, matrices: Matrices, parts: Sequence[slice], outputs: Sequence[Tensor], groups: Groups
) -> None:
    """Writes each expert's product, a part of its columns to each of the outputs."""

    def compute(rows: slice, number: int) -> None:
        matrix, bias = matrices.dense(number), matrices.bias
        along = not matrix.is_contiguous()
        for part, output in zip(parts, outputs, strict=True):
            own = matrix.T if along else matrix[part]
            own_bias = None if bias is None else bias[number, part]
            products.write(x[rows], own, own_bias, output[rows], along=along)

    _for_each_matrix(groups, [x, *outputs], matrices, compute)


def _multiply_back(
    grads: Sequence[Tensor],
    matrices: Matrices,
    parts: Sequence[slice],
    grad_x: Tensor,
    groups: Groups,
) -> None:
    """Writes to grad_x what the gradients of the parts of the columns give."""

    def compute(rows: slice, number: int) -> None:
        matrix = matrices.dense(number)
        along = matrix.is_contiguous()
        for place, (part, grad) in enumerate(zip(parts, grads, strict=True)):
            own = matrix[part] if along else matrix.T
            products.write(grad[rows], own, None, grad_x[rows], along=along, add=place > 0)

    _for_each_matrix(groups, [*grads, grad_x], matrices, compute)


def _for_each_matrix(
    groups: Groups, rows: Sequence[Tensor], matrices: Matrices, compute: Compute
) -> None:
    """Makes the calls of compute(rows, number) for each group. Packed matrices are decoded one
    after the other."""
    if isinstance(matrices.weight, Tensor):
        for_each_group(groups, rows, [matrices.weight, matrices.bias], compute)
    else:
        for group, number in enumerate(groups.numbers.tolist()):
            compute(groups.rows(group), number)


def _add_update(
    x: Tensor,
    factors: StackFactors | None,
    parts: Sequence[slice],
    outputs: Sequence[Tensor],
    groups: Groups,
) -> Tensor:
    """Adds an update to the outputs. Returns x A^T (S, R), written in the rows of the groups."""
    if factors is None:
        return x.new_empty(len(x), 0)
    A, B, scale = factors
    narrow = x.new_empty(len(x), A.shape[1])

    def compute(rows: slice, number: int) -> None:
        rank_calls.rank_down(x[rows], A[number], narrow[rows], 1.0)
        for part, output in zip(parts, outputs, strict=True):
            rank_calls.rank_up(narrow[rows], B[number, part], output[rows], scale)

    for_each_group(groups, [x, narrow, *outputs], [A, B], compute)
    return narrow


def _add_update_back(
    grads: Sequence[Tensor],
    factors: StackFactors | None,
    parts: Sequence[slice],
    grad_x: Tensor,
    groups: Groups,
) -> Tensor:
    """Adds an update's part to grad_x. Returns the gradient of x A^T (S, R)."""
    if factors is None:
        return grad_x.new_empty(len(grad_x), 0)
    A, B, scale = factors
    ups = [grad_x.new_empty(len(grad_x), A.shape[1]) for _ in parts]

    def compute(rows: slice, number: int) -> None:
        for part, grad, up in zip(parts, grads, ups, strict=True):
            rank_calls.rank_down(grad[rows], B[number, part].T, up[rows], scale)
            rank_calls.rank_up(up[rows], A[number].T, grad_x[rows], 1.0)

    for_each_group(groups, [*grads, *ups, grad_x], [A, B], compute)
    return ups[0] if len(ups) == 1 else ups[0] + ups[1]


def _factor_gradients(
    x: Tensor,
    grads: Sequence[Tensor],
    narrow: Tensor,
    up: Tensor,
    factors: StackFactors | None,
    parts: Sequence[slice],
    groups: Groups,
) -> list[Tensor | None]:
    """Returns the gradients of A and B, 0 for experts without rows."""
    if factors is None:
        return [None, None]
    grad_A, grad_B = torch.zeros_like(factors.A), torch.zeros_like(factors.B)

    def compute(rows: slice, number: int) -> None:
        rank_calls.rank_gradient(
            up[rows], x[rows], [grad_A[number]], 1.0, transposed=False, add=False
        )
        for part, grad in zip(parts, grads, strict=True):
            rank_calls.rank_gradient(
                narrow[rows],
                grad[rows],
                [grad_B[number, part]],
                factors.scale,
                transposed=True,
                add=False,
            )

    for_each_group(groups, [x, narrow, up, *grads], [grad_A, grad_B], compute)
    return [grad_A, grad_B]


def experts_with_lora_reference(
    x: Tensor, index: Tensor, weights: Tensor, experts: Experts, updates: Sequence[ExpertUpdate]
) -> Tensor:
    """Defines experts_with_lora, expert by expert, under torch's own autograd."""
    y = torch.zeros_like(x)
    for expert in index.unique().tolist():
        rows, choices = (index == expert).nonzero(as_tuple=True)

        def linear(
            own_x: Tensor, matrices: Matrices, name: str, rows: Tensor = rows, expert: int = expert
        ) -> Tensor:
            bias = None if matrices.bias is None else matrices.bias[expert]
            output = F.linear(own_x, matrices.dense(expert), bias)
            for update in updates:
                factors = getattr(update, name)
                acts = (rows >= update.rows.start) & (rows < update.rows.stop)
                if factors is not None:
                    A, B = (factor[expert].to(x.dtype) for factor in factors[:2])
                    output = output + acts[:, None] * (factors.scale * (own_x @ A.T @ B.T))
            return output

        inner = linear(x[rows], experts.gate_up, "gate_up")
        if experts.activation is not None:
            first, second = inner.chunk(2, -1)
            inner = gated_reference(first, second, experts.activation)
        else:
            inner = experts.gate(inner)
        own = linear(inner, experts.down, "down") * weights[rows, choices, None]
        y = y.index_add(0, rows, own.to(y.dtype))
    return y
