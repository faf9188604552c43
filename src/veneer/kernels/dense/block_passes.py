"""Forward and backward of a decoder layer with LoRA: the calls in their order (see block.py).

Shapes: M rows, D hidden, S head size, R ranks side by side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.kernels.attention.compiled import packed_backward, packed_forward
from veneer.kernels.bindings import block_calls, row_calls
from veneer.kernels.bindings.block_calls import Side
from veneer.kernels.dense import rank
from veneer.kernels.dense.block_operands import (
    DOWN,
    GATES,
    LAYERS,
    QKV,
    Block,
    Norm,
    O,
    split_ranks,
)


def forward(
    block: Block, x: Tensor, factors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns y, and what backward needs. factors: A of each layer, then B of each."""
    A, B, rows = factors[:LAYERS], factors[LAYERS:], len(x)

    def product(number: int, x: Tensor) -> Tensor:
        layer = block.layers[number]
        return layer.base.product(x, layer.bias)

    def output_sides(numbers: Sequence[int], down: Tensor) -> list[Side]:
        parts = split_ranks(down, [A[number] for number in numbers])
        return [block.output_side(*pair, B) for pair in zip(numbers, parts, strict=True)]

    def new_narrow(numbers: Sequence[int]) -> Tensor:
        return x.new_empty(rows, sum(len(A[number]) for number in numbers))

    def new_scale() -> Tensor:
        return torch.empty(rows, dtype=torch.float32, device=x.device)

    n, n_scale, n_down = torch.empty_like(x), new_scale(), new_narrow(QKV)
    block_calls.norm_forward(
        x,
        weight=block.before.weight,
        out=n,
        scale=n_scale,
        epsilon=block.before.epsilon,
        behind=block.input_side(QKV, A, n_down),
    )
    heads = [product(number, n) for number in QKV]
    block_calls.heads(heads, block.cos, block.sin, output_sides(QKV, n_down), back=False)
    q, k, v = (values.view(rows, -1, block.size) for values in heads)
    out, entropies = packed_forward(q, k, v, block.layout, block.rules)
    out_down = rank.down(out.view(rows, -1), A[O], dropout=block.layers[O].dropout)
    h, m = product(O, out.view(rows, -1)), torch.empty_like(x)
    m_scale, m_down = new_scale(), new_narrow(GATES)
    block_calls.norm_forward(
        h,
        before=block.output_side(O, out_down, B),
        beside=x,
        weight=block.between.weight,
        out=m,
        scale=m_scale,
        epsilon=block.between.epsilon,
        behind=block.input_side(GATES, A, m_down),
    )
    gate, up = (product(number, m) for number in GATES)
    gated, gated_down = torch.empty_like(gate), new_narrow([DOWN])
    of_gate, of_up = output_sides(GATES, m_down)
    side = block.input_side([DOWN], A, gated_down)
    block_calls.gate_forward(gate, up, gated, of_gate, of_up, side)
    y = product(DOWN, gated)
    block_calls.norm_forward(y, before=block.output_side(DOWN, gated_down, B), beside=h)
    pairs = ((n, n_down), (m, m_down), (gated, gated_down))
    inputs = [] if block.recomputes(rows) else [_if_adapted(*pair) for pair in pairs]
    saved = (n_scale, n_down, q, k, v, out, out_down, h, m_scale, m_down, gate, up, gated_down)
    return [y], [*saved, *inputs, *entropies]


def backward(
    block: Block,
    x: Tensor,
    factors: Sequence[Tensor],
    saved: Sequence[Tensor],
    grad: Tensor,
    grad_factors: Sequence[Tensor],
    *,
    needs_x: bool,
    add: bool,
) -> list[Tensor]:
    """Returns the gradient of x if it is needed.

    saved         what forward returned for backward
    grad_factors  where the gradients of the factors are written; `add` adds to what they hold
    """
    A, B = factors[:LAYERS], factors[LAYERS:]
    n_scale, n_down, q, k, v, out, out_down, h, m_scale, m_down, gate, up, gated_down, *more = saved
    rows = len(x)
    inputs = [] if block.recomputes(rows) else [more.pop(0) for _ in range(3)]  # n, m, gated
    entropies = more

    def new_narrow(numbers: Sequence[int]) -> Tensor:
        return x.new_empty(rows, sum(len(A[number]) for number in numbers))

    def output_sides(numbers: Sequence[int], above: Tensor) -> list[Side]:
        parts = split_ranks(above, [A[number] for number in numbers])
        return [block.output_side(*pair, B) for pair in zip(numbers, parts, strict=True)]

    def input_gradient(numbers: Sequence[int], grads: Sequence[Tensor]) -> Tensor:
        total: Tensor | None = None
        for number, layer_grad in zip(numbers, grads, strict=True):
            total = block.layers[number].base.input_gradient(layer_grad, total)
        assert total is not None
        return total

    def write_factor_gradients(
        numbers: Sequence[int], x: Tensor, above: Tensor, grads: Sequence[Tensor], down: Tensor
    ) -> None:
        """above: g B of each layer, side by side; down: x A^T of each."""
        adapted = [number for number in numbers if len(A[number])]
        if adapted:
            dropouts = [block.layers[number].dropout for number in adapted]
            targets = [grad_factors[number] for number in adapted]
            rank.put_gradients(targets, above, x, dropouts, add=add)
        parts = split_ranks(down, [A[number] for number in numbers])
        for number, low, g in zip(numbers, parts, grads, strict=True):
            if number in adapted:
                target, scaling = grad_factors[LAYERS + number], block.layers[number].scaling
                rank.put_gradients([target], low, g, [None], scaling, turned=True, add=add)

    def normed(place: int, x: Tensor, norm: Norm, scale: Tensor, down: Tensor) -> Tensor:
        if inputs or not down.shape[1]:
            return inputs[place] if inputs else _if_adapted(x, down)
        again, scale = torch.empty_like(x), torch.empty_like(scale)
        block_calls.norm_forward(
            x, weight=norm.weight, out=again, scale=scale, epsilon=norm.epsilon
        )
        return again

    def gated() -> Tensor:
        if inputs or not gated_down.shape[1]:
            return inputs[2] if inputs else _if_adapted(gate, gated_down)
        again = torch.empty_like(gate)
        row_calls.silu_gate_forward(gate, up, again)
        return again

    above = rank.down(grad, B[DOWN].T, block.layers[DOWN].scaling)
    grad_gate, grad_up = input_gradient([DOWN], [grad]), torch.empty_like(up)
    write_factor_gradients([DOWN], gated(), above, [grad], gated_down)
    before = block.input_side([DOWN], A, above)
    above = new_narrow(GATES)
    of_gate, of_up = output_sides(GATES, above)
    block_calls.gate_backward(
        grad_gate, gate, up, grad_up, before=before, of_gate=of_gate, of_up=of_up
    )
    m = normed(1, h, block.between, m_scale, m_down)
    write_factor_gradients(GATES, m, above, [grad_gate, grad_up], m_down)
    grad_h = input_gradient(GATES, [grad_gate, grad_up])
    before, above = block.input_side(GATES, A, above), new_narrow([O])
    block_calls.norm_backward(
        grad_h,
        h,
        block.between.weight,
        m_scale,
        before=before,
        beside=grad,
        behind=block.output_side(O, above, B),
    )
    write_factor_gradients([O], out.view(rows, -1), above, [grad_h], out_down)
    grad_out = input_gradient([O], [grad_h])
    rank.add_up(grad_out, above, A[O].T, dropout=block.layers[O].dropout)
    grad_heads = packed_backward(
        q, k, v, out, entropies, grad_out.view(q.shape), block.layout, block.rules
    )
    grads, above = [values.view(rows, -1) for values in grad_heads], new_narrow(QKV)
    block_calls.heads(grads, block.cos, block.sin, output_sides(QKV, above), back=True)
    n = normed(0, x, block.before, n_scale, n_down)
    write_factor_gradients(QKV, n, above, grads, n_down)
    if not needs_x:
        return []
    grad_x, before = input_gradient(QKV, grads), block.input_side(QKV, A, above)
    block_calls.norm_backward(grad_x, x, block.before.weight, n_scale, before=before, beside=grad_h)
    return [grad_x]


def _if_adapted(x: Tensor, narrow: Tensor) -> Tensor:
    """Returns x (M, D) if a factor's gradient needs it, that of an A which made `narrow` of x.

    Without such a factor x has no rows.
    """
    return x if narrow.shape[1] else x.new_empty(0, x.shape[1])
